"""The custom call of JAX's programs, which runs a kernel.

JAX stores compiled programs on disk. So a program names a handler, and holds numbers, but never an
address of this process. The name carries versions, so no handler gets another one's numbers.

The lowering of the first program imports this module, because handlers need llvmlite.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from unidrop import __version__
from unidrop.dtypes import dtype_name
from unidrop.fused import prepare, unavailable
from unidrop.fused.layout import make_layout
from unidrop.fused.task import get_bits
from unidrop.fused.xla import make_handler
from unidrop.rate import Rate
from unidrop.threads import fork_guard
from unidrop.words import split64

__all__ = ["Call", "call_kernel", "make_call", "pack_rate"]

_VERSION: Final = 1  # change it with the operands, the attribute, or the fields of a task


_targets: dict[tuple[str, str], str | None] = {}  # by traversal and dtype


class Call(NamedTuple):
    """A custom call: the name of its handler, and the numbers of its attribute."""

    target: str
    numbers: tuple[int, ...]


def make_call(
    dtype: Any,
    shape: tuple[int, ...],
    mask_strides: tuple[int, ...],
    base: int,
    start_strides: Sequence[int],
    runs: int,
) -> Call | None:
    """Return the custom call of an array that is not empty, or None if no handler supports it.

    Parameters
    ----------
    dtype : dtype
    shape : tuple of int
        The shape of the part of x that has one key. x consists of ``runs`` such parts.
    mask_strides : tuple of int
        As in `unidrop.fused.prepare`.
    base : int
        The number of the first element, without the starts that are arrays.
    start_strides : sequence of int
        The stride of each start that is an array.
    runs : int
    """
    if unavailable() is not None:
        return None
    layout = make_layout(shape, None, mask_strides)
    kernel = prepare(dtype, shape, None, mask_strides)
    assert layout is not None  # C order has no gaps
    assert kernel is not None
    with fork_guard:
        target = _register(layout.traversal, dtype_name(dtype), kernel.kernel.address)
    if target is None:
        return None
    numbers = runs, kernel.size, base, *start_strides
    return Call(target, (*map(_as_int64, numbers), *kernel.template.tolist()))


def _as_int64(number: int) -> int:
    """Return an integer modulo 2^64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


@lru_cache(maxsize=1024)
def pack_rate(rate: Rate) -> np.ndarray[Any, Any]:
    """Return the threshold of a rate that keeps some elements, and the bits of its scale."""
    hi, lo = split64(get_bits(rate.scale))
    return np.array([rate.threshold, lo, hi], np.uint32)


def call_kernel(call: Call, x: Any, rate: Any, *words: Any) -> Any:
    """Return the output of a call, from x, a packed rate, and words of each run."""
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    numbers = np.array(call.numbers, np.int64)
    return jax.ffi.ffi_call(call.target, result)(x, rate, *words, numbers=numbers)


def _register(traversal: str, kind: str, kernel: int) -> str | None:
    """Register a handler for a kernel and return its name, or None if XLA's structures differ.

    XLA accepts one handler of a name. Compiled code is never freed, so the first one stays right.
    """
    if (traversal, kind) not in _targets:
        _targets[traversal, kind] = _register_once(traversal, kind, kernel)
    return _targets[traversal, kind]


def _register_once(traversal: str, kind: str, kernel: int) -> str | None:
    name = f"unidrop_{traversal}_{kind}_{__version__}_{_VERSION}"
    jax.local_devices(backend="cpu")  # JAX would keep an earlier registration, and fail later
    try:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(make_handler(kernel)), platform="cpu")
    except jax.errors.JaxRuntimeError:  # XLA refuses the version
        return None
    return name
