"""What the tests of PyTorch's functions and modules share: tensors and what is right."""

import numpy as np
import reference
import torch

from unidrop import Key

__all__ = [
    "COMPLEX",
    "DTYPES",
    "KEY",
    "SITE",
    "expected_patterns",
    "get_mask",
    "get_name",
    "numbers",
    "patterns",
]


KEY = Key(42).fold_in("encoder/0").fold_in(7)


SITE = Key(42).fold_in("encoder/0")


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


COMPLEX = [torch.complex64, torch.complex128]


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def get_name(dtype):
    """Return a dtype's name without its module."""
    return str(dtype).removeprefix("torch.")


def patterns(tensor):
    """Return the bit patterns of a tensor's real components, in logical order."""
    tensor = tensor.detach().contiguous().reshape(-1)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).reshape(-1)
    bits = 8 * tensor.element_size()
    return [pattern % 2**bits for pattern in tensor.view(INTEGERS[bits // 8]).tolist()]


def expected_patterns(x, p, key=KEY, axes=()):
    """Return the output's bit patterns by the specification."""
    keep = np.reshape(
        reference.keep_mask(x.shape, p, int(key), broadcast_axes=axes),
        reference.mask_shape(x.shape, axes),
    )
    decisions = np.broadcast_to(keep, x.shape).reshape(-1).tolist()
    return reference.dropout_bits(patterns(x), get_name(x.dtype), decisions, p)


def numbers(*shape, dtype=torch.float32, requires_grad=False):
    """Return the same ordinary numbers at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(requires_grad)


def get_mask(key, *shape, p=0.5):
    """Return a mask of the specification."""
    return torch.tensor(reference.keep_mask(shape, p, int(key))).reshape(shape) == 1
