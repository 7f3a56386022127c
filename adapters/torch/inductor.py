"""Dropout inside the kernels that Inductor generates: the operator as pointwise arithmetic.

An opaque operator reads and writes the whole tensor once more. But Inductor fuses pointwise
arithmetic into the kernels of the operations around it. So this file describes the operator as such
arithmetic, for devices that Inductor serves by Triton. The backward pass saves a key, as before.

PyTorch has no public interface for this, so this file alone uses private names of Inductor. If they
have changed, the operator remains opaque, with the same bits, and a log message of level DEBUG
shows the error. Before PyTorch 2.13 it is opaque too, because this file is tested with 2.13 alone.

Inductor's caches on disk do not depend on this file. So a change of the output, for the same
arguments, needs another name for the operator.

On the CPU the operator is always opaque: Inductor's C++ backend rejects a selection of unsigned
words.
"""

import logging
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from unidrop.dtypes import compute_dtype
from unidrop.philox import ODD_MULTIPLIER, philox
from unidrop.rate import Rate
from unidrop.window import Window

__all__ = ["register"]

_LOGGER = logging.getLogger(__name__)

_INT32_MAX: Final = (1 << 31) - 1

_is_registered = False


def register(device: torch.device) -> None:
    """Let Inductor lower the operators, before it compiles the first graph for a device of Triton.

    The fake implementation of the operator calls this. AOTAutograd runs it for each node of a graph
    after Inductor has been imported and before Inductor lowers the graph; PyTorch caches fake
    outputs of its own operators only. An import of Inductor takes seconds, so none happens here.
    """
    global _is_registered
    if _is_registered or "torch._inductor.lowering" not in sys.modules:
        return
    try:
        from torch._inductor.ir import is_triton

        if is_triton(device):
            _is_registered = True
            _register()
    except Exception:
        _LOGGER.debug("cannot register a lowering, so dropout is opaque", exc_info=True)


def _register() -> None:
    from torch._inductor.lowering import fallback_handler, register_lowering
    from torch._inductor.ops_handler import OpsHandler

    if not hasattr(OpsHandler, "value_expr"):
        raise RuntimeError(f"untested with PyTorch {torch.__version__}")

    def register(operator: Any, lower: Callable[..., Any]) -> None:
        opaque: Any = fallback_handler(operator, add_to_fallback_set=False)  # type: ignore[no-untyped-call] # it has no types

        def lower_or_call(*arguments: Any, **options: Any) -> Any:
            try:
                fused = lower(*arguments, **options)
            except Exception:
                _LOGGER.debug("cannot lower %s, so it is opaque", operator, exc_info=True)
                fused = None
            return opaque(*arguments, **options) if fused is None else fused

        register_lowering(operator, type_promotion_kind=None)(lower_or_call)

    register(torch.ops.unidrop.dropout.default, _lower_dropout)
    register(torch.ops.unidrop.integers.default, _lower_integers)


def _lower_integers(values: Sequence[Any], *, device: torch.device) -> Any | None:
    """Return integers as constants of a kernel, or None if their values may change."""
    from torch._inductor.ir import Pointwise, is_triton
    from torch._inductor.virtualized import ops

    if not is_triton(device) or not all(isinstance(value, int) for value in values):
        return None

    def compute_element(index: Sequence[Any]) -> Any:
        first, *rest = (ops.constant(value, torch.int64) for value in values)
        for i, value in enumerate(rest, 1):
            place = ops.index_expr(index[0], torch.int32)
            first = ops.where(ops.eq(place, ops.constant(i, torch.int32)), value, first)
        return first

    return Pointwise.create(
        device=device, dtype=torch.int64, inner_fn=compute_element, ranges=[len(values)]
    )


def _lower_dropout(
    x: Any,
    key: Any,
    p: float,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[Any] | None = None,
    start: Any = None,
    random: Any = None,
    scale: float | None = None,
    normal: Sequence[float] | None = None,
    scheduled: Any = None,
    complement: bool = False,
) -> Any | None:
    """Return dropout as pointwise arithmetic, or None if the operator must remain opaque."""
    from torch._inductor.ir import Pointwise, is_triton
    from torch._inductor.virtualized import V, ops

    device, dtype = x.get_device(), x.get_dtype()
    tensors = [key] if start is None else [key, start]
    if not is_triton(device) or any(tensor.get_device() != device for tensor in tensors):
        return None
    if (
        normal is not None
        or scheduled is not None
        or complement
        or dtype.is_complex
        or any(tensor.get_dtype() != torch.int64 for tensor in tensors)
    ):
        return None
    sizes = [_as_integer(length) for length in key.get_size()]
    if len(sizes) != 1 or (isinstance(sizes[0], int) and sizes[0] != 2):
        return None
    window = _make_window(x.get_size(), broadcast_axes, global_shape, start)
    rate = Rate.from_p(p) if scale is None else Rate.from_p(p).with_scale(scale)
    compute = compute_dtype(dtype)
    factor = rate.scale_in(compute)
    working = getattr(torch, compute)
    # Inductor computes an index in as few bits as the sizes of a kernel's tensors need. A kernel of
    # a view of the output may have tensors smaller than x, unless the output is a tensor itself.
    is_small = V.graph.sizevars.statically_known_leq(math.prod(x.get_size()), _INT32_MAX)
    load, load_key = x.make_loader(), key.make_loader()
    load_start = None if start is None else start.make_loader()

    def compute_element(index: Sequence[Any]) -> Any:
        zero = ops.constant(0.0, working)
        if rate.keeps_nothing:
            return ops.to_dtype(zero, dtype)
        y = ops.mul(ops.to_dtype(load(index), working), ops.constant(factor, working))
        if rate.threshold:
            words = [ops.to_dtype(load_key([i]), torch.uint32) for i in (0, 1)]
            number = _number(ops, window, index, load_start, is_small)
            u = _random_word(ops, *number, (words[0], words[1]))
            keep = ops.ge(u, ops.constant(rate.threshold, torch.uint32))
            y = ops.where(keep, y, zero)
        return ops.to_dtype(y, dtype)

    output: Any = Pointwise.create(
        device=device, dtype=dtype, inner_fn=compute_element, ranges=x.get_size()
    )
    output.data.data.inner_fn_opcount()  # raises now if Inductor lacks an operation
    if not is_small:
        output.realize()
    return output


def _make_window(
    size: Sequence[Any],
    broadcast_axes: Sequence[int],
    global_shape: Sequence[Any] | None,
    start: Any,
) -> Window:
    """Return the window of a tensor; raises if the operator itself raises when it runs."""
    shape = tuple(_as_integer(length) for length in size)
    if global_shape is None and start is None:
        axes = Window.from_args([1] * len(shape), broadcast_axes).broadcast_axes
        return Window(tuple(1 if i in axes else n for i, n in enumerate(shape)), axes)
    # Whether lengths that vary fit into the larger array is known when the operator runs.
    if len(shape) != _as_integer(*start.get_size()):
        raise ValueError(f"start must have one element per axis of shape {shape}")
    assert global_shape is not None
    whole = [_as_integer(length) for length in global_shape]
    return Window.from_args(shape, broadcast_axes, whole, [0] * len(shape))


def _as_integer(length: Any) -> Any:
    """Return the length of an axis: an integer, or an expression of Inductor's if it varies."""
    return int(length) if getattr(length, "is_Integer", True) else length


def _number(
    ops: Any,
    window: Window,
    index: Sequence[Any],
    load_start: Callable[[Sequence[Any]], Any] | None,
    is_small: bool,
) -> tuple[Any, Any, Any]:
    """Return the words of the number of an element's block, and the element's number in it.

    Each is a word; the high word of a block, and the number, may have more bits than count.
    """
    import sympy  # type: ignore[import-untyped] # it has no types

    terms = [(i, stride) for i, stride in enumerate(window.strides) if stride != 0]
    if load_start is None:
        whole = sympy.sympify(sum(index[i] * stride for i, stride in terms))
        if is_small:
            number = ops.to_dtype(ops.index_expr(whole, torch.int32), torch.uint32)
            block = ops.bitwise_right_shift(number, ops.constant(3, torch.uint32))
            return block, ops.constant(0, torch.uint32), number
        number = ops.to_dtype(ops.index_expr(whole, torch.int64), torch.uint64)
    else:
        number = _number_in_larger(ops, window, index, load_start)
    block = ops.bitwise_right_shift(number, ops.constant(3, torch.uint64))
    high = ops.bitwise_right_shift(block, ops.constant(32, torch.uint64))
    return tuple(ops.to_dtype(value, torch.uint32) for value in (block, high, number))


def _number_in_larger(
    ops: Any, window: Window, index: Sequence[Any], load_start: Callable[[Sequence[Any]], Any]
) -> Any:
    """Return the number of an element of a window, of dtype ``uint64``.

    The numbers of a larger array may need more bits than an index of x. Inductor would compute sums
    and products of expressions in the bits of an index, but not of bitwise operations.
    """
    import sympy

    assert window.global_shape is not None
    number = zero = ops.constant(0, torch.uint64)
    parts = dict.fromkeys((axis.stride for axis in window.whole.axes), sympy.S.Zero)
    for i, stride in enumerate(window.strides):
        if stride:  # else neighbors share a decision
            inner = max(s for s in parts if s <= stride)
            parts[inner] += index[i] * (stride // inner)
        if window.shape[i] != window.global_shape[i]:  # else the start is 0
            first = ops.to_dtype(load_start([i]), torch.uint64)
            offset = ops.mul(ops.bitwise_or(first, zero), ops.constant(stride, torch.uint64))
            number = ops.add(number, offset)
    for stride, part in parts.items():
        place = ops.to_dtype(ops.index_expr(part, torch.int64), torch.uint64)
        offset = ops.mul(ops.bitwise_or(place, zero), ops.constant(stride, torch.uint64))
        number = ops.add(number, offset)
    return number


class _InductorWords:
    """The arithmetic of `philox` on values of Inductor, of dtype ``uint32``."""

    sums_wrap = True

    def __init__(self, ops: Any) -> None:
        self.ops = ops

    def constant(self, word: int) -> Any:
        """Return a Python word as a value."""
        return self.ops.constant(word, torch.uint32)

    def split(self, value: Any, bits: int) -> tuple[Any, Any]:
        """Return a word as it is."""
        return None, value

    def mulhilo(self, a: Any, m: int) -> tuple[Any, Any]:
        """Return the high and the low word of a product, which a GPU computes as one."""
        ops = self.ops
        product = ops.mul(ops.to_dtype(a, torch.uint64), ops.constant(m, torch.uint64))
        high = ops.bitwise_right_shift(product, ops.constant(32, torch.uint64))
        return ops.to_dtype(high, torch.uint32), ops.to_dtype(product, torch.uint32)


def _random_word(ops: Any, low: Any, high: Any, number: Any, key: tuple[Any, Any]) -> Any:
    """Return the word u of an element, from the words of its block and the number in it."""
    words = _InductorWords(ops)
    zero = words.constant(0)
    four = philox((low, high, zero, zero), key, words)  # type: ignore[arg-type] # values of Inductor

    def has_bit(bit: int) -> Any:
        return ops.ne(ops.bitwise_and(number, words.constant(bit)), zero)

    second, third = has_bit(2), has_bit(4)
    even = ops.where(
        third, ops.where(second, four[3], four[2]), ops.where(second, four[1], four[0])
    )
    return ops.where(has_bit(1), ops.mul(even, words.constant(ODD_MULTIPLIER)), even)
