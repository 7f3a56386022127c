"""One dropout that drops the very same elements in every array library."""

from pkgutil import extend_path

# In a clone, the folder unidrop/ shadows the installed package but lacks its part adapters/.
__path__ = extend_path(__path__, __name__)

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
