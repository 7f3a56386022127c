"""What the core must know of each library that is more than the array API standard."""
