"""Hides TensorFlow from a process, as if it were not installed: Keras can do without."""

raise ModuleNotFoundError("this process must not import TensorFlow", name="tensorflow")
