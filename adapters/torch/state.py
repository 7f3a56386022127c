"""The call number of a seeded module, as a tensor with a check, and in checkpoints.

Requirements this design meets:

* Loaders treat what a state dictionary contains, and what looks like a weight, as theirs: they
  allocate it, share it, cast it or demand it. So the call number is a buffer that is not
  persistent, and a checkpoint contains it as extra state (`torch.nn.Module.get_extra_state`).
* Some loaders write into the tensors of a state dictionary, and never call the module. So the extra
  state is the buffer itself.
* A loader may leave a tensor as uninitialized memory. So a complement follows each call number.
"""

import ctypes
from functools import lru_cache
from struct import Struct
from typing import Any

import torch
from torch import Tensor

__all__ = ["add_calls", "advance", "get_number", "make_calls", "read_saved", "set_number"]

# The memory of a call number and its check.
_NUMBERS, _WORDS = Struct("=2q"), Struct("=2Q")
_MASK64 = (1 << 64) - 1


def make_calls(number: int = 0) -> Tensor:
    """Return the tensor of a call number, on the CPU."""
    return torch.tensor([number, ~number], dtype=torch.int64, device="cpu")


def get_number(calls: Tensor) -> Tensor:
    """Return the call number as a view."""
    return calls[..., 0]


def set_number(calls: Tensor, number: Any) -> None:
    """Write an integer, or a 0-d tensor on the same device, to the tensor of a call number."""
    if isinstance(number, Tensor):
        calls.copy_(torch.stack([number, ~number]))
    else:
        calls.copy_(make_calls(number))


def advance(calls: Tensor) -> int:
    """Return a call number whose tensor is on the CPU, and advance it.

    Raises
    ------
    RuntimeError
        If it does not match its check.
    """
    # After a backward pass, two operations of PyTorch take as long as the rest of a small call.
    is_plain = (
        type(calls) is Tensor
        and calls.dtype is torch.int64
        and calls.shape == (2,)
        and calls.is_contiguous()
    )
    address = calls.data_ptr() if is_plain else 0
    memory = _get_memory(address) if address else None
    number, check = calls.tolist() if memory is None else _NUMBERS.unpack_from(memory)
    if check != ~number or number < 0:
        raise RuntimeError(
            f"the call number of a Dropout is damaged: it is {number}, and its check is {check}, "
            f"not {~number}. A loader left it uninitialized, or wrote to it. Set module.calls"
        )
    if memory is None:
        add_calls(calls, 1)
    else:  # in one step, so that a signal handler interrupts before or after it
        _WORDS.pack_into(memory, 0, number + 1, ~(number + 1) & _MASK64)
    return int(number)


def add_calls(calls: Tensor, count: Any) -> None:
    """Add an integer, or a tensor of one for each number, to call numbers on any device."""
    get_number(calls).add_(count)
    calls[..., 1].sub_(count)


@lru_cache(maxsize=1024)
def _get_memory(address: int) -> Any:
    """Return the memory of a call number; its tensor must be alive while it is used."""
    return (ctypes.c_char * _NUMBERS.size).from_address(address)


def read_saved(saved: Any) -> int:
    """Return the call number of a checkpoint.

    Raises
    ------
    TypeError
        If it is not an int64 tensor of shape (2,).
    ValueError
        If it does not match its check.
    """
    if not isinstance(saved, Tensor) or saved.dtype != torch.int64 or saved.shape != (2,):
        shown = (
            f"{saved.dtype} of shape {tuple(saved.shape)}" if isinstance(saved, Tensor) else saved
        )
        raise TypeError(f"calls must be an int64 tensor of shape (2,) in a checkpoint, got {shown}")
    number, check = saved.tolist()
    if check != ~number or number < 0:
        raise ValueError(
            f"calls is damaged in the checkpoint: it must have n >= 0 and ~n, and has {number} and "
            f"{check}. Remove the key, and set module.calls"
        )
    return int(number)
