"""Export to ONNX: the trace contains plain operators, and call numbers that the model sets.

PyTorch documentation: torch.onnx.export, torch.onnx.is_in_onnx_export.
"""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.onnx._internal.exporter import _flags

from unidrop.adapters.torch.state import get_number, set_number
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = ["is_exporting", "mark_as_set", "run_exported", "take_number"]


def is_exporting() -> bool:
    """Return whether `torch.onnx.export` traces."""
    if torch.compiler.is_dynamo_compiling():
        # Dynamo takes torch.onnx.is_in_onnx_export() for False. Other graphs need no guard.
        return torch.compiler.is_exporting() and _flags._is_onnx_exporting
    return torch.onnx.is_in_onnx_export()


class _TensorRate(Rate):
    """A rate with its scale as a tensor: the exporter rounds a Python float to float32."""

    def scale_in(self, dtype: str) -> Any:
        return torch.tensor(super().scale_in(dtype), dtype=getattr(torch, dtype))


def run_exported(plan: DropoutPlan, x: Tensor, key: Key, mask: Tensor | None) -> Any:
    """Return dropout by the operators that the core's own arithmetic consists of."""
    return replace(plan, rate=_TensorRate(*plan.rate)).run(x, key, mask)


def mark_as_set(calls: Tensor) -> None:
    """Record in the tensor of a call number, which is new in each trace, that a model set it."""
    calls._unidrop_is_set = True  # type: ignore[attr-defined]


def take_number(layer: torch.nn.Module, calls: Tensor) -> Tensor:
    """Return the call number of a layer in a trace, and advance it.

    Warns if the model has not set the number. It is a constant then, because a graph of ONNX has no
    state.
    """
    if not getattr(calls, "_unidrop_is_set", False):
        warnings.warn(
            f"a graph of ONNX cannot count calls, so {layer} will drop the same units whenever the "
            "graph runs: in the forward of the exported module, take the step as an input, and set "
            "layer.calls = step",
            stacklevel=2,
        )
    number = get_number(calls).clone()
    set_number(calls, number + 1)
    return number
