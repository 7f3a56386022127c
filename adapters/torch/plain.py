"""Plain tensors, whose elements kernels read and write with nothing of PyTorch in between.

A call of a small tensor takes as long as the questions about it. So this file asks them once, and
`run_plain` goes straight to a kernel. `DropoutPlan.run` serves all other tensors.
"""

from typing import Any

import numpy as np
import torch

from unidrop.dispatch import get_kernels
from unidrop.protocols import Buffer, Buffers
from unidrop.rate import KEEP_NOTHING, Rate

__all__ = ["BUFFERS", "PLAIN", "SUPPORTED_DTYPES", "is_tracing", "run_plain"]

PLAIN = (torch.Tensor, torch.nn.Parameter)

# Dynamo traces less if the names of these dtypes are not looked up.
SUPPORTED_DTYPES = frozenset(
    (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    )
)


def is_tracing() -> bool:
    """Return whether PyTorch traces or transforms operations on tensors.

    torch.compile, torch.func and modes that observe each operation, such as torch.export's, do.
    `torch.compiler.is_compiling` is also True while another thread compiles.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


class TorchBuffers(Buffers):
    """Plain CPU tensors."""

    def locate(self, x: torch.Tensor) -> Buffer | str:
        """Return the buffer of a plain CPU tensor."""
        if type(x) not in PLAIN:
            return f"a {type(x).__name__} is not a plain torch.Tensor"
        if not x.is_cpu:
            return f"it is on {x.device}, and kernels are for the CPU"
        if x.layout != torch.strided:
            return f"its layout is {x.layout}"
        if x.is_conj() or x.is_neg():
            return "its conjugation or negation is still lazy"
        if torch._C._are_functorch_transforms_active():
            return "torch.func transforms it"
        if torch.autograd.forward_ad._current_level >= 0:
            return "forward-mode differentiation observes it"
        if torch._C._len_torch_dispatch_stack():
            return "a TorchDispatchMode observes each operation"
        if torch._C._get_tracing_state() is not None:
            return "torch.jit.trace records it"
        try:
            address = x.data_ptr()
            if address == 0 and x._is_zerotensor():
                return "it is a zero tensor without memory"
            return Buffer(address, x.stride())
        except RuntimeError as error:  # a batch of gradients is a plain Tensor too
            return str(error)

    def allocate_like(self, x: torch.Tensor) -> tuple[torch.Tensor, Buffer]:
        """Return an empty tensor."""
        y = torch.empty_like(x)
        return y, Buffer(y.data_ptr(), y.stride())

    def copy_into(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Copy the elements of x into out."""
        out.copy_(x)

    def from_numpy(self, mask: np.ndarray[Any, Any], device: Any) -> torch.Tensor:
        """Return a tensor that shares the memory of the mask."""
        return torch.from_numpy(mask)


BUFFERS = TorchBuffers()


def run_plain(x: torch.Tensor, rate: Rate, words: Any) -> torch.Tensor | None:
    """Return dropout of a whole tensor under the words of a key, or None if it is not plain.

    A plain tensor has a buffer and C order, and the words are integers. The caller has checked the
    dtype.
    """
    if type(words) is not tuple or not type(words[0]) is type(words[1]) is int:
        return None
    buffer = BUFFERS.locate(x)
    if isinstance(buffer, str) or rate.threshold == KEEP_NOTHING or not x.is_contiguous():
        return None
    package = get_kernels()
    if package is None or buffer.address == 0:  # it is empty
        return None
    kernel = package.prepare(x.dtype, (x.numel(),), None, (1,))
    y = torch.empty_like(x)
    address = y.data_ptr()
    if kernel.is_shared:
        package.advise_huge_pages(address, kernel.size)
    kernel.run(buffer.address, address, rate, words[1] << 32 | words[0], 0, (x, y))
    return y
