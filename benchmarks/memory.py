"""The memory of one call, measured in a separate process.

    python -m benchmarks.memory torch F.dropout 16777216
    python -m benchmarks.memory compiled F.dropout 16777216
    python -m benchmarks.memory attention unidrop 1 4 3072 64

prints JSON, in bytes per element, or in bytes per attention weight:

* ``peak``: the maximum growth of the process during both calls. It includes the output and the
  gradient, but not the input and the upstream gradient. This is VmHWM of Linux, reset before.
* ``retained``: the growth of the process after the forward call, minus the output. This is the
  memory for the backward call, wherever it is. It is VmRSS of Linux.
* ``saved``: the size of the tensors that autograd saves for the backward call, from its hooks. It
  includes small tensors, which do not change the size of the process.

A small call runs first, so that the measured call neither compiles nor starts anything.
"""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fixtures import KEEP, SCALE, P, key, uniform

__all__ = [
    "ATTENTION",
    "NUMPY",
    "OWN_ATTENTION",
    "TORCH",
    "measure_attention",
    "measure_compiled",
    "measure_numpy",
    "measure_torch",
]

NUMPY = ("unidrop", "multiply", "naive")
TORCH = ("unidrop", "unidrop module", "multiply", "F.dropout")
OWN_ATTENTION = "F.scaled_dot_product_attention"
ATTENTION = ("unidrop", OWN_ATTENTION)

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_WARM = 1 << 17


def measure_numpy(candidate: str, elements: int) -> dict[str, float]:
    """Return the peak of a forward call."""
    from unidrop.adapters.numpy import dropout

    def call(x: Any) -> Any:
        if candidate == "unidrop":
            return dropout(x, P, key=key(0))
        if candidate == "multiply":
            return x * np.float32(SCALE)
        return x * (np.random.rand(*x.shape) < KEEP) / KEEP

    call(uniform((_WARM,)))
    x = uniform((elements,))
    before = _reset()
    y = call(x)
    return {"peak": (_bytes("VmHWM") - before) / y.size}


def measure_compiled(candidate: str, elements: int) -> dict[str, float]:
    """Return the results of `measure_torch` for a candidate under torch.compile."""
    import torch

    return measure_torch(candidate, elements, torch.compile(fullgraph=True, dynamic=True))


def measure_torch(
    candidate: str, elements: int, transform: Callable[[Any], Any] = lambda function: function
) -> dict[str, float]:
    """Return the peak of both calls, and the memory between them."""
    import torch
    from torch.nn import functional

    from unidrop.adapters.torch import Dropout, dropout

    first = key(0)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "unidrop": lambda x: dropout(x, P, key=first),
        "unidrop module": Dropout(P, seed=42),
        "multiply": lambda x: x * SCALE,
        "F.dropout": lambda x: functional.dropout(x, P),
    }
    call = transform(functions[candidate])
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    def arrays(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(uniform((count,))).requires_grad_(), torch.ones(count)

    x, gradient = arrays(_WARM)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = call(x)
    y.backward(gradient)
    saved = sum(sizes) / _WARM

    x, gradient = arrays(elements)
    before = _reset()
    y = call(x)
    retained = _bytes("VmRSS") - before - y.nbytes
    y.backward(gradient)
    peak = _bytes("VmHWM") - before
    return {"peak": peak / elements, "retained": retained / elements, "saved": saved}


def measure_attention(candidate: str, *shape: int) -> dict[str, float]:
    """Return the peak of both calls of attention, for each weight of queries and keys."""
    import torch
    from torch.nn import functional

    from unidrop.adapters.torch import scaled_dot_product_attention

    def call(*arrays: torch.Tensor) -> torch.Tensor:
        if candidate == "unidrop":
            return scaled_dot_product_attention(*arrays, dropout_p=P, dropout_key=key(0))
        return functional.scaled_dot_product_attention(*arrays, dropout_p=P)

    def arrays(*shape: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        return [torch.randn(shape).requires_grad_() for _ in range(3)], torch.ones(shape)

    inputs, gradient = arrays(1, 2, 64, 16)
    torch.autograd.grad(call(*inputs), inputs, gradient)

    inputs, gradient = arrays(*shape)
    before = _reset()
    gradients = torch.autograd.grad(call(*inputs), inputs, gradient)
    peak = _bytes("VmHWM") - before
    batch, heads, length, _ = shape
    del gradients
    return {"peak": peak / (batch * heads * length**2)}


def _reset() -> int:
    """Reset the recorded peak to the present size, and return this size."""
    gc.collect()
    _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    return _bytes("VmRSS")


def _bytes(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    library, which, *sizes = sys.argv[1:]
    measures: dict[str, Callable[..., dict[str, float]]] = {
        "attention": measure_attention,
        "numpy": measure_numpy,
        "torch": measure_torch,
        "compiled": measure_compiled,
    }
    print(json.dumps(measures[library](which, *map(int, sizes))))
