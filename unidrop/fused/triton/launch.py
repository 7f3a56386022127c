"""Launches of the kernels: their arguments, and the choice of kernel that calls share."""

import itertools
import struct
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

from unidrop.dtypes import ITEM_SIZES
from unidrop.fused.triton.layout import MAX_BASE, Flat, Rows, choose_layout
from unidrop.protocols import DeviceBuffer
from unidrop.rate import Rate
from unidrop.threads import fork_guard

__all__ = ["dropout", "fold_in", "next_key"]

Key = Any  # two words, or what a launch accepts as a pointer


class _Launch(NamedTuple):
    """A kernel, its grid, and the arguments of each run after those that change between calls.

    A shift is what a run adds to the number of the first element.
    """

    kernel: Any
    is_flat: bool
    grid: tuple[int, ...]
    runs: tuple[tuple[int, tuple[int, ...]], ...]
    constants: dict[str, Any]


def dropout(
    source: DeviceBuffer,
    target: DeviceBuffer,
    kind: str,
    shape: tuple[int, ...],
    mask_strides: tuple[int, ...],
    rate: Rate,
    key: Key,
    base: Any,
) -> None:
    """Write dropout of an array's elements to other elements, or to the same ones.

    Parameters
    ----------
    source, target : DeviceBuffer
        Memory that is the same, with the same strides, or that does not overlap.
    kind : str
        The name of the dtype; "bool" writes the mask itself and ignores the source.
    shape : tuple of int
        The lengths of the axes, all above 0.
    mask_strides : tuple of int
        The distance between neighbors in the mask's numbering; 0 along a broadcast axis.
    rate : Rate
        A rate that keeps some elements.
    key : two ints or pointer
        The words ``(lo, hi)``, or a pointer to both as int64.
    base : int or pointer
        The number of the first element in [0, 2^64), or a pointer to its 64 bits.
    """
    if kind == "bool":
        source = target
    is_number = isinstance(base, int)
    launch = _prepare(
        kind,
        shape,
        mask_strides,
        source.strides,
        target.strides,
        is_number and base % 8 == 0,
        not is_number or base > MAX_BASE,
    )
    key_pointer, key_number = _split_key(key)
    numbers = rate.threshold - ((rate.threshold >> 31) << 32), _get_scale(kind, rate.scale)
    kernel = launch.kernel[launch.grid]
    x, y = source.pointer, target.pointer
    if launch.is_flat:
        ((_, (size,)),) = launch.runs
        kernel(x, y, key_pointer, key_number, _signed(base), size, *numbers, **launch.constants)
        return
    base_pointer, first = (None, base) if is_number else (base, 0)
    for shift, arguments in launch.runs:
        kernel(
            x, y, key_pointer, base_pointer, key_number, _signed(first + shift), *numbers,
            *arguments, **launch.constants,
        )  # fmt: skip


def next_key(calls: Any, key: Key, out: Any, count: int = 1, key_stride: int = 0) -> None:
    """Take call numbers, advance them and fold them into keys, in one launch.

    Parameters
    ----------
    calls : pointer
        To int64 (count, 2): each number and its complement. A complement that does not match stays
        a mismatch.
    key : two ints or pointer
        The words ``(lo, hi)``, or a pointer to both as int64.
    out : pointer
        To int64 (count, 3): for each number the words of the new key, and the number.
    count : int, default 1
    key_stride : int, default 0
        The distance between the keys at the pointer, in int64: 0 for one key, 2 for a key each.
    """
    pointer, number = _split_key(key)
    kernel = _get_kernels().next_key[(count,)]
    kernel(calls, pointer, out, number, key_stride, TAG=1, num_warps=1)


def fold_in(key: Key, data: Any, tag: int, out: Any) -> None:
    """Fold the 64 bits of an integer in device memory into a key.

    Parameters
    ----------
    key : two ints or pointer
    data : pointer
        To one int64.
    tag : int
        1 for integers, as `Key.fold_in` does.
    out : pointer
        To int64 ``[lo, hi]``.
    """
    pointer, number = _split_key(key)
    _get_kernels().fold[(1,)](pointer, data, out, number, TAG=tag, num_warps=1)


@cache
def _get_kernels() -> Any:
    """Return the module of kernels; the first call imports Triton."""
    with fork_guard:
        from unidrop.fused.triton import kernels
    return kernels


@lru_cache(maxsize=4096)
def _prepare(
    kind: str,
    shape: tuple[int, ...],
    mask_strides: tuple[int, ...],
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    begins_block: bool,
    is_far: bool,
) -> _Launch:
    layout = choose_layout(
        shape, mask_strides, x_strides, y_strides, ITEM_SIZES[kind], begins_block, is_far
    )
    components = 2 if kind.startswith("complex") else 1
    kernels = _get_kernels()
    if isinstance(layout, Flat):
        return _Launch(
            kernels.flat,
            True,
            (-(-layout.size // layout.tile),),
            ((0, (layout.size,)),),
            {
                "BLOCKS": layout.tile // 8,
                "PARTS": layout.parts,
                "COMPONENTS": components,
                "WIDE": layout.is_wide,
                "WHOLE": layout.size % 8 == 0,
            },
        )
    constants = _get_constants(layout) | {"COMPONENTS": components}
    return _Launch(kernels.rows, False, layout.grid, tuple(_get_runs(layout)), constants)


def _get_runs(layout: Rows) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield the shift and the arguments of each run of `rows`."""
    columns, rows = layout.columns, layout.rows
    outer = [(axis.length, _signed(axis.mask), axis.x, axis.y) for axis in layout.outer]
    outer += [(1, 0, 0, 0)] * (3 - len(outer))
    fixed = (
        *(columns.length, columns.x, columns.y),
        *(rows.length, _signed(rows.mask), rows.x, rows.y),
        *(*outer[0][1:], *outer[1], *outer[2]),
    )
    for position in itertools.product(*(range(axis.length) for axis in layout.loops)):
        pairs = list(zip(position, layout.loops, strict=True))
        shift, x, y = (sum(i * axis[k] for i, axis in pairs) for k in (1, 2, 3))
        yield shift, (x, y, *fixed)


def _get_constants(layout: Rows) -> dict[str, Any]:
    height, width = layout.tile
    return {
        "ROWS": height,
        "BLOCKS": width,
        "PARTS": layout.parts,
        "OUTER": len(layout.outer),
        "SHARED": layout.is_shared,
        "ALIGNED": layout.is_aligned,
        "WIDE": layout.is_wide,
        "UNIT": layout.unit,
        "X_UNIT": layout.x_unit,
        "Y_UNIT": layout.y_unit,
        "TURN": layout.turn,
    }


def _split_key(key: Key) -> tuple[Any, int]:
    """Return the pointer and the number of a key, one of them empty."""
    if isinstance(key, tuple):
        lo, hi = key
        return None, _signed(hi << 32 | lo)
    return key, 0


def _signed(number: int) -> int:
    """Return the integer of 64 bits, with a sign, that equals a number modulo 2^64."""
    number &= (1 << 64) - 1
    return number - ((number >> 63) << 64)


@lru_cache(maxsize=1024)
def _get_scale(kind: str, scale: float) -> int:
    """Return the bits of a scale in the compute dtype, as a signed integer."""
    if kind in ("float64", "complex128"):
        return int.from_bytes(struct.pack("<d", scale), "little", signed=True)
    return int.from_bytes(struct.pack("<f", scale), "little", signed=True)
