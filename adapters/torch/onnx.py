"""Export to ONNX: the trace contains plain operators, and call numbers that the model sets.

PyTorch documentation: torch.onnx.export, torch.onnx.is_in_onnx_export.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from unidrop.adapters.torch.state import get_number, set_number
from unidrop.key import Key
from unidrop.mask import portable_mask
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

try:
    from torch.onnx._internal.exporter import _flags
except ImportError:  # a version that does not mark its exports
    _flags = None  # type: ignore[assignment] # to mypy it is always a module

_DispatchMode = torch._C._TorchDispatchModeKey

__all__ = ["TensorRate", "is_exporting", "mark_as_set", "run_exported", "take_number"]


def is_exporting() -> bool:
    """Return whether `torch.onnx.export` traces in this thread."""
    if torch.compiler.is_dynamo_compiling():
        # Dynamo takes torch.onnx.is_in_onnx_export() for False. Other graphs need no guard.
        return _flags is not None and torch.compiler.is_exporting() and _flags._is_onnx_exporting
    # PyTorch marks the whole process, but another thread has no mode that traces.
    return torch.onnx.is_in_onnx_export() and any(
        torch._C._get_dispatch_mode(mode) is not None
        for mode in (_DispatchMode.PROXY, _DispatchMode.FAKE)
    )


class TensorRate(Rate):
    """A rate with its scale as a tensor: the exporter rounds a Python float to float32."""

    def scale_in(self, dtype: str) -> Any:
        """Return the scale as a tensor."""
        return torch.tensor(self.scale, dtype=getattr(torch, dtype))


def run_exported(plan: DropoutPlan, x: Tensor, key: Key, mask: Tensor | None) -> Any:
    """Return dropout by the operators that the core's own arithmetic consists of.

    Raises
    ------
    RuntimeError
        Under `torch.func`, whose ``randomness`` these operators do not follow.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.onnx.export cannot export dropout under torch.func, such as vmap: call dropout "
            "on the whole batch"
        )
    if not plan.has_kernels:
        return plan.run(x, key, mask)
    if not plan.rate.is_scheduled:
        plan = DropoutPlan(plan.library, plan.window, TensorRate(*plan.rate), plan.drops)
    if plan.is_trivial(x):
        return plan.run(x, key, mask)
    if mask is None:
        mask = portable_mask(plan.library, x, key, plan.window, plan.rate, x.device)
    return plan.select(x, mask)


def mark_as_set(calls: Tensor) -> None:
    """Record in the tensor of a call number, which is new in each trace, that a model set it."""
    calls._unidrop_is_set = True  # type: ignore[attr-defined] # a tensor accepts any attribute


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
