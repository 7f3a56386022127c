"""The operators ``torch.ops.unidrop``: what compilers and exporters of PyTorch see of dropout.

Requirements this design meets:

* A compiler sees one operator with a key, and so keeps the key for the backward pass, not a mask;
  it compiles no arithmetic of words, and when it runs, the operator takes the path of its tensor.
* What has an effect, to advance a call number or to draw from the generator, says that it writes to
  a tensor. So it is neither dropped, nor merged with its like, nor moved past it.
* Nor is it computed again: where a compiler recomputes a checkpointed region, it keeps what such an
  operator returned.

A key is an int64 tensor ``[lo, hi]``, on the CPU unless it was made of a step on another device.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from unidrop.adapters.calls import COUNTING
from unidrop.adapters.torch.checkpoint import CheckpointLog, current_log
from unidrop.adapters.torch.func import randomness
from unidrop.dtypes import integer_bits
from unidrop.key import Key
from unidrop.mask import keep_mask
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.words import MASK32

__all__ = [
    "as_constant",
    "as_key",
    "cached_rate",
    "draw_words",
    "key_tensor",
    "next_call_number",
    "record_key",
    "rollback_call",
    "trace_draw_words",
    "trace_dropout",
]

# What a drawing of a key says that it writes to, which keeps drawings in order.
_ORDER = torch.zeros((), dtype=torch.int64)

# For a float. Dynamo cannot trace a cache, so only calls that are not traced use this one.
cached_rate = lru_cache(maxsize=256)(Rate.from_p)

_dispatch_mode = torch._C._get_dispatch_mode
_DispatchMode = torch._C._TorchDispatchModeKey

_library = torch.library.Library("unidrop", "DEF")
_library.define(
    "dropout(Tensor x, Tensor key, float p, int[] broadcast_axes, SymInt[]? global_shape=None, "
    "Tensor? start=None, Tensor? random=None) -> Tensor"
)
_library.define(
    "keep_mask(Tensor key, float p, SymInt[] shape, int[] broadcast_axes, "
    "SymInt[]? global_shape=None, Tensor? start=None, *, Device device) -> Tensor"
)
_library.define("integers(SymInt[] values) -> Tensor")
_library.define("stack_integers(Tensor[] values) -> Tensor")
_library.define("pack_key(Tensor lo, Tensor hi) -> Tensor")
_library.define("fold_in(Tensor key, Tensor data) -> Tensor")
_library.define("next_call(Tensor(a!) calls) -> Tensor")
_library.define("draw_key(Tensor(a!) order) -> Tensor")


def key_tensor(key: Key) -> Tensor:
    """Return a key as a tensor of its words."""
    return pack_words(key._words)


def pack_words(words: Any) -> Tensor:
    """Return the words of a key as a tensor: ``(lo, hi)``, or a tensor of both already."""
    return words if isinstance(words, Tensor) else int_tensor(words)


def int_tensor(numbers: Sequence[Any]) -> Tensor:
    """Return numbers, of which some may be 0-d tensors, as one tensor."""
    if torch.compiler.is_dynamo_compiling():
        return _record_int_tensor(numbers)
    device = next((n.device for n in numbers if isinstance(n, Tensor)), None)
    if device is None:
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return torch.stack([torch.as_tensor(n, dtype=torch.int64, device=device) for n in numbers])


def _record_int_tensor(numbers: Sequence[Any]) -> Tensor:
    """Return what `int_tensor` does, by operators that no compiler makes a kernel for."""
    ops = torch.ops.unidrop
    tensors = [n for n in numbers if isinstance(n, Tensor)]
    if not tensors:
        integers: Tensor = ops.integers(numbers)
        return integers
    device = tensors[0].device
    stack: Tensor = ops.stack_integers(
        [n if isinstance(n, Tensor) else ops.integers([n]).to(device).reshape(()) for n in numbers]
    )
    return stack


def trace_dropout(
    x: Tensor,
    words: Tensor,
    p: float,
    broadcast_axes: Sequence[int],
    global_shape: Sequence[int] | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Return dropout under the key in a tensor of words, as one operator of a trace."""
    output: Tensor = torch.ops.unidrop.dropout(
        x,
        words,
        as_constant(p),
        broadcast_axes,
        global_shape,
        start,
        random=randomness(x, words),
    )
    return output


def as_constant(p: float) -> float:
    """Return a rate that torch.compile takes as a constant, and traces again where it changes.

    A float that has changed it takes for variable, of which Inductor, in a checkpointed region,
    freezes the first value in an operator's argument.
    """
    return float.fromhex(p.hex())


def as_key(words: Tensor) -> Key:
    """Return the key of a tensor of words: with a value, where that is read without waiting."""
    if words.device.type != "cpu":
        return Key.from_words(*words.unbind())
    lo, hi = words.tolist()
    return Key._from_raw_words((lo & MASK32, hi & MASK32))


def next_call_number(calls: Tensor, draws: CheckpointLog | None) -> Any:
    """Return a call number and advance it; a recomputation replays the first number.

    The caller holds the lock `COUNTING`.
    """
    if draws is not None and draws.are_again:
        return draws.take()
    # Reading the value of other tensors would wait for a device.
    is_known = calls.device.type == "cpu" and calls.dim() == 0
    number = int(calls) if is_known else calls.clone()
    calls.add_(1)
    if draws is not None:
        draws.keep(number)
    return number


def rollback_call(calls: Tensor, draws: CheckpointLog | None) -> None:
    """Undo what `next_call_number` did for a call that raised."""
    if draws is None or not draws.are_again:
        calls.sub_(1)
    if draws is not None:
        draws.undo()


def draw_words() -> Tensor:
    """Draw a key from the default generator, on the CPU, so that no device is waited for.

    What is computed again draws too, as the generator may be in the state of the first time and
    serve others after this; but it has the key of the first time.
    """
    words = _drawn()
    draws = current_log()
    if draws is None:
        return words
    if draws.are_again:
        return draws.take()  # type: ignore[no-any-return] # the words that were kept below
    draws.keep(words)
    return words


def trace_draw_words(x: Tensor) -> Tensor:
    """Run `draw_words` as one operator of the trace that x belongs to.

    torch.export accepts no state beyond the module's and runs operations one by one, so it traces
    the random number itself. So does a FakeTensorMode, which rejects a real tensor as state.
    """
    randomness(x, None)  # raises before anything is drawn
    if torch.compiler.is_exporting():
        return _drawn()
    if not torch.compiler.is_dynamo_compiling() and _dispatch_mode(_DispatchMode.FAKE) is not None:
        return _drawn()
    words: Tensor = torch.ops.unidrop.draw_key(_ORDER)
    return words


def _drawn() -> Tensor:
    return torch.randint(1 << 32, (2,), dtype=torch.int64, device="cpu")


def record_key(words: Tensor, calls: Tensor) -> Tensor:
    """Record that a call number is taken, and return the words of the key that it is folded into.

    The CPU's is folded by an operator. On another device that would must wait for the number, so
    there folding is compiled, or done by operations on 0-d tensors.
    """
    number = torch.ops.unidrop.next_call(calls)
    if calls.device.type == "cpu":
        folded: Tensor = torch.ops.unidrop.fold_in(words, number)
        return folded
    lo, hi = words.to(calls.device).unbind()
    return key_tensor(Key.from_words(lo, hi).fold_in(number))


@_disable_dynamo
def _dropout(
    x: Tensor,
    key: Tensor,
    p: float,
    broadcast_axes: Sequence[int],
    global_shape: Sequence[int] | None = None,
    start: Tensor | None = None,
    random: Tensor | None = None,
) -> Tensor:
    plan = DropoutPlan.from_args(
        x,
        cached_rate(p),
        broadcast_axes=tuple(broadcast_axes),
        global_shape=global_shape,
        start=_starts(start),
    )
    output: Tensor = plan.apply(x, as_key(key))
    return output


@_disable_dynamo
def _keep_mask(
    key: Tensor,
    p: float,
    shape: Sequence[int],
    broadcast_axes: Sequence[int],
    global_shape: Sequence[int] | None = None,
    start: Tensor | None = None,
    *,
    device: torch.device,
) -> Tensor:
    mask: Tensor = keep_mask(
        shape,
        p,
        as_key(key),
        xp=torch,
        device=device,
        broadcast_axes=broadcast_axes,
        global_shape=global_shape,
        start=_starts(start),
    )
    return mask


def _starts(start: Tensor | None) -> Sequence[Any] | None:
    """Return where a window begins: integers, where those are read without waiting."""
    if start is None:
        return None
    starts: Sequence[Any] = start.tolist() if start.device.type == "cpu" else start.unbind()
    return starts


@_disable_dynamo
def _integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@_disable_dynamo
def _stack_integers(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.to(torch.int64) for value in values])


@_disable_dynamo
def _pack_key(lo: Tensor, hi: Tensor) -> Tensor:
    """Return words of the low 32 bits; of a batch of keys, along a last axis."""
    return torch.stack([_low_bits(lo), _low_bits(hi).to(lo.device)], -1)


def _low_bits(word: Tensor) -> Tensor:
    """Return the low 32 bits of integers, which are extended by zeros from their width."""
    bits = integer_bits(word.dtype)
    assert bits is not None  # as `Library.width` has seen to
    return word.to(torch.int64) & MASK32 & ((1 << bits) - 1)


@_disable_dynamo
def _fold_in(key: Tensor, data: Tensor) -> Tensor:
    bits = integer_bits(data.dtype)
    assert bits is not None  # as `Library.width` has seen to
    # Extended by zeros from its width, as words are: also a negative one, and one of uint64.
    return key_tensor(as_key(key).fold_in(int(data.item()) & ((1 << bits) - 1)))


@_disable_dynamo
def _next_call(calls: Tensor) -> Tensor:
    with COUNTING:
        number = next_call_number(calls, current_log())
    if isinstance(number, Tensor):
        return number.clone()
    return torch.tensor(number, dtype=torch.int64)


@_disable_dynamo
def _draw_key(order: Tensor) -> Tensor:
    return draw_words().clone()


class _Dropout(torch.autograd.function._SingleLevelFunction):
    """The gradient of the operator: itself, of the upstream gradient, under the same key.

    Of one level of `torch.func`, of which it is applied to each by PyTorch's dispatcher.
    """

    @staticmethod
    def forward(ctx: Any, keyset: Any, x: Tensor, key: Tensor, *rest: Any) -> Tensor:
        p, axes, whole, start, random = _with_defaults(*rest)
        ctx.save_for_backward(key, start, random)
        ctx.save_for_forward(key, start, random)
        ctx.given = p, axes, whole
        operator = torch.ops.unidrop.dropout.default
        if not torch._C._are_functorch_transforms_active():
            return _below_autograd(operator, keyset, x, key, *rest)
        # The levels below differentiate too.
        with torch.enable_grad(), _set_fwd_grad_enabled(True):
            return _below_autograd(operator, keyset, x, key, *rest)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, _Dropout.again(ctx, upstream), *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        # A product by a diagonal matrix is its own transpose.
        return _Dropout.again(ctx, tangents[1])

    @staticmethod
    def again(ctx: Any, x: Tensor) -> Tensor:
        key, start, random = ctx.saved_tensors
        output: Tensor = torch.ops.unidrop.dropout(x, key, *ctx.given, start, random)
        return output


def _with_defaults(
    p: float,
    axes: Sequence[int],
    whole: Sequence[int] | None = None,
    start: Tensor | None = None,
    random: Tensor | None = None,
) -> tuple[Any, ...]:
    """Return an operator's arguments with those that the dispatcher left out."""
    return p, axes, whole, start, random


def _below_autograd(operator: Any, keyset: Any, *arguments: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        output: Tensor = operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
    return output


def _differentiated(keyset: Any, x: Tensor, *rest: Any) -> Tensor:
    if not (torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled()):
        return _below_autograd(torch.ops.unidrop.dropout.default, keyset, x, *rest)
    with enable_single_level_autograd_function():
        output: Tensor = _Dropout.apply(keyset, x, *rest)  # type: ignore[attr-defined] # made in C
    return output


def _vmapped(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    key: Tensor,
    p: float,
    axes: Sequence[int],
    whole: Sequence[int] | None = None,
    start: Tensor | None = None,
    random: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Drop from a batch: see `torch_func`."""
    dims = dict(zip(("x", "key", "p", "axes", "whole", "start", "random"), in_dims, strict=False))
    count = info.batch_size
    x = x.expand(count, *x.shape) if dims["x"] is None else x.movedim(dims["x"], 0)
    if dims["key"] is not None or dims.get("start") is not None:
        keys, starts = (
            [tensor] * count
            if tensor is None or dims.get(name) is None
            else tensor.movedim(dims[name], 0).unbind()
            for name, tensor in (("key", key), ("start", start))
        )
        each = [
            torch.ops.unidrop.dropout(x_i, key_i, p, axes, whole, start_i, random)
            for x_i, key_i, start_i in zip(x.unbind(), keys, starts, strict=True)
        ]
        return torch.stack(each), 0
    is_shared = dims.get("random") is None
    axes = [*([0] if is_shared else []), *(axis + 1 for axis in axes)]
    if whole is not None and start is not None:
        whole, start = [count, *whole], torch.cat([start.new_zeros(1), start])
    if random is not None and not is_shared:
        random = random.select(dims["random"], 0)
    return torch.ops.unidrop.dropout(x, key, p, axes, whole, start, random), 0


def _saved_by_compilers(name: str) -> Any:
    """Return the autograd kernel of an operator that no compiler is to compute again."""

    def kernel(keyset: Any, state: Tensor) -> Tensor:
        operator = getattr(torch.ops.unidrop, name).default
        traced: Any = _dispatch_mode(_DispatchMode.PROXY)
        before = 0 if traced is None else len(traced.tracer.graph.nodes)
        output = _below_autograd(operator, keyset, state)
        if traced is not None:
            # Activation checkpointing has just marked these to be recomputed.
            for node in list(traced.tracer.graph.nodes)[before:]:
                node.meta.pop("recompute", None)
        return output

    return kernel


def _next_calls(info: Any, in_dims: tuple[int], calls: Tensor) -> tuple[Tensor, int]:
    """Advance a batch of call numbers, as of models that `torch.func.stack_module_state` stacks."""
    return torch.ops.unidrop.next_call(calls), in_dims[0]


def _pack_each_key(
    info: Any, in_dims: tuple[int | None, int | None], lo: Tensor, hi: Tensor
) -> tuple[Tensor, int]:
    """Join a batch of keys, whose words have no axes but that of the batch."""
    lo, hi = (
        word.expand(info.batch_size, *word.shape) if dim is None else word.movedim(dim, 0)
        for word, dim in zip((lo, hi), in_dims, strict=True)
    )
    return torch.ops.unidrop.pack_key(lo, hi), 0


def _fold_in_each(
    info: Any, in_dims: tuple[int | None, int | None], key: Tensor, data: Tensor
) -> tuple[Tensor, int]:
    keys, numbers = (
        [tensor] * info.batch_size if dim is None else tensor.movedim(dim, 0).unbind()
        for tensor, dim in zip((key, data), in_dims, strict=True)
    )
    folded = [torch.ops.unidrop.fold_in(k, n) for k, n in zip(keys, numbers, strict=True)]
    return torch.stack(folded), 0


_EAGER = {
    "dropout": _dropout,
    "keep_mask": _keep_mask,
    "integers": _integers,
    "stack_integers": _stack_integers,
    "pack_key": _pack_key,
    "fold_in": _fold_in,
    "next_call": _next_call,
    "draw_key": _draw_key,
}
_FAKE: dict[str, Callable[..., Tensor]] = {
    "dropout": lambda x, *_, **random: torch.empty_like(x),
    "keep_mask": lambda key, p, shape, *_, device: torch.empty(
        shape, dtype=torch.bool, device=device
    ),
    "integers": lambda values: torch.empty((len(values),), dtype=torch.int64, device="cpu"),
    "stack_integers": lambda values: values[0].new_empty((len(values),), dtype=torch.int64),
    "pack_key": lambda lo, hi: lo.new_empty((*lo.shape, 2), dtype=torch.int64),
    "fold_in": lambda key, data: torch.empty_like(key),
    "next_call": torch.empty_like,
    "draw_key": lambda order: torch.empty((2,), dtype=torch.int64, device="cpu"),
}
for _name, _function in _EAGER.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")
for _name, _fake in _FAKE.items():
    torch.library.register_fake(f"unidrop::{_name}", _fake, lib=_library)
for _name in ("next_call", "draw_key"):
    _library.impl(_name, _saved_by_compilers(_name), "Autograd", with_keyset=True)
_library.impl("dropout", _differentiated, "Autograd", with_keyset=True)
torch.library.register_vmap("unidrop::dropout", _vmapped, lib=_library)
torch.library.register_vmap("unidrop::next_call", _next_calls, lib=_library)
torch.library.register_vmap("unidrop::pack_key", _pack_each_key, lib=_library)
torch.library.register_vmap("unidrop::fold_in", _fold_in_each, lib=_library)
