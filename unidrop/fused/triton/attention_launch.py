"""Launches of the kernels of attention: their arguments, and the choice of tiles."""

from functools import cache, lru_cache
from typing import Any, NamedTuple

from unidrop.dtypes import ITEM_SIZES, dtype_name
from unidrop.fused.triton.launch import Key, _signed, _split_key
from unidrop.protocols import DeviceBuffer
from unidrop.rate import Rate
from unidrop.threads import fork_guard

__all__ = ["MAX_FEATURES", "Attention", "attend", "differentiate"]

# Features of a head, by the dtype. A tile has all of them, and more would not fit into registers.
MAX_FEATURES = {"float16": 256, "bfloat16": 256, "float32": 128}

_BLOCK = 8  # elements that one Philox block decides
_UNIT = 8  # elements that fill 16 bytes, the most that a thread loads at once


class Attention(NamedTuple):
    """Lengths and options of attention; every length is above 0.

    Attributes
    ----------
    kind : str
        The name of the dtype of all arrays: a key of `MAX_FEATURES`.
    batch, heads, key_heads, queries, keys : int
        Each head of keys and values serves heads // key_heads heads of queries.
    features, value_features : int
        Up to `MAX_FEATURES` of the dtype.
    is_causal : bool
    diagonal : int
        If ``is_causal``, query i attends to keys up to number i + diagonal.
    scale : float
        The factor of scores.
    rate : Rate
    mask_strides : tuple of int
        The distances between batches, heads and queries in the mask's numbering; keys have 1.
    base : int
        The number of the first element, in [0, 2^64).
    """

    kind: str
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    features: int
    value_features: int
    is_causal: bool
    diagonal: int
    scale: float
    rate: Rate
    mask_strides: tuple[int, int, int]
    base: int


def attend(
    query: DeviceBuffer,
    key: DeviceBuffer,
    value: DeviceBuffer,
    bias: DeviceBuffer | None,
    output: DeviceBuffer,
    sizes: Any,
    attention: Attention,
    dropout_key: Key,
    place: Any = None,
) -> None:
    """Write the output of attention, and the sizes of its queries.

    Parameters
    ----------
    query, key, value, output : DeviceBuffer
        Of shape (batch, heads, length, features), with any strides but 1 for features.
    bias : DeviceBuffer, optional
        Of shape (batch, heads, queries, keys), with any strides but 0 or 1 for keys: numbers that
        are added to scores, or bools that are true for pairs that attend.
    sizes : pointer
        To contiguous float32 of shape (batch, heads, queries, 2): the highest score of a query, and
        the logarithm of the total of exponentials of the differences to it. A query without keys
        has the lowest number and -inf.
    attention : Attention
    dropout_key : two ints or pointer
        The words ``(lo, hi)``, or a pointer to both as int64.
    place : pointer, optional
        To the base, modulo 2^64, and the diagonal of the attention, as int64. The numbers of
        ``attention`` are ignored then.
    """
    buffers = [query, key, value, bias, output]
    numbers, constants = _prepare(attention, _get_step(bias), _get_unit(buffers), place is None)
    pointer, number = _split_key(dropout_key)
    tile = _choose_tile("attend", attention, _get_kind(bias))
    _get_kernels().attend[_get_grid(attention, tile.rows)](
        *_get_pointers(buffers), sizes, pointer, place, number, *numbers,
        *_get_strides(buffers), **constants, **_get_constants(tile),
    )  # fmt: skip


def differentiate(
    upstream: DeviceBuffer,
    upstream_lse: Any,
    query: DeviceBuffer,
    key: DeviceBuffer,
    value: DeviceBuffer,
    bias: DeviceBuffer | None,
    output: DeviceBuffer,
    sizes: Any,
    scratch: Any,
    of_query: DeviceBuffer,
    of_key: DeviceBuffer,
    of_value: DeviceBuffer,
    attention: Attention,
    dropout_key: Key,
    place: Any = None,
) -> None:
    """Write the gradients of queries, keys and values.

    Parameters
    ----------
    upstream, query, key, value, output, of_query, of_key, of_value : DeviceBuffer
        Of shape (batch, heads, length, features), with any strides but 1 for features.
    upstream_lse : pointer or None
        To contiguous float32 of shape (batch, heads, queries): the gradient of the sum of both
        sizes, which is the logarithm of the total of exponentials. None stands for zeros.
    bias, sizes, attention, dropout_key, place
        As in `attend`.
    scratch : pointer
        To float32 of shape (batch, heads, queries), which the function overwrites.
    """
    kernels = _get_kernels()
    pointer, number = _split_key(dropout_key)
    inputs = [query, key, value, bias]
    numbers, constants = _prepare(
        attention,
        _get_step(bias),
        _get_unit([*inputs, output, upstream, of_query, of_key, of_value]),
        place is None,
    )
    tile = _choose_tile("differentiate_queries", attention, _get_kind(bias))
    kernels.differentiate_queries[_get_grid(attention, tile.rows)](
        *_get_pointers([*inputs, output]), sizes, pointer, place, upstream.pointer, upstream_lse,
        scratch, of_query.pointer, number, *numbers,
        *_get_strides([*inputs, output, upstream, of_query]), **constants, **_get_constants(tile),
    )  # fmt: skip
    tile = _choose_tile("differentiate_keys", attention, _get_kind(bias))
    programs = -(-attention.keys // tile.columns) * attention.batch * attention.key_heads
    kernels.differentiate_keys[programs,](
        *_get_pointers(inputs), sizes, pointer, place, upstream.pointer, scratch, of_key.pointer,
        of_value.pointer, number, *numbers, *_get_strides([*inputs, upstream, of_key, of_value]),
        **constants, **_get_constants(tile),
    )  # fmt: skip


@cache
def _get_kernels() -> Any:
    """Return the module of kernels; the first call imports Triton."""
    with fork_guard:
        from unidrop.fused.triton import attention
    return attention


class _Tile(NamedTuple):
    """The queries and keys of a tile, and how a program processes it."""

    rows: int
    columns: int
    warps: int
    stages: int


# Tiles for each kernel and the bytes of an element, by the most features. With larger ones, loops
# would spill registers.
_TILES = {
    ("attend", 2): {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    ("attend", 4): {64: (64, 32, 8, 1), 128: (32, 32, 8, 1)},
    ("differentiate_queries", 2): {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    ("differentiate_queries", 4): {64: (32, 32, 8, 1), 128: (16, 16, 8, 1)},
    ("differentiate_keys", 2): {64: (32, 128, 8, 1), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
    ("differentiate_keys", 4): {64: (32, 32, 8, 1), 128: (16, 32, 8, 1)},
}


# Tiles that differ if there is a bias, whose elements take registers too.
_TILES_WITH_BIAS = {
    ("differentiate_queries", 2): {64: (64, 32, 4, 1), 128: (64, 32, 8, 1), 256: (32, 32, 8, 2)},
    ("differentiate_keys", 2): {64: (32, 128, 8, 1), 128: (32, 64, 8, 1), 256: (32, 32, 8, 2)},
}

# Tiles that differ if the bias has bools, which take more registers than numbers.
_TILES_WITH_BOOLS = _TILES_WITH_BIAS | {
    ("attend", 2): {64: (32, 64, 4, 1), 128: (32, 64, 8, 2), 256: (64, 32, 8, 2)},
}


def _choose_tile(kernel: str, attention: Attention, bias: str | None) -> _Tile:
    """Return the tile of a kernel; ``bias`` is the name of the dtype of a bias."""
    features = max(attention.features, attention.value_features)
    name = kernel, ITEM_SIZES[attention.kind]
    tables = {None: _TILES, "bool": _TILES_WITH_BOOLS}
    tiles = tables.get(bias, _TILES_WITH_BIAS).get(name, _TILES[name])
    return _Tile(*next(tile for most, tile in tiles.items() if features <= most))


def _get_kind(bias: DeviceBuffer | None) -> str | None:
    return None if bias is None else dtype_name(bias.pointer.dtype)


def _get_grid(attention: Attention, rows: int) -> tuple[int]:
    return (-(-attention.queries // rows) * attention.batch * attention.heads,)


def _get_pointers(buffers: list[DeviceBuffer | None]) -> list[Any]:
    return [None if buffer is None else buffer.pointer for buffer in buffers]


def _get_strides(buffers: list[DeviceBuffer | None]) -> list[int]:
    """Return the strides that kernels take: of batches, heads and rows."""
    return [x for b in buffers for x in ((0, 0, 0) if b is None else b.strides[:3])]


def _get_step(bias: DeviceBuffer | None) -> int:
    return 0 if bias is None else bias.strides[3]


def _get_unit(buffers: list[DeviceBuffer | None]) -> int:
    """Return a number that divides all strides of arrays, except the bias."""
    arrays = [buffer for i, buffer in enumerate(buffers) if i != 3 and buffer is not None]
    is_divisible = all(stride % _UNIT == 0 for x in arrays for stride in x.strides[:3])
    return _UNIT if is_divisible else 1


@lru_cache(maxsize=4096)
def _prepare(
    attention: Attention, bias_step: int, unit: int, is_placed: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the numbers and the constants that all kernels take."""
    a = attention
    diagonal = min(max(a.diagonal, -a.queries), a.keys)  # fits in 32 bits and attends to the same
    axes = zip((a.batch, a.heads, a.queries), a.mask_strides, strict=True)
    strides = [0 if length == 1 else stride for length, stride in axes]
    if a.rate.p == 0:
        keeps, keep_scale = "all", 1.0
    elif a.rate.keeps_nothing:
        keeps, keep_scale = "none", 0.0
    else:
        keeps, keep_scale = "some", a.rate.scale
    numbers = (
        *(_signed(a.base), a.rate.threshold - ((a.rate.threshold >> 31) << 32)),
        *(keep_scale, float(a.scale), *map(_signed, strides)),
        *(a.heads, a.heads // a.key_heads, a.queries, a.keys, diagonal),
    )
    constants = {
        "FEATURES": a.features,
        "WIDTH": _round_up(a.features),
        "V_FEATURES": a.value_features,
        "V_WIDTH": _round_up(a.value_features),
        "CAUSAL": a.is_causal,
        "ALIGNED": is_placed and all(number % _BLOCK == 0 for number in (a.base, *strides)),
        "KEEPS": keeps,
        "UNIT": unit,
        "BIAS_STEP": bias_step,
    }
    return numbers, constants


def _get_constants(tile: _Tile) -> dict[str, int]:
    return {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _round_up(number: int) -> int:
    """Return the least power of 2 that is not below a number, and that a product of tiles takes."""
    return max(16, 1 << (number - 1).bit_length())
