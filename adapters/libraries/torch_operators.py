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
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from unidrop.adapters.libraries.torch_checkpoint import Draws, draws_here
from unidrop.dropout import Call
from unidrop.key import Key
from unidrop.mask import keep_mask
from unidrop.rate import Rate

__all__ = [
    "draw_words",
    "give_back",
    "key_of",
    "next_number",
    "packed",
    "record_draw",
    "record_key",
]

# Reading a call number and advancing it is one act, also where threads share a module. One lock
# for all, since a module has to be copied and pickled.
_COUNTING = Lock()

# What a drawing of a key says that it writes to, which keeps drawings in order.
_ORDER = torch.zeros((), dtype=torch.int64)

_library = torch.library.Library("unidrop", "DEF")
_library.define(
    "dropout(Tensor x, Tensor key, float p, int[] broadcast_axes, SymInt[]? global_shape=None, "
    "Tensor? start=None) -> Tensor"
)
_library.define(
    "keep_mask(Tensor key, float p, SymInt[] shape, int[] broadcast_axes, "
    "SymInt[]? global_shape=None, Tensor? start=None, *, Device device) -> Tensor"
)
_library.define("integers(SymInt[] values) -> Tensor")
_library.define("stacked(Tensor[] values) -> Tensor")
_library.define("fold_in(Tensor key, Tensor data) -> Tensor")
_library.define("next_call(Tensor(a!) calls) -> Tensor")
_library.define("draw_key(Tensor(a!) order) -> Tensor")


def packed(key: Key) -> Tensor:
    """Return a key as a tensor of its words."""
    return stacked(key.words)


def stacked(numbers: Sequence[Any]) -> Tensor:
    """Return numbers, of which some may be 0-d tensors, as one tensor."""
    if torch.compiler.is_compiling():
        return _record_stacked(numbers)
    device = next((n.device for n in numbers if isinstance(n, Tensor)), None)
    if device is None:
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return torch.stack([torch.as_tensor(n, dtype=torch.int64, device=device) for n in numbers])


def _record_stacked(numbers: Sequence[Any]) -> Tensor:
    """Return what `stacked` does, by operators that no compiler makes a kernel for."""
    ops = torch.ops.unidrop
    tensors = [n for n in numbers if isinstance(n, Tensor)]
    if not tensors:
        integers: Tensor = ops.integers(numbers)
        return integers
    device = tensors[0].device
    joined: Tensor = ops.stacked(
        [n if isinstance(n, Tensor) else ops.integers([n]).to(device).reshape(()) for n in numbers]
    )
    return joined


def key_of(words: Tensor) -> Key:
    """Return the key of a tensor of words: with a value, where that is read without waiting."""
    lo, hi = words.tolist() if words.device.type == "cpu" else words.unbind()
    return Key.from_words(lo, hi)


def next_number(calls: Tensor, draws: Draws | None) -> Any:
    """Return a call number and advance it; what is computed again has that of the first time."""
    if draws is not None and draws.are_again:
        return draws.take()
    with _COUNTING:
        # Read where that waits for nothing.
        number = int(calls) if calls.device.type == "cpu" else calls.clone()
        calls.add_(1)
    if draws is not None:
        draws.keep(number)
    return number


def give_back(calls: Tensor, draws: Draws | None) -> None:
    """Undo what `next_number` did for a call that raised."""
    if draws is None or not draws.are_again:
        with _COUNTING:
            calls.sub_(1)
    if draws is not None:
        draws.undo()


def draw_words() -> Tensor:
    """Draw a key from the default generator, on the CPU, so that no device is waited for.

    What is computed again draws too, as the generator may be in the state of the first time and
    serve others after this; but it has the key of the first time.
    """
    words = torch.randint(1 << 32, (2,), dtype=torch.int64, device="cpu")
    draws = draws_here()
    if draws is None:
        return words
    if draws.are_again:
        return draws.take()  # type: ignore[no-any-return] # what was kept below
    draws.keep(words)
    return words


def record_draw() -> Tensor:
    """Record a `draw_words`, in what is traced."""
    words: Tensor = torch.ops.unidrop.draw_key(_ORDER)
    return words


def record_key(words: Tensor, calls: Tensor) -> Tensor:
    """Record that a call number is taken, and return the words of the key that it is folded into.

    The CPU's is folded by an operator. On another device that would have to wait for the number, so
    there folding is compiled, or done by operations on 0-d tensors.
    """
    number = torch.ops.unidrop.next_call(calls)
    if calls.device.type == "cpu":
        folded: Tensor = torch.ops.unidrop.fold_in(words, number)
        return folded
    lo, hi = words.to(calls.device).unbind()
    return packed(Key.from_words(lo, hi).fold_in(number))


@_disable_dynamo
def _dropout(
    x: Tensor,
    key: Tensor,
    p: float,
    broadcast_axes: Sequence[int],
    global_shape: Sequence[int] | None = None,
    start: Tensor | None = None,
) -> Tensor:
    call = Call.of(
        x,
        Rate.of(p),
        broadcast_axes=broadcast_axes,
        global_shape=global_shape,
        start=_starts(start),
    )
    output: Tensor = call.drop(x, key_of(key))
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
        key_of(key),
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
def _stacked(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.to(torch.int64) for value in values])


@_disable_dynamo
def _fold_in(key: Tensor, data: Tensor) -> Tensor:
    return packed(key_of(key).fold_in(int(data)))


@_disable_dynamo
def _next_call(calls: Tensor) -> Tensor:
    number = next_number(calls, draws_here())
    if isinstance(number, Tensor):
        return number.clone()
    return torch.tensor(number, dtype=torch.int64)


@_disable_dynamo
def _draw_key(order: Tensor) -> Tensor:
    return draw_words().clone()


def _keep_key(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, key, ctx.p, ctx.broadcast_axes, ctx.global_shape, start = inputs
    ctx.save_for_backward(key, start)


def _dropout_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    key, start = ctx.saved_tensors
    gradient = torch.ops.unidrop.dropout(
        upstream, key, ctx.p, ctx.broadcast_axes, ctx.global_shape, start
    )
    return gradient, None, None, None, None, None


def _saved_by_compilers(name: str) -> Any:
    """Return the autograd kernel of an operator that no compiler is to compute again."""

    def kernel(keyset: Any, state: Tensor) -> Tensor:
        operator = getattr(torch.ops.unidrop, name).default
        traced = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
        before = 0 if traced is None else len(traced.tracer.graph.nodes)
        with torch._C._AutoDispatchBelowAutograd():
            output: Tensor = operator.redispatch(keyset & torch._C._after_autograd_keyset, state)
        if traced is not None:
            # Activation checkpointing has just marked these to be recomputed.
            for node in list(traced.tracer.graph.nodes)[before:]:
                node.meta.pop("recompute", None)
        return output

    return kernel


_EAGER = {
    "dropout": _dropout,
    "keep_mask": _keep_mask,
    "integers": _integers,
    "stacked": _stacked,
    "fold_in": _fold_in,
    "next_call": _next_call,
    "draw_key": _draw_key,
}
_FAKE: dict[str, Callable[..., Tensor]] = {
    "dropout": lambda x, *_: torch.empty_like(x),
    "keep_mask": lambda key, p, shape, *_, device: torch.empty(
        shape, dtype=torch.bool, device=device
    ),
    "integers": lambda values: torch.empty((len(values),), dtype=torch.int64, device="cpu"),
    "stacked": lambda values: values[0].new_empty((len(values),), dtype=torch.int64),
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
torch.library.register_autograd(
    "unidrop::dropout", _dropout_backward, setup_context=_keep_key, lib=_library
)
