"""Arrays of each framework that the core takes: how NumPy's get there and back."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tensorflow as tf
import torch

__all__ = ["LIBRARIES", "ArrayLibrary", "from_torch", "to_torch"]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class ArrayLibrary:
    """A library under test."""

    xp: Any
    array: Callable[[Any], Any]
    numpy: Callable[[Any], np.ndarray]
    devices: tuple[Any, ...]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    integer: str = "int64"  # the widest that it has
    flushes: bool = False  # treats subnormals as zeros

    def scalar(self, value: int, dtype: str | None = None) -> Any:
        """Return a 0-d integer array, of the widest dtype unless told."""
        return self.array(np.asarray(value, dtype or self.integer))


def to_torch(x: Any) -> torch.Tensor:
    """Return a tensor of the same memory layout; PyTorch takes no bfloat16 from NumPy."""
    x = np.array(x, order="K")
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(x)


def from_torch(x: torch.Tensor) -> np.ndarray:
    """Return the values of a tensor."""
    x = x.detach()
    return x.view(torch.int16).numpy().view(BFLOAT16) if x.dtype == torch.bfloat16 else x.numpy()


def _jax(x64: bool) -> ArrayLibrary:
    return ArrayLibrary(
        jnp,
        jnp.asarray,
        np.asarray,
        (jax.devices()[0],),
        lambda: jax.enable_x64(x64),
        "int64" if x64 else "int32",
        flushes=True,
    )


LIBRARIES = {
    "torch": ArrayLibrary(torch, to_torch, from_torch, ("cpu", torch.device("cpu"))),
    "tensorflow": ArrayLibrary(tf, tf.constant, lambda y: y.numpy(), ("/CPU:0",), flushes=True),
    "jax": _jax(x64=False),
    "jax-x64": _jax(x64=True),
}
