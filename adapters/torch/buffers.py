"""Plain tensors as buffers: where kernels find their elements, on the CPU or on a GPU.

Integers that a GPU computes, such as a call number, stay there. Reading one would wait for all
earlier work of the GPU, and would freeze the number in a CUDA graph.

PyTorch documentation: CUDA semantics; `torch.cuda.graph`.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from unidrop.dtypes import integer_bits
from unidrop.protocols import Buffer, Buffers, DeviceBuffer

__all__ = [
    "BUFFERS",
    "PLAIN",
    "as_int64",
    "is_capturing",
    "is_tracing",
    "must_stay",
    "refuse_capture",
    "to_device",
]

PLAIN = (torch.Tensor, torch.nn.Parameter)

_CUDA = torch.device("cuda")


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
    """Plain tensors on the CPU and on GPUs.

    Attributes
    ----------
    is_interpreted : bool
        Whether Triton's interpreter runs the kernels of GPUs on CPU tensors. The matrix sets it, to
        check them without a GPU.
    """

    is_interpreted = False

    def locate(self, x: torch.Tensor) -> Buffer | str:
        """Return the buffer of a plain CPU tensor."""
        if type(x) not in PLAIN:
            return f"a {type(x).__name__} is not a plain torch.Tensor"
        if not x.is_cpu or self.is_interpreted:
            return f"it is on {x.device}, and kernels are for the CPU and for CUDA"
        obstacle = _find_obstacle(x)
        if obstacle is not None:
            return obstacle
        try:
            address = x.data_ptr()
            if address == 0 and x._is_zerotensor():
                return "it is a zero tensor without memory"
            return Buffer(address, x.stride())
        except RuntimeError as error:  # a batch of gradients is a plain Tensor too
            return str(error)

    def locate_on_device(self, x: torch.Tensor) -> DeviceBuffer | None:
        """Return the buffer of a plain tensor on a GPU."""
        if type(x) not in PLAIN or not (x.is_cuda or self.is_interpreted):
            return None
        if _find_obstacle(x) is not None or x._is_zerotensor():
            return None
        try:
            x.data_ptr()
        except RuntimeError:  # a batch of gradients is a plain Tensor too
            return None
        x = x.detach()
        return DeviceBuffer(torch.view_as_real(x) if x.is_complex() else x, x.stride())

    def gather(self, numbers: Any, x: torch.Tensor) -> torch.Tensor | None:
        """Return integers as a tensor on the GPU of x, or None if reading them waits for no GPU.

        Numbers that a CUDA graph would freeze raise an error, or a warning if the user has written
        them.
        """
        tensors = [numbers] if isinstance(numbers, torch.Tensor) else numbers
        tensors = [number for number in tensors if isinstance(number, torch.Tensor)]
        if is_capturing(x.device):
            _check_captured(numbers, tensors)
        if not any(map(must_stay, tensors)):
            return None
        if isinstance(numbers, torch.Tensor):
            return numbers.to(x.device).contiguous()
        return torch.stack([as_int64(number, x.device) for number in numbers])

    def use_device(self, x: torch.Tensor) -> AbstractContextManager[Any]:
        """Return a context that lets Triton launch on the device of x."""
        return torch.cuda.device(x.device) if x.is_cuda else nullcontext()

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


def must_stay(number: torch.Tensor) -> bool:
    """Return whether reading a tensor would wait for a GPU."""
    return not number.is_cpu or BUFFERS.is_interpreted


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph captures a device, and would replay integers of Python."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device) -> None:
    """Raise RuntimeError if a CUDA graph would replay the mask of a number that the CPU has."""
    if is_capturing(device):
        raise RuntimeError(
            "dropout in a CUDA graph must take its key from the GPU, or each replay would drop the "
            "same elements: move the layer to the GPU after it has a seed, or pass the function "
            "key=Key(seed).fold_in(step) with the step as a CUDA tensor"
        )


def _check_captured(numbers: Any, tensors: list[torch.Tensor]) -> None:
    """Raise RuntimeError for numbers of the CPU, and warn of a key of Python integers."""
    for tensor in tensors:
        if not must_stay(tensor):
            refuse_capture(_CUDA)
    if not tensors and numbers:
        warnings.warn(
            "each replay of this CUDA graph drops the same elements, because the key is a number "
            "of Python: fold in the step as a CUDA tensor, key=Key(seed).fold_in(step)",
            stacklevel=2,
        )


def to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy numbers from the CPU to a device, without waiting for a GPU."""
    if device.type != "cuda":
        return numbers.to(device)
    refuse_capture(device)
    return numbers.pin_memory().to(device, non_blocking=True)


def _find_obstacle(x: torch.Tensor) -> str | None:
    """Return why kernels must not read the memory of a plain tensor, or None."""
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
    return None


def as_int64(number: Any, device: torch.device) -> torch.Tensor:
    """Return an integer as a 0-d tensor on a device, zero-extended from its width."""
    if not isinstance(number, torch.Tensor):
        signed = (number + (1 << 63)) % (1 << 64) - (1 << 63)
        # Unlike a copy from the CPU, a fill waits for nothing.
        return torch.full((), signed, dtype=torch.int64, device=device)
    bits = integer_bits(number.dtype)
    assert bits is not None  # `Words.width` rejects other dtypes
    moved = number.to(device, torch.int64, non_blocking=True)
    return moved if bits == 64 else moved & ((1 << bits) - 1)
