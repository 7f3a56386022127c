"""Dropout with the masks of unidrop in your own Triton kernel: y = residual + dropout(x).

Start from this file: it needs Triton alone. One Philox block decides eight neighbors in the mask,
so a thread generates a block for eight elements. check.py compares it with golden vectors.
"""

import triton
import triton.language as tl


@triton.jit
def philox(lo, hi, tag: tl.constexpr, k0, k1):
    """Return the words of counter (lo, hi, 0, tag) under a key; tag 0 is for masks."""
    c0, c1 = lo, hi
    c2 = tl.zeros_like(lo)
    c3 = c2 + tag
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def get_keep(block, k0, k1, threshold, BLOCKS: tl.constexpr):  # noqa: N803 - Triton's style
    """Return the decisions of blocks, uint64 numbers of shape [BLOCKS], in order: [BLOCKS, 8]."""
    w0, w1, w2, w3 = philox(block.to(tl.uint32), (block >> 32).to(tl.uint32), 0, k0, k1)
    even = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    odd = (even.to(tl.uint64) * 0x6C078965).to(tl.uint32)
    return tl.reshape(tl.join(even, odd), [BLOCKS, 8]) >= threshold


@triton.jit(do_not_specialize=["k0", "k1", "threshold"])
def kernel(
    x_ptr, residual_ptr, y_ptr, size,
    k0: tl.uint32, k1: tl.uint32, threshold: tl.uint32, scale: tl.float32,
    BLOCKS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Process contiguous arrays, eight elements for each of BLOCKS blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    k0, k1, threshold = k0.to(tl.uint32), k1.to(tl.uint32), threshold.to(tl.uint32)
    keep = get_keep(block.to(tl.uint64), k0, k1, threshold, BLOCKS)
    at = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = at < size
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    # Select before the product: a dropped NaN becomes 0, and LLVM keeps pairs of 16 bits packed.
    y = tl.where(keep, x, 0.0) * scale + tl.load(residual_ptr + at, mask=inside).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def dropout_add(x, residual, y, p, key):
    """Write residual + dropout(x) to y; key is the pair of words ``unidrop.Key.words``.

    p must be in [0, 1]. All arrays must have one shape, and be contiguous: the kernel numbers
    elements by their place in memory.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    for name, array in (("x", x), ("residual", residual), ("y", y)):
        if array.shape != x.shape:
            raise ValueError(f"{name} must have shape {tuple(x.shape)}, got {tuple(array.shape)}")
        if not array.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {array.stride()}")
    threshold = round(p * 2**32)
    if threshold == 2**32:  # nothing is kept
        y.copy_(residual + 0.0)
        return
    blocks = 256
    grid = (triton.cdiv(x.numel(), 8 * blocks),)
    kernel[grid](x, residual, y, x.numel(), *key, threshold, 1 / (1 - p), BLOCKS=blocks)
