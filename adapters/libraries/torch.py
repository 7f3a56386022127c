"""PyTorch below the adapters: its gradient and its devices, over the standard's namespace."""

from collections.abc import Callable
from typing import Any

import torch

from unidrop.library import Library

__all__ = ["Torch"]


class Torch(Library):
    """PyTorch tensors."""

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
            return _Linear.apply(x, forward, transpose)
        return forward(x)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: torch.Tensor, forward: Callable[[Any], Any], transpose: Callable[[Any], Any]
    ) -> Any:
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.transpose = inputs[2]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        # A product by a diagonal matrix is its own transpose.
        return ctx.transpose(tangents[0])

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return ctx.transpose(upstream[0]), None, None
