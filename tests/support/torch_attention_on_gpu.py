"""Cases for attention of PyTorch by the kernels of a GPU, in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so a test runs this file as a program.
"""

import sys

import torch

from unidrop import Key, force_path, keep_mask
from unidrop.adapters.torch import flash, scaled_dot_product_attention
from unidrop.adapters.torch.buffers import BUFFERS

RESULTS = "output", "lse", "query", "key", "value", "mask"
BOTH = ["attend", "differentiate"]

launched = []


def count(name):
    """Record the calls of a function that launches kernels."""
    function = getattr(flash, name)

    def counting(*arguments):
        results = function(*arguments)
        launched.extend([name] if results is not None else [])
        return results

    setattr(flash, name, counting)


def run(arrays, mask, options):
    """Return both results of attention, and the gradients of the arrays and the mask."""
    arrays = [x.detach().clone().requires_grad_() for x in arrays]
    if mask is not None and mask.requires_grad:
        mask = mask.detach().clone().requires_grad_()
    options = {"dropout_p": 0.3, "dropout_key": Key(3)} | options
    output, lse = scaled_dot_product_attention(*arrays, mask, return_lse=True, **options)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    ((output * weights).sum() + lse.clamp_min(-9).cos().sum()).backward()
    return output, lse, *(x.grad for x in arrays), None if mask is None else mask.grad


def check(query, key, value, mask=None, launches=BOTH, tolerance=1e-6, **options):
    """Compare the kernels with the tiles of PyTorch's operations, and the launches with a list."""
    launched.clear()
    results = run((query, key, value), mask, options)
    assert launched == launches
    with force_path("portable"):
        expected = run((query, key, value), mask, options)
    assert launched == launches
    for name, x, y in zip(RESULTS, results, expected, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert (x.dtype, x.shape) == (y.dtype, y.shape), name
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=name)


def check_layouts(q, k, v):
    """Compare tensors of any rank and strides."""
    check(q, k, v)
    check(q[0], k[0], v[0, ..., :8], is_causal=True)
    check(q[0, 0], k[0, 0], v[0, 0])
    check(q, k[:, :1], v[:, :1], enable_gqa=True)
    check(*(x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)))
    check(*(x.half() for x in (q, k, v)), tolerance=5e-3)


def check_masks(q, k, v):
    """Compare masks of pairs; the kernels have no gradient of a mask."""
    check(q, k, v, torch.rand(2, 1, 1, 27) > 0.3)
    check(q, k, v, torch.randn(27, 9).T)
    check(q, k, v, torch.full((9, 1), -1e9), tolerance=1e-5)
    check(q, k, v, torch.randn(9, 27, requires_grad=True), launches=["attend"])


def check_windows(q, k, v):
    """Compare windows, and starts that a GPU holds: no number is read."""
    whole = (4, 2, 20, 61)
    check(q, k, v, global_shape=whole, start=(1, 0, 3, 5))
    check(q, k, v, global_shape=whole, start=(1, 0, 3, 5), dropout_p=0.0, is_causal=True)
    on_device = (torch.tensor(1), 0, torch.tensor(3, dtype=torch.uint8), torch.tensor(5))
    key = Key.from_words(torch.tensor(7), torch.tensor(2**31 + 5))
    options = {"global_shape": whole, "start": on_device, "is_causal": True, "dropout_key": key}
    item, tolist = torch.Tensor.item, torch.Tensor.tolist
    torch.Tensor.item = torch.Tensor.tolist = None
    results = run((q, k, v), None, options)
    torch.Tensor.item, torch.Tensor.tolist = item, tolist
    check(q, k, v, **options)
    options |= {"start": (1, 0, 3, 5), "dropout_key": Key(7 | (2**31 + 5) << 32)}
    for x, y in zip(results, run((q, k, v), None, options), strict=True):
        assert x is y is None or torch.equal(x, y)


def check_others(q, k, v):
    """Compare calls that kernels do not serve."""
    check(*(x.double() for x in (q, k, v)), launches=[])
    check(*(x[None] for x in (q, k, v)), launches=[])
    check(q[:, :, :0], k, v, launches=[])
    check(*(x[..., :1].expand(1, 1, 3, 129) for x in (q[:1, :1, :3],) * 3), launches=[])


def check_mask_bits(q, k):
    """Compare the bits of the mask, read through values that are the identity."""
    identity = torch.eye(27).expand(2, 2, 27, 27)
    weights = scaled_dot_product_attention(q, k, identity, None, 0.3, dropout_key=Key(5))
    assert torch.equal(weights != 0, keep_mask(weights.shape, 0.3, Key(5), xp=torch))


def main():
    """Run all cases."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 16) for n in (9, 27, 27))
    check_layouts(q, k, v)
    check_masks(q, k, v)
    check_windows(q, k, v)
    check_others(q, k, v)
    check_mask_bits(q, k)


if __name__ == "__main__":
    BUFFERS.is_interpreted = True
    for name in BOTH:
        count(name)
    sys.exit(main())
