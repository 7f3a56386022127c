"""One dropout that drops the very same elements in every array library."""

from pkgutil import extend_path
from typing import TYPE_CHECKING

# In a clone, the folder unidrop/ shadows the installed package but lacks its part adapters/.
__path__ = extend_path(__path__, __name__)

import unidrop.adapters.key_types  # noqa: F401 # frameworks must accept keys
from unidrop.dispatch import explain_path, force_path
from unidrop.dropout import dropout
from unidrop.key import Key
from unidrop.mask import STREAM_VERSION, keep_mask
from unidrop.threads import get_num_threads, set_num_threads

__all__ = [
    "STREAM_VERSION",
    "Key",
    "dropout",
    "explain_path",
    "force_path",
    "get_num_threads",
    "keep_mask",
    "set_num_threads",
]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from unidrop import adapters as adapters
    from unidrop import conformance as conformance
    from unidrop import testing as testing
else:
    _SUBPACKAGES = ("adapters", "conformance", "testing")
    _RENAMED = {"explain": "explain_path", "only": "force_path"}

    def __getattr__(name):
        """Import a subpackage at its first use."""
        if name in _SUBPACKAGES:
            from importlib import import_module

            return import_module(f"unidrop.{name}")
        hint = f"; its new name is {_RENAMED[name]!r}" if name in _RENAMED else ""
        raise AttributeError(f"module 'unidrop' has no attribute {name!r}{hint}")

    def __dir__():
        return sorted([*__all__, *_SUBPACKAGES])
