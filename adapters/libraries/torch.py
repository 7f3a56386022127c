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
        ctx: Any,
        x: torch.Tensor,
        forward: Callable[[Any], Any],
        transpose: Callable[[Any], Any],
    ) -> Any:
        ctx.transpose = transpose
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return ctx.transpose(upstream[0]), None, None
