"""PyTorch below the adapters: its gradient, its devices and where a tensor lies in memory."""

from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat.torch
import numpy as np
import torch

from unidrop.dropout import Call
from unidrop.key import Key
from unidrop.library import Library, Memory
from unidrop.rate import Rate
from unidrop.window import Window

__all__ = ["Torch"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Torch(Library):
    """PyTorch tensors."""

    def namespace(self, x: torch.Tensor) -> Any:
        """Return the standard's namespace, past a cache that torch.compile warns of."""
        return array_api_compat.torch

    def device(self, x: torch.Tensor) -> torch.device:
        """Return the tensor's device."""
        return x.device

    def is_traced(self, x: torch.Tensor) -> bool:
        """Tell whether torch.compile or torch.export is recording."""
        return torch.compiler.is_compiling()

    def laid_out_like(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return y with the strides that `torch.empty_like` gives for x."""
        like = torch.empty_like(x)
        return y if y.stride() == like.stride() else like.copy_(y)

    def linear(
        self,
        x: torch.Tensor,
        forward: Callable[[Any], Any],
        transpose: Callable[[Any], Any],
    ) -> Any:
        """Return ``forward(x)``, whose backward pass calls ``transpose`` and saves no tensor."""
        if torch.is_grad_enabled() and x.requires_grad:
            transformed = torch._C._are_functorch_transforms_active()
            function = _TransformableLinear if transformed else _Linear
            return function.apply(x, forward, transpose)
        return forward(x)

    def recorded(self, x: torch.Tensor, p: float, key: Key, window: Window) -> torch.Tensor | None:
        """Return the output of the operator ``unidrop::dropout``, which keeps no mask."""
        if window.is_part:
            return None
        words = key.words
        packed = torch.stack(words) if key.is_traced else torch.tensor(words, dtype=torch.int64)
        output: torch.Tensor = torch.ops.unidrop.dropout(x, packed, p, window.broadcast_axes)
        return output

    def memory(self, x: torch.Tensor) -> Memory | str:
        """Return where a plain tensor of the CPU lies."""
        if type(x) not in _PLAIN:
            return f"a {type(x).__name__} is no plain torch.Tensor"
        if x.device.type != "cpu":
            return f"it is on {x.device}, and kernels are for the CPU"
        if x.layout != torch.strided:
            return f"its layout is {x.layout}"
        if x.is_conj() or x.is_neg():
            return "its conjugation or negation is still to be done"
        if x._is_zerotensor():
            return "it is zeros that lie nowhere"
        try:
            return _what_watches() or Memory(x.data_ptr(), x.stride())
        except RuntimeError as error:  # a batch of gradients, which is of no class of its own
            return str(error)

    def output_like(self, x: torch.Tensor) -> tuple[torch.Tensor, Memory]:
        """Return an empty tensor."""
        y = torch.empty_like(x)
        return y, Memory(y.data_ptr(), y.stride())

    def assign(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Write the elements of x to out."""
        out.copy_(x)

    def from_numpy(self, mask: np.ndarray[Any, Any], device: Any) -> torch.Tensor:
        """Return a tensor in the same memory."""
        return torch.from_numpy(mask)


@torch.library.custom_op("unidrop::dropout", mutates_args=())
def _dropout(
    x: torch.Tensor, key: torch.Tensor, p: float, broadcast_axes: Sequence[int]
) -> torch.Tensor:
    """Drop as `unidrop.dropout` does, under a key whose words ``(lo, hi)`` are an int64 tensor."""
    lo, hi = key.tolist() if key.device.type == "cpu" else key.unbind()
    call = Call.of(x, Rate.of(p), broadcast_axes=broadcast_axes)
    output: torch.Tensor = call.drop(x, Key.from_words(lo, hi))
    return output


@_dropout.register_fake
def _(x: torch.Tensor, key: torch.Tensor, p: float, broadcast_axes: Sequence[int]) -> torch.Tensor:
    return torch.empty_like(x)


def _keep_key(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, key, ctx.p, ctx.broadcast_axes = inputs
    ctx.save_for_backward(key)


def _dropout_backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
    (key,) = ctx.saved_tensors
    return torch.ops.unidrop.dropout(upstream, key, ctx.p, ctx.broadcast_axes), None, None, None


_dropout.register_autograd(_dropout_backward, setup_context=_keep_key)


@torch.library.custom_op("unidrop::next_call", mutates_args=("calls",))
def _next_call(calls: torch.Tensor) -> torch.Tensor:
    """Return a call number as it is, and advance it."""
    number = calls.clone()
    calls.add_(1)
    return number


@_next_call.register_fake
def _(calls: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(calls)


def _what_watches() -> str | None:
    """Return what is to see each operation on a tensor, and would miss a kernel's."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms it"
    if torch.autograd.forward_ad._current_level >= 0:
        return "it is differentiated forwards"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is to see each operation"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records it"
    return None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, forward: Callable[[Any], Any], transpose: Callable[[Any], Any]
    ) -> Any:
        ctx.transpose = transpose
        return forward(x)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        # A product by a diagonal matrix is its own transpose.
        return ctx.transpose(tangents[0])

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return ctx.transpose(upstream[0]), None, None


class _TransformableLinear(_Linear):
    """What torch.func takes too, at 50 microseconds more a call."""

    @staticmethod
    def forward(  # type: ignore[override] # the context comes by itself
        x: torch.Tensor, forward: Callable[[Any], Any], transpose: Callable[[Any], Any]
    ) -> Any:
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.transpose = inputs[2]
