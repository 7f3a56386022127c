"""Kernels: words, masks and products in one pass over memory, compiled by Numba.

Requirements this design meets:

* Elements are processed in vectors, by LLVM's vector instructions: LLVM's loop vectorizer fails on
  most forms of these loops. LLVM splits a vector into the registers of the processor.
* The generator is the core's `philox`. It computes with `_VectorWords`, an arithmetic on vectors.
* Words go through a buffer that fits into the first-level cache. So a row may begin and end inside
  a Philox block, and a tile can be transposed.
* A kernel has one argument for all arrays, the task: an array of numbers and addresses. So one
  compilation serves arrays of any number of dimensions, read-only or writable.
* Any number of threads may run one task at once. They claim its work items by an atomic fetch-add
  on its counters, without Python's lock. The caller claims from the front and workers claim from
  the back, so the caches still fit when the same array is used again. No result depends on the
  thread that computes a work item.
* Little is compiled for each dtype, and nothing twice. Both traversals serve all dtypes: they call
  the generator and a dtype's selection by their addresses in the task.
* Numba compiles a cached function again if the function's own file has changed, and checks no
  other file. So all compiled code is in this file, except for the definition of the stream.

The sections follow the data: vectors, the generator and the selection of a dtype, intrinsics, the
functions that traversals call by address, the two traversals, and `make_kernel`.

This module imports Numba, so `unidrop.fused` imports it for the first array that kernels accept.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple, Self, cast

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import cfunc, njit, types
from numba.extending import intrinsic

from unidrop.philox import ODD_MULTIPLIER, philox

__all__ = ["AXES", "TILE_ROWS", "WORK_ITEM_SIZE", "Kernel", "get_tile_columns", "make_kernel"]

# The fields of a task, all int64. The axes follow, outermost first, three numbers each: the length,
# the stride in the mask's numbering, and the stride in memory.
CLAIMED, CLAIMED_BY_WORKERS, DONE, WORK_ITEMS, GENERATE, SELECT, X, Y, SIZE = range(9)
THRESHOLD, SCALE, KEY, BASE, HEIGHT, WIDTH, NDIM, AXES = range(9, 17)

WORK_ITEM_SIZE: Final = 1 << 16  # elements of a work item in rows
CHUNK: Final = 2048  # elements whose words are generated at a time, 8 KiB
# The words of 56 elements fill at most 8 blocks, even if the first element is inside a block. A
# full tile has 256 columns, enough for the processor to prefetch each row.
TILE_ROWS: Final = 56
_TILE_COLUMNS = 256
_BROADCAST_TILE_COLUMNS = 2048  # if all columns share the words of their row

# Philox blocks generated at a time. More blocks hide more latency, as long as registers suffice.
_BLOCKS = 8
_MANY_BLOCKS = 32 if get_host_cpu_features().get("avx512f") else _BLOCKS
_LANES = 32  # elements selected at a time
_SIDE = 8  # the side of a block that is transposed at a time
_SPINS = 20_000  # reads of the counter before the caller yields to Python

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()


# --- Vectors --------------------------------------------------------------------------------------


class _Vector:
    """A vector of LLVM with Python's operators; a Python number fills all lanes."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    @classmethod
    def broadcast(cls, builder: Any, scalar: Any, lanes: int) -> Self:
        """Return a vector with the same scalar in all lanes."""
        first = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
        first = builder.insert_element(first, scalar, _I32(0))
        return cls(builder, first).shuffle([0] * lanes)

    @classmethod
    def load(cls, builder: Any, address: Any, element: Any, lanes: int) -> Self:
        """Load a vector from an address that is aligned to an element."""
        pointer = builder.inttoptr(address, ir.VectorType(element, lanes).as_pointer())
        return cls(builder, builder.load(pointer, align=_get_size(element)))

    def store(self, address: Any) -> None:
        """Store all lanes at an address that is aligned to an element."""
        pointer = self.builder.inttoptr(address, self.value.type.as_pointer())
        self.builder.store(self.value, pointer, align=_get_size(self.value.type.element))

    def constant(self, number: Any) -> ir.Constant:
        """Return a constant of the same type: one number for all lanes, or a range over them."""
        kind = self.value.type
        return ir.Constant(
            kind, list(number) if isinstance(number, range) else [number] * kind.count
        )

    def _apply(self, operation: str, other: Any) -> "_Vector":
        other = other.value if isinstance(other, _Vector) else self.constant(other)
        return _Vector(self.builder, getattr(self.builder, operation)(self.value, other))

    def __add__(self, other: Any) -> "_Vector":
        return self._apply("add", other)

    def __sub__(self, other: Any) -> "_Vector":
        return self._apply("sub", other)

    def __mul__(self, other: Any) -> "_Vector":
        return self._apply("mul", other)

    def __and__(self, other: Any) -> "_Vector":
        return self._apply("and_", other)

    def __or__(self, other: Any) -> "_Vector":
        return self._apply("or_", other)

    def __xor__(self, other: Any) -> "_Vector":
        return self._apply("xor", other)

    def __rshift__(self, other: int) -> "_Vector":
        return self._apply("lshr", other)

    def __lshift__(self, other: int) -> "_Vector":
        return self._apply("shl", other)

    def __ge__(self, other: Any) -> "_Vector":
        other = other.value if isinstance(other, _Vector) else self.constant(other)
        return _Vector(self.builder, self.builder.icmp_unsigned(">=", self.value, other))

    def fadd(self, other: Any) -> "_Vector":
        """Return the sum of floating-point numbers."""
        return self._apply("fadd", other)

    def fmul(self, other: Any) -> "_Vector":
        """Return the product of floating-point numbers."""
        return self._apply("fmul", other)

    def convert(self, conversion: str, element: Any) -> "_Vector":
        """Return the lanes converted by bitcast, zext, trunc or sitofp."""
        kind = ir.VectorType(element, self.value.type.count)
        return _Vector(self.builder, getattr(self.builder, conversion)(self.value, kind))

    def select(self, if_true: "_Vector", if_false: Any) -> "_Vector":
        """Return, for each lane of this vector of booleans, the lane of one or the other."""
        other = if_false.value if isinstance(if_false, _Vector) else if_true.constant(if_false)
        return _Vector(self.builder, self.builder.select(self.value, if_true.value, other))

    def shuffle(self, order: list[int], other: "_Vector | None" = None) -> Self:
        """Return lanes in an order; numbers from the lane count on mean lanes of other."""
        lanes = ir.Constant(ir.VectorType(_I32, len(order)), order)
        second = (other or self).value
        return type(self)(self.builder, self.builder.shuffle_vector(self.value, second, lanes))


def _get_size(element: Any) -> int:
    """Return the size of an LLVM type in bytes."""
    return {_F32: 4, _F64: 8}.get(element) or element.width // 8


class _VectorWords:
    """The arithmetic of `philox` on 32-bit words in vectors of 64-bit lanes.

    The upper half of a lane may hold any bits. They cost nothing: a vector unit multiplies the
    lower halves of such lanes and ignores the upper halves.
    """

    sums_wrap = True

    def constant(self, word: int) -> int:
        """Return a Python word as it is."""
        return word

    def split(self, value: _Vector, bits: int) -> tuple[Any, _Vector]:
        """Return a word as it is."""
        return None, value

    def mulhilo(self, a: _Vector, m: int) -> tuple[_Vector, _Vector]:
        """Return the high and the low word of a product."""
        product = (a & 0xFFFFFFFF) * m
        return product >> 32, product


# --- The generator and the selection of a dtype ---------------------------------------------------
#
# A scale is a scalar float64; words, x and y are addresses.


def _make_generate(count: int) -> Any:
    """Return an intrinsic that generates the words of ``count`` blocks, two words per output."""

    def generate(typingctx: Any, words: Any, block: Any, key: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            words, block, key = args
            blocks = _Vector.broadcast(builder, block, count) + range(count)
            zero = blocks & 0
            counter = (blocks & 0xFFFFFFFF, blocks >> 32, zero, zero)
            keys = _Vector.broadcast(builder, key, count)
            four = philox(counter, (keys & 0xFFFFFFFF, keys >> 32), cast(Any, _VectorWords()))
            a, b, c, d = ((w & 0xFFFFFFFF) | (w * ODD_MULTIPLIER) << 32 for w in four)
            ab, cd = (v.shuffle(list(range(2 * count)), w) for v, w in ((a, b), (c, d)))
            in_order = [word * count + i for i in range(count) for word in range(4)]
            ab.shuffle(in_order, cd).store(words)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), build

    generate.__name__ = f"generate_{count}"
    return intrinsic(generate)


def _make_selects(
    kind: str, element: Any, width: int, multiply: Callable[..., _Vector] | None
) -> tuple[Any, Any]:
    """Return two intrinsics that select elements: a vector of them, and a single one.

    An element consists of ``width`` numbers. Without ``multiply``, which multiplies numbers by the
    scale, the output is the mask.
    """
    vector, one = (_make_select(kind, element, width, multiply, lanes) for lanes in (_LANES, 1))
    return vector, one


def _make_select(
    kind: str, element: Any, width: int, multiply: Callable[..., _Vector] | None, lanes: int
) -> Any:
    def select(typingctx: Any, words: Any, x: Any, y: Any, threshold: Any, scale: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            words, x, y, threshold, scale = args
            threshold = _Vector.broadcast(builder, builder.trunc(threshold, _I32), lanes)
            scale = builder.bitcast(scale, _F64)
            keep = _Vector.load(builder, words, _I32, lanes) >= threshold
            if multiply is None:
                keep.convert("zext", element).store(y)
            else:
                keep = keep.shuffle([lane // width for lane in range(lanes * width)])
                product = multiply(_Vector.load(builder, x, element, lanes * width), scale)
                keep.select(product, 0).store(y)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), build

    # Numba takes two functions of one name for the same function when it reads them from disk.
    select.__name__ = f"select_{lanes}_{kind}"
    return intrinsic(select)


def _multiply(x: _Vector, scale: Any) -> _Vector:
    kind = x.value.type
    if kind.element == _F32:
        scale = x.builder.fptrunc(scale, _F32)
    return x.fmul(_Vector.broadcast(x.builder, scale, kind.count))


def _multiply_bfloat16(x: _Vector, scale: Any) -> _Vector:
    single = (x.convert("zext", _I32) << 16).convert("bitcast", _F32)
    product = _multiply(single, scale).convert("bitcast", _I32)
    nearest_even = product + 0x7FFF + ((product >> 16) & 1)
    is_nan = (product & 0x7FFFFFFF) >= 0x7F800001
    return (is_nan.select(product | 0x400000, nearest_even) >> 16).convert("trunc", _I16)


def _multiply_float16(x: _Vector, scale: Any) -> _Vector:
    product = _multiply(_widen_float16(x.convert("zext", _I32)), scale)
    return _narrow_to_float16(product.convert("bitcast", _I32))


def _widen_float16(x: _Vector) -> _Vector:
    """Return the float32 of a float16 in 32 bits: exact, even for subnormal numbers."""
    magnitude, sign = x & 0x7FFF, (x & 0x8000) << 16
    # The biases of the exponents differ by 112. Infinity and NaN have the largest exponent of both.
    normal = (magnitude << 13) + (112 << 23)
    normal = (magnitude >= 0x7C00).select(normal + (112 << 23), normal)
    # Avoid a subnormal float32: a processor may be set to treat it as 0.
    subnormal = magnitude.convert("sitofp", _F32).fmul(2.0**-24).convert("bitcast", _I32)
    return ((magnitude >= 0x400).select(normal, subnormal) | sign).convert("bitcast", _F32)


def _narrow_to_float16(bits: _Vector) -> _Vector:
    """Return the float16 nearest to a float32 of 32 bits, ties to even."""
    magnitude, sign = bits & 0x7FFFFFFF, (bits >> 16) & 0x8000
    half = ((magnitude + 0xFFF + ((magnitude >> 13) & 1)) >> 13) - (112 << 10)
    # Below 2^-14 a float16 is a multiple of 2^-24. The last bit of 2^23 is worth 1, so adding 2^23
    # rounds to an integer, ties to even.
    whole = magnitude.convert("bitcast", _F32).fmul(2.0**24).fadd(2.0**23).convert("bitcast", _I32)
    half = (magnitude >= 0x38800000).select(half, whole - 0x4B000000)
    half = (magnitude >= 0x47800000).select(half & 0 | 0x7C00, half)  # 2^16
    half = (magnitude >= 0x7F800001).select(half & 0 | 0x7E00, half)  # NaN
    return (half | sign).convert("trunc", _I16)


@intrinsic
def _transpose_block(typingctx: Any, tile: Any, pitch: Any, offset: Any, starts: Any) -> Any:
    """Write a square block of a tile, from words that are stored by columns.

    All arguments are addresses or numbers of bytes. Each column of the block begins ``offset``
    after one of the addresses stored at ``starts``. The rows of the block begin at ``tile``,
    ``pitch`` apart.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile, pitch, offset, starts = args
        addresses = _Vector.load(builder, starts, _I64, _SIDE)
        columns = []
        for i in range(_SIDE):
            start = builder.add(offset, builder.extract_element(addresses.value, _I32(i)))
            columns.append(_Vector.load(builder, start, _I32, _SIDE))
        for i, row in enumerate(_transpose(columns)):
            row.store(builder.add(tile, builder.mul(pitch, _I64(i))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


def _transpose(vectors: list[_Vector]) -> list[_Vector]:
    """Return the transpose of a square whose side is a power of 2."""
    side, bit = len(vectors), 1
    while bit < side:
        # Two vectors whose numbers differ in this bit exchange the lanes that differ in it.
        low = [lane if not lane & bit else side + lane - bit for lane in range(side)]
        high = [lane + bit if not lane & bit else side + lane for lane in range(side)]
        vectors = [
            vectors[i - bit].shuffle(high, v) if i & bit else v.shuffle(low, vectors[i + bit])
            for i, v in enumerate(vectors)
        ]
        bit *= 2
    return vectors


# --- Intrinsics: addresses, memory without an array, atomic operations ----------------------------


@intrinsic
def _alloc(typingctx: Any, size: Any) -> Any:
    """Allocate some bytes and return their address."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(context.nrt.allocate(builder, args[0]), _I64)

    return types.int64(types.int64), build


@intrinsic
def _free(typingctx: Any, address: Any) -> Any:
    """Free the memory of `_alloc`."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        context.nrt.free(builder, builder.inttoptr(args[0], _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), build


@intrinsic
def _store(typingctx: Any, address: Any, number: Any) -> Any:
    """Store an int64 at an address."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], _I64.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def _fill(typingctx: Any, target: Any, source: Any) -> Any:
    """Store the word at an address `_LANES` times."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = builder.load(builder.inttoptr(args[1], _I32.as_pointer()))
        _Vector.broadcast(builder, word, _LANES).store(args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def _get_address(typingctx: Any, array: Any) -> Any:
    """Return the address of a task's array. All functions below receive a task by its address."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.ptrtoint(array.data, _I64)

    return types.int64(array), build


def _get_pointer(builder: Any, task: Any, field: Any) -> Any:
    """Return a pointer to a field of a task."""
    return builder.gep(builder.inttoptr(task, _I64.as_pointer()), [field])


@intrinsic
def _get(typingctx: Any, task: Any, field: Any) -> Any:
    """Return a field of a task."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_get_pointer(builder, *args))

    return types.int64(types.int64, types.int64), build


@intrinsic
def _fetch_add(typingctx: Any, task: Any, field: Any) -> Any:
    """Add 1 to a field of a task atomically, and return its former value."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _get_pointer(builder, *args), _I64(1), "acq_rel")

    return types.int64(types.int64, types.int64), build


@intrinsic
def _load_acquire(typingctx: Any, task: Any, field: Any) -> Any:
    """Return a field of a task, and synchronize with the thread that wrote it."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_get_pointer(builder, *args), "acquire", 8)

    return types.int64(types.int64, types.int64), build


@intrinsic
def _call(typingctx: Any, task: Any, field: Any, words: Any, index: Any, count: Any) -> Any:
    """Call the function whose address is a field of a task, and return its result."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        task, field, *others = args
        kind = ir.FunctionType(_I64, [_I64] * 4).as_pointer()
        function = builder.inttoptr(builder.load(_get_pointer(builder, task, field)), kind)
        return builder.call(function, [task, *others])

    return types.int64(*[types.int64] * 5), build


# --- Functions that traversals call by address ----------------------------------------------------
#
# A task, words and results are addresses. Indices and counts are in elements.

# Numba would compile a plain function twice: on its own, and inside its callers.
_inline = njit(inline="always")

_BLOCK_SIZE = 32  # bytes of the words of a block
_generate_blocks, _generate_many_blocks = _make_generate(_BLOCKS), _make_generate(_MANY_BLOCKS)


def _generate(task: Any, words: Any, index: Any, count: Any) -> Any:
    """Write the words of count elements; return the address of the first element's word."""
    key = _get(task, KEY)
    offset = index & 7
    first = np.int64(np.uint64(index) >> np.uint64(3))
    blocks = (offset + count + 7) >> 3
    many = blocks & -_MANY_BLOCKS if _MANY_BLOCKS > _BLOCKS else 0
    for i in range(0, many, _MANY_BLOCKS):
        _generate_many_blocks(words + _BLOCK_SIZE * i, first + i, key)
    for i in range(many, blocks, _BLOCKS):
        _generate_blocks(words + _BLOCK_SIZE * i, first + i, key)
    return words + 4 * offset


@_inline
def _select(
    task: Any, words: Any, start: Any, count: Any, vector: Any, one: Any, item_size: Any
) -> Any:
    """Select count elements from element ``start`` on; return count. ``item_size`` is in bytes."""
    x, y = _get(task, X) + start * item_size, _get(task, Y) + start * item_size
    threshold, scale = _get(task, THRESHOLD), _get(task, SCALE)
    done = count & -_LANES
    for i in range(0, done, _LANES):
        vector(words + 4 * i, x + i * item_size, y + i * item_size, threshold, scale)
    for i in range(done, count):
        one(words + 4 * i, x + i * item_size, y + i * item_size, threshold, scale)
    return count


# Each dtype has its own function here: Numba cannot cache a function that another function made.

_F32_VECTOR, _F32_ONE = _make_selects("float32", _F32, 1, _multiply)
_F64_VECTOR, _F64_ONE = _make_selects("float64", _F64, 1, _multiply)
_F16_VECTOR, _F16_ONE = _make_selects("float16", _I16, 1, _multiply_float16)
_BF16_VECTOR, _BF16_ONE = _make_selects("bfloat16", _I16, 1, _multiply_bfloat16)
_C64_VECTOR, _C64_ONE = _make_selects("complex64", _F32, 2, _multiply)
_C128_VECTOR, _C128_ONE = _make_selects("complex128", _F64, 2, _multiply)
_BOOL_VECTOR, _BOOL_ONE = _make_selects("bool", _I8, 1, None)


def _select_float32(task: Any, words: Any, start: Any, count: Any) -> Any:
    return _select(task, words, start, count, _F32_VECTOR, _F32_ONE, 4)


def _select_float64(task: Any, words: Any, start: Any, count: Any) -> Any:
    return _select(task, words, start, count, _F64_VECTOR, _F64_ONE, 8)


def _select_float16(task: Any, words: Any, start: Any, count: Any) -> Any:
    return _select(task, words, start, count, _F16_VECTOR, _F16_ONE, 2)


def _select_bfloat16(task: Any, words: Any, start: Any, count: Any) -> Any:
    return _select(task, words, start, count, _BF16_VECTOR, _BF16_ONE, 2)


def _select_complex64(task: Any, words: Any, start: Any, count: Any) -> Any:
    return _select(task, words, start, count, _C64_VECTOR, _C64_ONE, 8)


def _select_complex128(task: Any, words: Any, start: Any, count: Any) -> Any:
    return _select(task, words, start, count, _C128_VECTOR, _C128_ONE, 16)


def _select_bool(task: Any, words: Any, start: Any, count: Any) -> Any:
    return _select(task, words, start, count, _BOOL_VECTOR, _BOOL_ONE, 1)


# --- The two traversals ---------------------------------------------------------------------------


def get_tile_columns(rows: int, mask_stride: int) -> int:
    """Return the largest number of columns of a tile with some rows and a column mask stride."""
    if mask_stride == 0:
        return _BROADCAST_TILE_COLUMNS
    return TILE_ROWS * _TILE_COLUMNS // (-(-rows // _SIDE) * _SIDE)


def _get_words_size(count: int) -> int:
    """Return the bytes for the words of count elements that may begin inside a block."""
    return 4 * 8 * (-(-(count + 7) // 8) + _BLOCKS)


_COLUMN_SIZE = _get_words_size(TILE_ROWS)
_COLUMNS_SIZE = _SIDE * _COLUMN_SIZE
_CHUNK_SIZE = _get_words_size(CHUNK)
# The last block of a row of blocks may end beyond the last column.
_TILE_SIZE = 4 * (TILE_ROWS * _TILE_COLUMNS + TILE_ROWS * _SIDE)


def _rows(task_array: Any, is_worker: Any) -> Any:
    """Traverse rows whose elements are neighbors in memory and in the mask's numbering."""
    task = _get_address(task_array)
    size, length = _get(task, SIZE), _get(task, AXES + 3 * (_get(task, NDIM) - 1))
    words = _alloc(_CHUNK_SIZE)
    front = 0
    while _fetch_add(task, CLAIMED) < _get(task, WORK_ITEMS):
        back = _get(task, WORK_ITEMS) - 1
        work_item = back - _fetch_add(task, CLAIMED_BY_WORKERS) if is_worker else front
        front += 1
        start = work_item * WORK_ITEM_SIZE
        end = min(start + WORK_ITEM_SIZE, size)
        row, column = start // length, start % length
        while start < end:
            count = min(min(end - start, length - column), CHUNK)
            index, _ = _locate(task, row, _get(task, NDIM) - 1)
            first = _call(task, GENERATE, words, index + column, count)
            _call(task, SELECT, first, start, count)
            start += count
            column += count
            if column == length:
                row, column = row + 1, 0
        _fetch_add(task, DONE)
    _free(words)
    return _wait(task)


def _tiles(task_array: Any, is_worker: Any) -> Any:
    """Traverse tiles of two axes: rows are neighbors in the mask's numbering, columns in memory.

    The words of a tile are generated by columns, and transposed in the cache.
    """
    task = _get_address(task_array)
    last = AXES + 3 * (_get(task, NDIM) - 1)
    rows, row_stride = _get(task, last - 3), _get(task, last - 1)
    columns, mask_stride = _get(task, last), _get(task, last + 1)
    across, down = -(-columns // _get(task, WIDTH)), -(-rows // _get(task, HEIGHT))
    words = _alloc(_COLUMNS_SIZE + _TILE_SIZE + _SIDE * 8)
    tile = words + _COLUMNS_SIZE
    starts = tile + _TILE_SIZE
    front = 0
    while _fetch_add(task, CLAIMED) < _get(task, WORK_ITEMS):
        back = _get(task, WORK_ITEMS) - 1
        work_item = back - _fetch_add(task, CLAIMED_BY_WORKERS) if is_worker else front
        front += 1
        column = work_item % across * _get(task, WIDTH)
        row = work_item // across % down * _get(task, HEIGHT)
        index, start = _locate(task, work_item // across // down, _get(task, NDIM) - 2)
        index += row + column * mask_stride
        start += row * row_stride + column
        height = min(_get(task, HEIGHT), rows - row)
        width = min(_get(task, WIDTH), columns - column)
        if mask_stride == 0:
            first = _call(task, GENERATE, words, index, height)
            # Short rows that are adjacent in memory are selected together.
            most = max(1, CHUNK // width) if width == row_stride else 1
            for i in range(0, height, most):
                together = min(most, height - i)
                for k in range(together):
                    for j in range(0, width, _LANES):
                        _fill(tile + 4 * (k * width + j), first + 4 * (i + k))
                _call(task, SELECT, tile, start + i * row_stride, together * width)
        else:
            # Backwards: a block may end beyond the last column, at the start of the next row.
            for j in range((width - 1) & -_SIDE, -1, -_SIDE):
                _generate_columns(
                    task, words, starts, index + j * mask_stride, height, width - j, mask_stride
                )
                for i in range(0, height, _SIDE):
                    _transpose_block(tile + 4 * (i * width + j), 4 * width, 4 * i, starts)
            if width == row_stride:  # as above
                height, width = 1, height * width
            for i in range(height):
                _call(task, SELECT, tile + 4 * i * width, start + i * row_stride, width)
        _fetch_add(task, DONE)
    _free(words)
    return _wait(task)


@_inline
def _generate_columns(
    task: Any, words: Any, starts: Any, index: Any, height: Any, width: Any, mask_stride: Any
) -> Any:
    """Generate the words of up to `_SIDE` columns; write the address of each column to starts."""
    if mask_stride == height:
        # The columns are adjacent in the mask's numbering: no block is generated twice.
        first = _call(task, GENERATE, words, index, height * _SIDE)
        for j in range(_SIDE):
            _store(starts + 8 * j, first + 4 * height * j)
        return
    for j in range(min(width, _SIDE)):
        first = _call(task, GENERATE, words + _COLUMN_SIZE * j, index + j * mask_stride, height)
        _store(starts + 8 * j, first)
    for j in range(width, _SIDE):
        _store(starts + 8 * j, words)


@_inline
def _wait(task: Any) -> Any:
    """Wait briefly for the work items of other threads; return whether all are finished."""
    for _ in range(_SPINS):
        if _load_acquire(task, DONE) >= _get(task, WORK_ITEMS):
            break
    return _load_acquire(task, DONE) >= _get(task, WORK_ITEMS)


@_inline
def _locate(task: Any, number: Any, ndim: Any) -> Any:
    """Return the offsets of a position of the outer axes, in the mask's numbering and in memory."""
    index, start = _get(task, BASE), 0
    for k in range(ndim):
        axis = AXES + 3 * (ndim - 1 - k)
        position = number % _get(task, axis)
        number //= _get(task, axis)
        index += position * _get(task, axis + 1)
        start += position * _get(task, axis + 2)
    return index, start


# --- Kernels --------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A compiled traversal, and the addresses of the two functions that its tasks must name.

    ``run`` claims and computes work items of a task until all are claimed, from the back if a
    worker runs it. It returns whether all work items are finished.
    """

    run: Callable[[Any, bool], bool]
    generate: int
    select: int


def make_kernel(traversal: str, kind: str) -> Kernel:
    """Return a kernel, compiled now or read from disk.

    Parameters
    ----------
    traversal : {"rows", "tiles"}
    kind : str
        The name of the dtype.
    """
    generate, select = _get_function("generate"), _get_function(f"select_{kind}")
    return Kernel(_get_function(traversal), generate.address, select.address)


@cache
def _get_function(name: str) -> Any:
    """Return a function, compiled or read from disk. The cache keeps it: tasks hold its address."""
    try:
        return _compile(name, cache=True)
    except RuntimeError:  # Numba finds no folder for its cache
        pass
    except Exception as error:  # a damaged file raises any error, such as one of pickle
        warnings.warn(
            f"Numba's cache of compiled kernels raised {error!r}, so each process compiles them: "
            "free disk space, or delete the cache, in the folder NUMBA_CACHE_DIR or in __pycache__ "
            f"beside {__file__}",
            RuntimeWarning,
            stacklevel=2,
        )
    return _compile(name)


def _compile(name: str, **options: Any) -> Any:
    function = globals()[f"_{name}"]
    options |= {"error_model": "numpy"}
    if name in ("rows", "tiles"):
        options |= {"nogil": True, "no_cfunc_wrapper": True}
        return njit("boolean(int64[::1], boolean)", **options)(function)
    return cfunc("int64(int64, int64, int64, int64)", **options)(function)
