"""List the mistakes that implementers make, as mutations of the stream model and of the product.

Each mutation changes one choice of the specification, docs/spec.md.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidrop.conformance.compare import components, numpy_dtype
from unidrop.conformance.diagnosis.stream_model import StreamModel
from unidrop.dtypes import compute_dtype, dtype_name
from unidrop.key import string_data

__all__ = ["Keep", "Mutations", "mask_mutations", "product_mutations", "scale"]

#: An array that is True for kept elements.
Keep = NDArray[np.bool]

#: Pairs of a description and the fields of the model that the mutation changes.
Mutations = Iterator[tuple[str, dict[str, Any]]]


def mask_mutations(model: StreamModel) -> Mutations:
    """Yield each mutation of a mask: its description and the changed fields of the model."""
    yield from _generator_mutations(model)
    yield from _word_mutations(model)
    yield from _comparison_mutations(model)
    yield from _key_mutations(model)
    yield from _fold_mutations(model)
    yield from _index_mutations(model)


def _generator_mutations(model: StreamModel) -> Mutations:
    for rounds in range(1, 17):
        if rounds != model.rounds:
            what = f"the generator runs {rounds} round{'s' * (rounds > 1)} instead of 10"
            yield what, {"rounds": rounds}
            yield f"{what}, for keys too", {"rounds": rounds, "key_rounds": rounds}
            yield f"{what}, for keys only", {"key_rounds": rounds}
    yield "the key's words are swapped", {"key_words": (1, 0)}
    yield "the block number's words are swapped", {"counter_words": (1, 0, 2, 3)}
    yield "the block number loses its upper word", {"counter_words": (0, 4, 2, 3)}
    yield "the block number is in the counter's upper half", {"counter_words": (2, 3, 0, 1)}
    yield "the block number is one too low", {"first_block": -1}
    yield "the block number is one too high", {"first_block": 1}


def _word_mutations(model: StreamModel) -> Mutations:
    even, odd = model.even, model.odd
    yield "odd elements use the word itself instead of its product with 0x6C078965", {"odd": even}
    yield "odd elements use the upper half of the product with 0x6C078965", {"odd": _upper_product}
    yield "even elements use the product and odd ones the word", {"even": odd, "odd": even}
    yield "each word decides one element instead of two", {"elements_per_word": 1}
    for order in itertools.permutations(range(4)):
        if order == (3, 2, 1, 0):
            yield "the words of a block are in reverse order", {"words": order}
        elif order != model.words:
            yield f"the words of a block are in the order {order}", {"words": order}


def _upper_product(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    upper: NDArray[np.uint64] = words * np.uint64(0x6C078965) >> np.uint64(32)
    return upper


def _comparison_mutations(model: StreamModel) -> Mutations:
    yield "the mask is inverted: 1 means dropped", {"is_inverted": True}
    yield "the comparison is u > T instead of u >= T", {"keep_flags": _keep_greater}
    yield "the comparison is u < 2^32 - T instead of u >= T", {"keep_flags": _keep_small}
    yield "u and T are compared as signed integers", {"keep_flags": _keep_signed}
    yield "u is rounded to float32 before the comparison", {"keep_flags": _keep_float32(model.p)}
    for bits in (8, 16, 23, 24, 31):
        what = f"the threshold has {bits} bits instead of 32"
        yield what, {"keep_flags": _keep_upper_bits(model.p, bits)}
    yield "the threshold is rounded down", {"threshold": lambda p: math.floor(p * 2**32)}
    yield "the threshold is rounded up", {"threshold": lambda p: math.ceil(p * 2**32)}
    yield "p is rounded to float32", {"p": float(np.float32(model.p))}
    yield "p is rounded to float16", {"p": float(np.float16(model.p))}
    yield "p is used as the probability of keeping", {"p": 1 - model.p}


def _key_mutations(model: StreamModel) -> Mutations:
    folded = model.folded
    for i, data in enumerate(folded):
        before, after = folded[:i], folded[i + 1 :]
        what = _describe_data(data)
        yield f"{what} is not folded in", {"folded": (*before, *after)}
        yield f"{what} is folded in twice", {"folded": (*before, data, data, *after)}
        if isinstance(data, str):
            continue
        yield f"{what} is folded in as a string", {"folded": (*before, str(data), *after)}
        for other in sorted({0, data - 2, data - 1, data + 1, data + 2}):
            if 0 <= other < 2**64 and other != data:
                yield (
                    f"the step is {other} instead of {data}",
                    {"folded": (*before, other, *after)},
                )
        yield from _counter_mutations(what, data, {"folded": (*before, *after)})
    for i in range(len(folded) + 1):
        # For example a rank, the number of the first call, or an empty name.
        for extra in (0, 1, ""):
            if extra not in folded[max(0, i - 1) : i + 1]:
                where = f"before {_describe_data(folded[i])}" if i < len(folded) else "at the end"
                longer = (*folded[:i], extra, *folded[i:])
                yield f"{extra!r} is also folded in, {where}", {"folded": longer}
    if len(folded) > 1:
        yield "the site and the step are swapped", {"folded": folded[::-1]}
    if model.seed >= 2**32:
        yield "the seed loses its upper 32 bits", {"seed": model.seed % 2**32}
        yield "the seed loses its lower 32 bits", {"seed": model.seed >> 32}


def _describe_data(data: int | str) -> str:
    return f"the site {data!r}" if isinstance(data, str) else f"the step {data}"


def _counter_mutations(what: str, step: int, unfolded: dict[str, Any]) -> Mutations:
    """Yield the mutations that put a step into the counter instead of folding it into the key."""
    instead = "instead of being folded in"
    yield f"{what} is added to the block number {instead}", {"first_block": step, **unfolded}
    if step < 2**32:
        third, last = {"upper_words": (step, 0)}, {"upper_words": (0, step)}
        yield f"{what} is the counter's third word {instead}", {**third, **unfolded}
        yield f"{what} is the counter's last word {instead}", {**last, **unfolded}


def _fold_mutations(model: StreamModel) -> Mutations:
    if not model.folded:
        return
    yield "the counter of fold_in has no tag", {"fold_counter": (0, 1, 2, 2)}
    yield "the counter of fold_in has its tag in the third word", {"fold_counter": (0, 1, 3, 2)}
    yield "the words of the folded data are swapped", {"fold_counter": (1, 0, 2, 3)}
    yield "the folded data loses its upper 32 bits", {"fold_counter": (0, 2, 2, 3)}
    yield "the words of a folded key are swapped", {"fold_words": (1, 0)}
    yield "a folded key has the generator's words 2 and 3", {"fold_words": (2, 3)}
    yield "a folded key loses its upper 32 bits", {"fold_words": (0, 4)}
    yield "the counter of a mask has tag 1, the tag of integers", {"upper_words": (0, 1)}
    if any(isinstance(data, str) for data in model.folded):
        yield "strings are folded in with tag 1, the tag of integers", {"fold_tags": (1, 1)}
        yield "the digest of a string is read big-endian", {"digest": _big_endian_digest}
        for length in (16, 32, 64):
            what = f"the digest of a string has {length} bytes and is truncated to 8"
            yield what, {"digest": _truncated_digest(length)}
    if any(isinstance(data, int) for data in model.folded):
        yield "integers are folded in with tag 2, the tag of strings", {"fold_tags": (2, 2)}
        for verb, fold in _INTEGER_FOLDS.items():
            what = f"integers are {verb} the key instead of being folded in"
            yield what, {"fold_integer": fold}


_INTEGER_FOLDS: Mapping[str, Callable[[int, int], int]] = {
    "added to": lambda key, data: (key + data) % 2**64,
    "xored with": lambda key, data: key ^ data,
    "added to the upper word of": lambda key, data: (key + (data << 32)) % 2**64,
}


def _big_endian_digest(data: str) -> int:
    return int.from_bytes(string_data(data).to_bytes(8, "little"), "big")


def _truncated_digest(length: int) -> Callable[[str], int]:
    def digest(data: str) -> int:
        longer = hashlib.blake2b(data.encode(), digest_size=length).digest()
        return int.from_bytes(longer[:8], "little")

    return digest


def _index_mutations(model: StreamModel) -> Mutations:
    axes = tuple(range(len(model.shape)))
    if 1 < len(axes) <= 5:
        for order in _axis_orders(axes):
            if order == axes[::-1]:
                yield "elements are numbered in Fortran order", {"order": order}
            elif order != (model.order or axes):
                what = f"elements are numbered in memory order, with axes in the order {order}"
                yield what, {"order": order}
    for multiple in (4, 8):
        yield f"rows are padded to a multiple of {multiple} elements", {"row_multiple": multiple}
    is_whole = model.global_shape is None and not model.broadcast_axes
    for tile in (16, 32, 64, 128):
        if is_whole and len(axes) > 1 and tile < model.shape[-1]:
            what = f"each tile of {tile} elements of a row is numbered like a whole array"
            yield what, {"tile": tile}
    yield "element indices have 32 bits", {"index_bits": 32}
    if model.broadcast_axes:
        yield "the broadcast axes are ignored", {"broadcast_axes": ()}
    if model.global_shape is not None:
        yield "the window's start is ignored", {"start": (0,) * len(axes)}
        yield "the window is ignored", {"global_shape": None, "start": None}


def _axis_orders(axes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield all orders of up to four axes; for five, only those that move one axis.

    Memory formats such as channels-last move one axis. All 120 orders would double the number of
    mutations, and the search tries pairs of them.
    """
    if len(axes) < 5:
        yield from itertools.permutations(axes)
        return
    moved = {axes[::-1]}
    for axis in axes:
        rest = tuple(other for other in axes if other != axis)
        moved |= {(*rest[:i], axis, *rest[i:]) for i in axes}
    yield from sorted(moved)


def _keep_greater(u: NDArray[np.uint64], threshold: int) -> Keep:
    return u > np.uint64(threshold)


def _keep_small(u: NDArray[np.uint64], threshold: int) -> Keep:
    return u < np.uint64(2**32 - threshold)


def _keep_signed(u: NDArray[np.uint64], threshold: int) -> Keep:
    return u.astype(np.uint32).view(np.int32) >= (threshold + 2**31) % 2**32 - 2**31


def _keep_float32(p: float) -> Callable[..., Keep]:
    return lambda u, threshold: u.astype(np.float32) * np.float32(2**-32) >= np.float32(p)


def _keep_upper_bits(p: float, bits: int) -> Callable[..., Keep]:
    return lambda u, threshold: u >> np.uint64(32 - bits) >= np.uint64(round(p * 2**bits))


def product_mutations(x: NDArray[Any], p: float) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield each mutation of the product, for 0 < p < 1: its description and the products of x."""
    compute = numpy_dtype(compute_dtype(x.dtype))
    s = 1 / (1 - p)
    yield "kept elements are not scaled", x
    yield "kept elements are multiplied by 1 - p", scale(x, compute, 1 - p)
    for narrow in ("float16", "bfloat16", "float32"):
        if narrow != compute.name:
            rounded = float(numpy_dtype(narrow).type(s))
            what = f"the scale is rounded to {narrow} before the product"
            yield what, scale(x, compute, rounded)
    narrow_p, one = np.float32(p), np.float32(1)
    what = "p is rounded to float32 before the scale is computed"
    yield what, scale(x, compute, 1 / (1 - float(narrow_p)))
    yield "the scale is computed in float32", scale(x, compute, float(one / (one - narrow_p)))
    yield "kept elements are scaled twice", scale(scale(x, compute, s), compute, s)
    if components(x).dtype.itemsize < compute.itemsize:
        what = f"the product with the {compute} scale is rounded once, to {dtype_name(x.dtype)}"
        yield what, scale(x, np.float64, float(compute.type(s)))
    yield "the product is computed in float64 and rounded once", scale(x, np.float64, s)
    for dtype in dict.fromkeys((dtype_name(components(x).dtype), compute.name, "float64")):
        quotients = scale(x, numpy_dtype(dtype), 1 - p, np.divide)
        yield f"x is divided by 1 - p in {dtype}", quotients


def scale(
    x: NDArray[Any], dtype: Any, factor: float, operation: Callable[..., Any] = np.multiply
) -> NDArray[Any]:
    """Multiply the components of x by a factor in a dtype, and round to the dtype of x."""
    parts = components(x)
    product = _round_once(operation(parts.astype(dtype), np.dtype(dtype).type(factor)), parts.dtype)
    products: NDArray[Any] = product.view(x.dtype).reshape(x.shape)
    return products


def _round_once(product: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round a product once, since ml_dtypes rounds float64 to float32 on the way to bfloat16."""
    if product.dtype != np.float64 or dtype.itemsize > 2:
        return product.astype(dtype)
    # Round to odd: an inexact float32 gets an odd last bit. Then it is never halfway between two
    # numbers of the narrow dtype, and the second rounding cannot err.
    near = product.astype(np.float32)
    bits = near.view(np.uint32)
    is_beyond = np.abs(near.astype(np.float64)) > np.abs(product)
    odd = np.where(near == product, bits, bits - is_beyond | np.uint32(1))
    return odd.view(np.float32).astype(dtype)
