"""One dropout that drops the very same elements in every array library."""

from unidrop.dropout import dropout
from unidrop.key import Key
from unidrop.mask import STREAM_VERSION, keep_mask

__all__ = ["STREAM_VERSION", "Key", "dropout", "keep_mask"]
__version__ = "0.1.0"
