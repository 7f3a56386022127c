"""The matrix's own backends, one module for each library."""
