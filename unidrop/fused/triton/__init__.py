"""Dropout as single-pass kernels on a GPU, compiled by Triton: the same bits, faster.

Deleting this package changes no result, as for `unidrop.fused`. The kernels read and write device
memory behind pointers, and know no array library. Importing this package does not import Triton.
"""

import re
import sys
from functools import cache

from unidrop.fused.triton.launch import Elements, dropout, fold_in, next_key
from unidrop.threads import fork_guard

__all__ = ["Elements", "dropout", "fold_in", "next_key", "unavailable"]

_OLDEST = (3, 4)


@cache
def unavailable() -> str | None:
    """Return why kernels cannot be compiled, or None; the first call imports Triton."""
    if "tensorflow" in sys.modules and "triton" not in sys.modules:
        # Each contains LLVM. Triton 3.7 crashes the process if it is the second to load.
        return "TensorFlow is loaded, and Triton can crash unless it is imported first"
    try:
        with fork_guard:
            import triton
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "Triton is not installed"
        return f"Triton can't be imported: {error}"
    except (ImportError, OSError) as error:  # OSError: its library is damaged
        return f"Triton can't be imported: {error}"
    version = str(getattr(triton, "__version__", "0"))
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < _OLDEST:
        return f"Triton {version} is older than {'.'.join(map(str, _OLDEST))}"
    return None
