"""Run PyTorch on a GPU, and run the kernels of GPUs without one.

Two backends:

* "torch-cuda" is PyTorch on the first GPU, in the modes of the CPU and in CUDA graphs. A machine
  without a GPU skips it.
* "torch-triton" runs the same kernels of Triton on CPU tensors, by Triton's interpreter, which is a
  thousand times slower. Its process has the environment variable ``TRITON_INTERPRET=1``.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from unidrop.adapters.torch.buffers import BUFFERS
from unidrop.conformance import BackendUnavailableError
from unidrop.conformance.backends.torch import Torch
from unidrop.conformance.backends.torch_modes import COMPILED, COMPILED_FOR_CUDA, MODES
from unidrop.dispatch import explain_path

__all__ = ["TorchOnCuda", "TorchOnTriton"]


class TorchOnCuda(Torch):
    """PyTorch on the first GPU."""

    name = "torch-cuda"
    devices = ("cuda",)
    transforms = (*MODES, *COMPILED_FOR_CUDA, "cuda-graph")
    compiled_modes = (*COMPILED, *COMPILED_FOR_CUDA, "export")
    mode_exclusions: Mapping[str, Mapping[str, str]] = {
        **Torch.mode_exclusions,
        "compile-cuda-graph": Torch.mode_exclusions["compile"],
        "cuda-graph": {
            **dict.fromkeys(
                ("bad-rate", "bad-dtype", "layer-error"), "an error would end the capture"
            ),
            "threads": "a stream captures one graph at a time",
        },
    }

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BackendUnavailableError("PyTorch finds no CUDA device")
        super().__init__()


class TorchOnTriton(Torch):
    """Triton's interpreter on CPU tensors."""

    name = "torch-triton"
    transforms = ()
    compiled_modes = ()
    derived_modes: Mapping[str, str] = MappingProxyType({})
    mode_exclusions: Mapping[str, Mapping[str, str]] = {
        "fused": {"threads": "Triton's interpreter has state that threads share"},
    }
    capabilities: Mapping[str, str | None] = {
        **Torch.capabilities,
        "traces": "no mode compiles",
    }

    def __init__(self) -> None:
        BUFFERS.is_interpreted = True
        path = explain_path(torch.ones(1))
        if path.name != "fused":
            raise BackendUnavailableError(path.reason)
        super().__init__()
        self.modes = ("fused",)
        self.missing_modes = {"fused in bfloat16": "Triton's interpreter truncates to bfloat16"}

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return the dtypes that the interpreter rounds to; it truncates to bfloat16."""
        return tuple(dtype for dtype in super().dtypes(mode) if dtype != "bfloat16")
