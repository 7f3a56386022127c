"""Dropout as single-pass kernels on a GPU, compiled by Triton: the same bits, faster.

Deleting this package changes no result, as for `unidrop.fused`. The kernels read and write device
memory behind pointers, and know no array library. Importing this package does not import Triton.
"""

import os
import re
import sys
from functools import cache

from unidrop.fused.triton.attention_launch import MAX_FEATURES, Attention, attend, differentiate
from unidrop.fused.triton.launch import dropout, fold_in, next_key
from unidrop.threads import fork_guard

__all__ = [
    "MAX_FEATURES",
    "Attention",
    "attend",
    "differentiate",
    "dropout",
    "fold_in",
    "next_key",
    "unavailable",
]

_OLDEST = (3, 4)


@cache
def unavailable() -> str | None:
    """Return why kernels cannot run, or None.

    The first call imports Triton, which compiles what it launches kernels with.
    """
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
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    try:
        triton.runtime.driver.active.utils  # noqa: B018 - the look-up compiles them
    except Exception as error:  # without a GPU, a C compiler, or a folder to write to
        return f"Triton can't launch kernels: {error}"
    return None
