"""Dropout under the transformations of `torch.func`: grad, vjp, jvp, vmap and what is made of them.

A batch of `torch.vmap` is an axis more. What the mask does along it is what ``randomness=`` says:

* ``"different"``: the axis is the first of the mask, so that the examples are the windows of one
  mask of the whole batch, and have other elements dropped each.
* ``"same"``: the mask has length 1 along the axis, and is that of one example.
* ``"error"``: PyTorch raises what it raises of every random function.

An example whose key is its own, as of a batch of call numbers, has the mask of its key whatever
``randomness=`` says, since then nothing is left to it.
"""

from typing import Any

import torch
from torch import Tensor

from unidrop.adapters.libraries.torch_operators import key_of
from unidrop.dropout import Call
from unidrop.rate import Rate
from unidrop.window import Window

__all__ = ["transformed"]


def transformed(x: Tensor, words: Tensor, p: float, window: Window) -> Tensor:
    """Return the output of a call that `torch.func` transforms.

    Parameters
    ----------
    x : torch.Tensor
    words : torch.Tensor
        The key, as `torch_operators.packed` makes it.
    p : float
    window : Window

    Raises
    ------
    RuntimeError
        If `torch.vmap` vectorises the call, and its ``randomness`` is "error".
    """
    # Of no elements, so that nothing is drawn; vmap treats it as it treats what is random.
    random = words if _is_batched(words) else torch.rand(0)
    output: Tensor = _Dropout.apply(x, words, random, p, window)
    return output


def _is_batched(words: Tensor) -> bool:
    """Tell whether each example of a batch has a key of its own."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(words):
        if functorch.is_batchedtensor(words):
            return True
        words = functorch.get_unwrapped(words)
    return False


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, words: Tensor, random: Tensor, p: float, window: Window) -> Tensor:
        call = _call(x, p, window)
        output: Tensor = call.drop(x, key_of(words))
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, words, random, ctx.p, ctx.window = inputs
        ctx.save_for_backward(words, random)
        ctx.save_for_forward(words, random)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return _Dropout.apply(upstream[0], *ctx.saved_tensors, ctx.p, ctx.window), *(None,) * 4

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        # A product by a diagonal matrix is its own transpose.
        return _Dropout.apply(tangents[0], *ctx.saved_tensors, ctx.p, ctx.window)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        words: Tensor,
        random: Tensor,
        p: float,
        window: Window,
    ) -> tuple[Tensor, int]:
        x_dim, words_dim, random_dim = in_dims[:3]
        x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
        if words_dim is not None:
            keys = words.movedim(words_dim, 0)
            pairs = zip(x.unbind(), keys.unbind(), strict=True)
            return torch.stack([transformed(x_i, key, p, window) for x_i, key in pairs]), 0
        if random_dim is not None:
            random = random.select(random_dim, 0)
        wider = _with_batch(window, x.shape, shared=random_dim is None)
        return _Dropout.apply(x, words, random, p, wider), 0


def _with_batch(window: Window, shape: torch.Size, *, shared: bool) -> Window:
    """Return a window with an axis more in front, along which the mask has length 1 if shared."""
    axes = tuple(axis + 1 for axis in window.broadcast_axes)
    if shared:
        axes = (0, *axes)
    if window.global_shape is None or window.start is None:
        return Window.of(shape, axes)
    return Window.of(shape, axes, (shape[0], *window.global_shape), (0, *window.start))


def _call(x: Tensor, p: float, window: Window) -> Call:
    axes, whole, start = window.broadcast_axes, window.global_shape, window.start
    return Call.of(x, Rate.of(p), broadcast_axes=axes, global_shape=whole, start=start)
