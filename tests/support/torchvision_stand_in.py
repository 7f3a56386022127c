"""A stand-in for a torchvision that does not import, such as one for CUDA beside a CPU PyTorch.

Transformers, Lightning and timm import torchvision where pip has installed it. The models of the
tests never use it.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

__all__ = ["import_torchvision"]


class StandIn(MetaPathFinder, Loader):
    """Finds an empty module for each name under torchvision."""

    def find_spec(self, name, path=None, target=None):
        is_ours = name.partition(".")[0] == "torchvision"
        return ModuleSpec(name, self, is_package=True) if is_ours else None

    def create_module(self, spec):
        return MagicMock(__version__="0")

    def exec_module(self, module):
        pass


def import_torchvision():
    """Import torchvision, or put the stand-in in its place."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # RuntimeError: its operators are not in this PyTorch
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, StandIn())
