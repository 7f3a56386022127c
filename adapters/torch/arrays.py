"""PyTorch below the adapters: its gradient, its devices and where a tensor lies in memory."""

from collections.abc import Callable
from typing import Any

import array_api_compat.torch
import numpy as np
import torch

from unidrop.adapters.torch.func import randomness
from unidrop.adapters.torch.operators import constant, int_tensor, key_tensor
from unidrop.key import Key, string_data
from unidrop.library import Library, Memory
from unidrop.window import Window
from unidrop.words import Int64Words

__all__ = ["Torch", "is_tracing", "record"]

# Of words in int64, which PyTorch has on every device.
_WORDS = Int64Words(array_api_compat.torch)

# What `torch.compiler.assume_constant_result` does; but that takes the compiler's import.
string_data._dynamo_marked_constant = True  # type: ignore[attr-defined] # functions take any

_PLAIN = (torch.Tensor, torch.nn.Parameter)

_BITS = {getattr(torch, f"{sign}int{bits}"): bits for sign in ("", "u") for bits in (8, 16, 32, 64)}

# The most that an operator's integer can be.
_MOST = (1 << 63) - 1


class Torch(Library):
    """PyTorch tensors."""

    def namespace(self, x: torch.Tensor) -> Any:
        """Return the standard's namespace, past a cache that torch.compile warns of."""
        return array_api_compat.torch

    def device(self, x: torch.Tensor) -> torch.device:
        """Return the tensor's device."""
        return x.device

    def arithmetic(self, xp: Any, device: Any) -> Int64Words:
        """Return arithmetic on ``int64``, and don't look for what else there is."""
        return _WORDS

    def is_traced(self, x: torch.Tensor) -> bool:
        """Tell whether something records or transforms what is done with tensors."""
        return is_tracing()

    def match_strides(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
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
            return _Linear.apply(x, forward, transpose)
        return forward(x)

    def recorded(self, x: torch.Tensor, p: float, key: Key, window: Window) -> torch.Tensor:
        """Return the output of one operator, which keeps no mask."""
        return record(x, key_tensor(key.held), p, window)

    def recorded_mask(self, like: torch.Tensor, p: float, key: Key, window: Window) -> torch.Tensor:
        """Return the mask as one operator's output."""
        if torch._C._are_functorch_transforms_active():
            # What vmap makes of a mask, it makes of what is dropped from ones of its shape.
            whole = Window.from_args(
                window.shape, window.broadcast_axes, window.global_shape, window.start
            )
            return (
                record(torch.ones(window.shape, device=like.device), key_tensor(key.held), p, whole)
                != 0
            )
        mask: torch.Tensor = torch.ops.unidrop.keep_mask(
            key_tensor(key.held),
            constant(p),
            window.shape,
            window.broadcast_axes,
            *_part(window),
            device=like.device,
        )
        return mask

    def width(self, value: torch.Tensor, name: str) -> int:
        """Return how many bits a 0-d integer tensor has."""
        bits = _BITS.get(value.dtype)
        # Only what is wrong takes the way that says so, which is longer to trace.
        return super().width(value, name) if bits is None or value.dim() != 0 else bits

    def joined(self, lo: Any, hi: Any) -> torch.Tensor | None:
        """Return two tensors as a key's, where something records them."""
        if not (isinstance(lo, torch.Tensor) and isinstance(hi, torch.Tensor) and is_tracing()):
            return None
        self.width(lo, "lo")
        self.width(hi, "hi")
        joined: torch.Tensor = torch.ops.unidrop.joined(lo, hi)
        return joined

    def folded(self, key: Any, data: torch.Tensor) -> torch.Tensor | None:
        """Return the key of a key and a step as one operator's, where something records them.

        It takes Python's integers some microseconds, and a compiler some seconds. On another device
        it is compiled, since the operator would have to wait for the step.
        """
        if data.device.type != "cpu" or not is_tracing():
            return None
        self.width(data, "data")
        folded: torch.Tensor = torch.ops.unidrop.fold_in(key_tensor(key), data)
        return folded

    def counted(self, state: torch.Tensor) -> torch.Tensor:
        """Return a seed and a call number with one call more."""
        return state + torch.arange(2, dtype=state.dtype, device=state.device)

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

    def allocate_like(self, x: torch.Tensor) -> tuple[torch.Tensor, Memory]:
        """Return an empty tensor."""
        y = torch.empty_like(x)
        return y, Memory(y.data_ptr(), y.stride())

    def assign(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Write the elements of x to out."""
        out.copy_(x)

    def from_numpy(self, mask: np.ndarray[Any, Any], device: Any) -> torch.Tensor:
        """Return a tensor in the same memory."""
        return torch.from_numpy(mask)


def is_tracing() -> bool:
    """Tell whether something records or transforms what is done with tensors.

    That is torch.compile, torch.func, or a mode that sees each operation, as of torch.export. What
    another thread compiles has no part in it, of which `torch.compiler.is_compiling` would tell.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def record(x: torch.Tensor, words: torch.Tensor, p: float, window: Window) -> torch.Tensor:
    """Return the output under the key of a tensor of words, as one operator or one function."""
    output: torch.Tensor = torch.ops.unidrop.dropout(
        x, words, constant(p), window.broadcast_axes, *_part(window), random=randomness(x, words)
    )
    return output


def _part(window: Window) -> tuple[Any, ...]:
    """Return an operator's arguments that say what a window is a part of; none if of nothing."""
    if window.global_shape is None or window.start is None:
        return ()
    if max(window.global_shape, default=0) > _MOST:
        raise ValueError(
            "global_shape has to be below 2**63 where it is recorded as an operator's, "
            f"but got {window.global_shape}"
        )
    return window.global_shape, int_tensor(window.start)


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
