"""Hides pandas from a process, as if it were not installed: Keras can do without."""

raise ModuleNotFoundError("this process must not import pandas", name="pandas")
