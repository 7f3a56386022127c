"""Dropout under the names and arguments that each framework's users know, a module for each.

A module is imported at its first use, so only the frameworks in use must be installed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unidrop.adapters import flax as flax
    from unidrop.adapters import jax as jax
    from unidrop.adapters import keras as keras
    from unidrop.adapters import numpy as numpy
    from unidrop.adapters import tensorflow as tensorflow
    from unidrop.adapters import torch as torch
else:
    _FRAMEWORKS = ("flax", "jax", "keras", "numpy", "tensorflow", "torch")

    def __getattr__(name):
        """Import an adapter at its first use."""
        if name in _FRAMEWORKS:
            from importlib import import_module

            return import_module(f"unidrop.adapters.{name}")
        raise AttributeError(f"module 'unidrop.adapters' has no attribute {name!r}")

    def __dir__():
        return list(_FRAMEWORKS)
