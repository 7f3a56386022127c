"""Plain tensors, whose elements kernels read and write with nothing of PyTorch in between.

A call of a small tensor takes as long as the questions about it. So this file asks them once, and
`run_plain` goes straight to a kernel of the CPU. `DropoutPlan.run` serves all other tensors.
"""

from typing import Any

import torch

from unidrop.adapters.torch.buffers import BUFFERS
from unidrop.dispatch import get_kernels
from unidrop.rate import KEEP_NOTHING, Rate

__all__ = ["SUPPORTED_DTYPES", "run_plain"]

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
