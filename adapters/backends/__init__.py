"""How the conformance matrix reaches each library."""
