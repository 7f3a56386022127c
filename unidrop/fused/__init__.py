"""Dropout as single-pass kernels on the CPU: the same bits, faster.

Deleting this package changes no result: `unidrop.dispatch` notices its absence, and every array
uses the portable operations. Kernels read and write buffers, and know no library.
"""

import math
import sys
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unidrop.dtypes import ITEM_SIZES, dtype_name
from unidrop.fused.layout import make_layout
from unidrop.fused.memory import advise_huge_pages
from unidrop.key import set_compiled_fold
from unidrop.rate import Rate
from unidrop.threads import fork_guard

if TYPE_CHECKING:
    from unidrop.fused.task import PreparedKernel

__all__ = ["advise_huge_pages", "make_mask", "prepare", "unavailable"]


@cache
def unavailable() -> str | None:
    """Return why kernels cannot be compiled, or None; the first call imports llvmlite."""
    if sys.byteorder != "little":
        return "this machine is big-endian"
    try:
        with fork_guard:
            import llvmlite.binding  # noqa: F401
    except ModuleNotFoundError:
        return "llvmlite is not installed: install unidrop with its extra 'fast'"
    except (ImportError, OSError) as error:  # OSError: its library is damaged
        return f"llvmlite can't be imported: {error}"
    return None


@lru_cache(maxsize=4096)
def prepare(
    dtype: Any,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    mask_strides: tuple[int, ...],
) -> "PreparedKernel | None":
    """Return the kernel for an array of at least one element, or None if the array has gaps.

    Parameters
    ----------
    dtype : dtype
        A dtype of any library; bool means the mask itself.
    shape : tuple of int
    strides : tuple of int or None
        The distance between neighbors along each axis in memory, in elements; None means C order.
    mask_strides : tuple of int
        The same distance in the mask's numbering; 0 along a broadcast axis.
    """
    layout = make_layout(shape, strides, mask_strides)
    if layout is None:
        return None
    kind = dtype_name(dtype)
    prepare_kernel = _compile(layout.traversal, kind)
    prepared: PreparedKernel = prepare_kernel(layout, shape, math.prod(shape) * ITEM_SIZES[kind])
    return prepared


def make_mask(
    shape: tuple[int, ...], mask_strides: tuple[int, ...], rate: Rate, key: int, base: int
) -> NDArray[np.bool]:
    """Return the mask of a shape without zeros, for a rate that keeps some elements."""
    mask = np.empty(shape, dtype=np.bool)
    kernel = prepare(mask.dtype, shape, None, mask_strides)
    assert kernel is not None  # C order has no gaps
    kernel.run(mask.ctypes.data, mask.ctypes.data, rate, key, base, mask)
    return mask


@cache
def _compile(traversal: str, kind: str) -> Any:
    """Compile a kernel and return `prepare_kernel` for it; the first call imports llvmlite."""
    with fork_guard:
        from unidrop.fused.kernels import make_kernel
        from unidrop.fused.task import prepare_kernel

        _compile_fold()
        return partial(prepare_kernel, make_kernel(traversal, kind))


@cache
def _compile_fold() -> None:
    from unidrop.fused.generator import compile_fold

    set_compiled_fold(compile_fold())
