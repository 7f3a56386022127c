"""The kernels: words, decisions and products in one pass over memory, compiled by Numba.

Requirements this design meets:

* What is done to elements is written for a vector of them, in LLVM's terms, and not left to its
  loop vectoriser, which gave up on most forms of these loops. LLVM splits a vector into what the
  processor has.
* The generator is the core's `philox`: `_Lanes` is arithmetic on words that it takes.
* Words go through a buffer that stays in the first-level cache, so that rows may begin and end
  inside a block, and a tile can be turned over.
* What a kernel knows of an array is in one argument, a job: numbers and addresses. So one
  compilation serves an array whether it is read-only or not, and of one dimension or of five.
* Any number of threads may run one job at once. They take units of it by atomic additions to its
  counters, without Python's lock: the caller from the front, its helpers from the back, so that
  an array that is used again finds itself in the same caches. Who takes what changes no result.
* Little is compiled for each dtype, and nothing twice. The ways through an array are for all of
  them; they call the generator, and what selects elements of a dtype, by addresses in the job.
* All that is compiled is in this file but for the stream's definition, for Numba compiles again
  when a kernel's own file has changed, and looks at no other.

Importing this module imports Numba; nothing does so until an array comes that a kernel could take.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple, Self, cast

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import cfunc, njit, types
from numba.extending import intrinsic

from unidrop.philox import ODD_MULTIPLIER, philox

__all__ = ["AXES", "TILE_ROWS", "UNIT", "Kernel", "kernel", "tile_columns"]

# The places of a job's numbers, all int64; the axes follow, outermost first, three numbers each:
# how many elements, how far apart in the mask's numbering, and how far apart in memory.
TAKEN, BACK, DONE, UNITS, DECIDE, SELECT, X, Y, SIZE, THRESHOLD, SCALE, KEY, BASE = range(13)
ROWS, COLUMNS, NDIM, AXES = range(13, 17)

UNIT: Final = 1 << 16  # elements that a thread takes at a time
CHUNK: Final = 2048  # elements whose words are made at a time, of 8 KiB
# A tile, where the mask is numbered across memory. That many rows of it, which may begin inside a
# block, take 8 blocks; and as many columns, if it has as many rows, are worth fetching ahead.
TILE_ROWS: Final = 56
_TILE_COLUMNS = 256
_SHARED_TILE_COLUMNS = 2048  # where the columns share their row's decision

# Blocks made at a time. The more, the less one waits for another, if there are registers for them.
_BLOCKS = 8
_MANY_BLOCKS = 32 if get_host_cpu_features().get("avx512f") else _BLOCKS
_MANY = 32  # elements selected at a time
_TURNED = 8  # the side of what is turned over at a time
_PATIENCE = 20_000  # looks at another thread's progress, before Python is asked to wait

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()


class _Lanes:
    """A vector in LLVM's terms, with Python's operators; a Python number fills all lanes."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    @classmethod
    def spread(cls, builder: Any, scalar: Any, count: int) -> Self:
        """Return a vector of count times one value."""
        first = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
        first = builder.insert_element(first, scalar, _I32(0))
        return cls(builder, first).shuffled([0] * count)

    @classmethod
    def load(cls, builder: Any, address: Any, element: Any, count: int) -> Self:
        """Return count elements at an address that need not be a vector's."""
        pointer = builder.inttoptr(address, ir.VectorType(element, count).as_pointer())
        return cls(builder, builder.load(pointer, align=_bytes(element)))

    def store(self, address: Any) -> None:
        """Write all lanes to an address."""
        pointer = self.builder.inttoptr(address, self.value.type.as_pointer())
        self.builder.store(self.value, pointer, align=_bytes(self.value.type.element))

    def constant(self, number: Any) -> ir.Constant:
        """Return a constant vector of the same type: of a number, or of one for each lane."""
        kind = self.value.type
        return ir.Constant(
            kind, list(number) if isinstance(number, range) else [number] * kind.count
        )

    def _with(self, operation: str, other: Any) -> "_Lanes":
        other = other.value if isinstance(other, _Lanes) else self.constant(other)
        return _Lanes(self.builder, getattr(self.builder, operation)(self.value, other))

    def __add__(self, other: Any) -> "_Lanes":
        return self._with("add", other)

    def __sub__(self, other: Any) -> "_Lanes":
        return self._with("sub", other)

    def __mul__(self, other: Any) -> "_Lanes":
        return self._with("mul", other)

    def __and__(self, other: Any) -> "_Lanes":
        return self._with("and_", other)

    def __or__(self, other: Any) -> "_Lanes":
        return self._with("or_", other)

    def __xor__(self, other: Any) -> "_Lanes":
        return self._with("xor", other)

    def __rshift__(self, other: int) -> "_Lanes":
        return self._with("lshr", other)

    def __lshift__(self, other: int) -> "_Lanes":
        return self._with("shl", other)

    def __ge__(self, other: Any) -> "_Lanes":
        other = other.value if isinstance(other, _Lanes) else self.constant(other)
        return _Lanes(self.builder, self.builder.icmp_unsigned(">=", self.value, other))

    def plus(self, other: Any) -> "_Lanes":
        """Return the sum of floating-point numbers."""
        return self._with("fadd", other)

    def times(self, other: Any) -> "_Lanes":
        """Return the product of floating-point numbers."""
        return self._with("fmul", other)

    def to(self, conversion: str, element: Any) -> "_Lanes":
        """Return the lanes converted: by bitcast, zext, trunc or sitofp."""
        kind = ir.VectorType(element, self.value.type.count)
        return _Lanes(self.builder, getattr(self.builder, conversion)(self.value, kind))

    def choose(self, yes: "_Lanes", no: Any) -> "_Lanes":
        """Return the lanes of yes where these ones are true, and of no elsewhere."""
        no = no.value if isinstance(no, _Lanes) else yes.constant(no)
        return _Lanes(self.builder, self.builder.select(self.value, yes.value, no))

    def shuffled(self, order: list[int], other: "_Lanes | None" = None) -> Self:
        """Return lanes in an order, those of another vector being numbered after these."""
        lanes = ir.Constant(ir.VectorType(_I32, len(order)), order)
        second = (other or self).value
        return type(self)(self.builder, self.builder.shuffle_vector(self.value, second, lanes))


def _bytes(element: Any) -> int:
    return {_F32: 4, _F64: 8}.get(element) or element.width // 8


class _Words:
    """The arithmetic on words that `philox` asks for, of words in lanes of 64 bits.

    A word's upper half holds rubbish, which costs nothing: a vector unit multiplies the lower
    halves of such lanes, and does not look at the upper ones.
    """

    sums_wrap = True

    def constant(self, word: int) -> int:
        """Return a Python word as it is."""
        return word

    def split(self, value: _Lanes, bits: int) -> tuple[Any, _Lanes]:
        """Return a word as it is."""
        return None, value

    def mulhilo(self, a: _Lanes, m: int) -> tuple[_Lanes, _Lanes]:
        """Return the words of a product."""
        product = (a & 0xFFFFFFFF) * m
        return product >> 32, product


# What is done to a vector of elements. A scale is a scalar float64; x and y are addresses.


def _decision(count: int) -> Any:
    """Return what decides the elements of ``count`` blocks: of each, four pairs of words."""

    def decide(typingctx: Any, pairs: Any, block: Any, key: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pairs, block, key = args
            blocks = _Lanes.spread(builder, block, count) + range(count)
            zero = blocks & 0
            counter = (blocks & 0xFFFFFFFF, blocks >> 32, zero, zero)
            keys = _Lanes.spread(builder, key, count)
            four = philox(counter, (keys & 0xFFFFFFFF, keys >> 32), cast(Any, _Words()))
            a, b, c, d = ((w & 0xFFFFFFFF) | (w * ODD_MULTIPLIER) << 32 for w in four)
            ab, cd = (v.shuffled(list(range(2 * count)), w) for v, w in ((a, b), (c, d)))
            in_order = [word * count + i for i in range(count) for word in range(4)]
            ab.shuffled(in_order, cd).store(pairs)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), build

    decide.__name__ = f"decide_{count}"
    return intrinsic(decide)


def _selections(
    kind: str, element: Any, width: int, times: Callable[..., _Lanes] | None
) -> tuple[Any, Any]:
    """Return the selection of many elements of a kind, and of one.

    They are ``width`` numbers each. Without ``times``, which multiplies numbers by the scale, it is
    of the decisions themselves.
    """
    many, one = (_selection(kind, element, width, times, lanes) for lanes in (_MANY, 1))
    return many, one


def _selection(
    kind: str, element: Any, width: int, times: Callable[..., _Lanes] | None, lanes: int
) -> Any:
    def select(typingctx: Any, words: Any, x: Any, y: Any, least: Any, scale: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            words, x, y, least, scale = args
            least = builder.trunc(least, _I32)
            scale = builder.bitcast(scale, _F64)
            keep = _Lanes.load(builder, words, _I32, lanes) >= _Lanes.spread(builder, least, lanes)
            if times is None:
                keep.to("zext", element).store(y)
            else:
                keep = keep.shuffled([lane // width for lane in range(lanes * width)])
                product = times(_Lanes.load(builder, x, element, lanes * width), scale)
                keep.choose(product, 0).store(y)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), build

    # Numba takes functions of one name, read from disk, for one function, whatever they do.
    select.__name__ = f"select_{lanes}_{kind}"
    return intrinsic(select)


def _times(x: _Lanes, scale: Any) -> _Lanes:
    kind = x.value.type
    if kind.element == _F32:
        scale = x.builder.fptrunc(scale, _F32)
    return x.times(_Lanes.spread(x.builder, scale, kind.count))


def _times_bfloat16(x: _Lanes, scale: Any) -> _Lanes:
    product = _times((x.to("zext", _I32) << 16).to("bitcast", _F32), scale).to("bitcast", _I32)
    nearest_even = product + 0x7FFF + ((product >> 16) & 1)
    is_nan = (product & 0x7FFFFFFF) >= 0x7F800001
    return (is_nan.choose(product | 0x400000, nearest_even) >> 16).to("trunc", _I16)


def _times_float16(x: _Lanes, scale: Any) -> _Lanes:
    return _to_float16(_times(_from_float16(x.to("zext", _I32)), scale).to("bitcast", _I32))


def _from_float16(x: _Lanes) -> _Lanes:
    """Return the float32 of a float16 in 32 bits: exact, also where that is subnormal."""
    magnitude, sign = x & 0x7FFF, (x & 0x8000) << 16
    # The exponents' biases differ by 112; infinity and NaN have the largest exponent of either.
    normal = (magnitude << 13) + (112 << 23)
    normal = (magnitude >= 0x7C00).choose(normal + (112 << 23), normal)
    # Not by a subnormal float32, which a processor may be told to take as 0.
    subnormal = magnitude.to("sitofp", _F32).times(2.0**-24).to("bitcast", _I32)
    return ((magnitude >= 0x400).choose(normal, subnormal) | sign).to("bitcast", _F32)


def _to_float16(bits: _Lanes) -> _Lanes:
    """Return the float16 nearest to a float32 of 32 bits, ties to even."""
    magnitude, sign = bits & 0x7FFFFFFF, (bits >> 16) & 0x8000
    half = ((magnitude + 0xFFF + ((magnitude >> 13) & 1)) >> 13) - (112 << 10)
    # Below 2^-14 a float16 is a multiple of 2^-24. What is added to 2^23, whose last bit is worth
    # 1, is rounded to an integer, ties to even.
    whole = magnitude.to("bitcast", _F32).times(2.0**24).plus(2.0**23).to("bitcast", _I32)
    half = (magnitude >= 0x38800000).choose(half, whole - 0x4B000000)
    half = (magnitude >= 0x47800000).choose(half & 0 | 0x7C00, half)  # 2^16
    half = (magnitude >= 0x7F800001).choose(half & 0 | 0x7E00, half)  # NaN
    return (half | sign).to("trunc", _I16)


@intrinsic
def _turn(typingctx: Any, turned: Any, pitch: Any, at: Any, begins: Any) -> Any:
    """Write, as rows of a tile, words that lie as its columns: a square of them.

    All are addresses or bytes: the square's columns begin ``at`` after the addresses written at
    ``begins``, its rows at ``turned`` and every ``pitch`` from there.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        turned, pitch, at, begins = args
        each = _Lanes.load(builder, begins, _I64, _TURNED)
        lines = []
        for i in range(_TURNED):
            begin = builder.add(at, builder.extract_element(each.value, _I32(i)))
            lines.append(_Lanes.load(builder, begin, _I32, _TURNED))
        for i, line in enumerate(_transposed(lines)):
            line.store(builder.add(turned, builder.mul(pitch, _I64(i))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


def _transposed(lines: list[_Lanes]) -> list[_Lanes]:
    """Return the columns of a square, whose sides are a power of 2."""
    side, bit = len(lines), 1
    while bit < side:
        # Exchange, between lines that differ in this bit of their number, lanes that differ in it.
        low = [lane if not lane & bit else side + lane - bit for lane in range(side)]
        high = [lane + bit if not lane & bit else side + lane for lane in range(side)]
        lines = [
            lines[i - bit].shuffled(high, line) if i & bit else line.shuffled(low, lines[i + bit])
            for i, line in enumerate(lines)
        ]
        bit *= 2
    return lines


# What Numba's Python can't say: addresses, room without an array, an atomic addition.


@intrinsic
def _room(typingctx: Any, size: Any) -> Any:
    """Allocate some bytes and return their address."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(context.nrt.allocate(builder, args[0]), _I64)

    return types.int64(types.int64), build


@intrinsic
def _free(typingctx: Any, address: Any) -> Any:
    """Free what was allocated."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        context.nrt.free(builder, builder.inttoptr(args[0], _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), build


@intrinsic
def _write(typingctx: Any, address: Any, number: Any) -> Any:
    """Write an int64."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], _I64.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def _spread(typingctx: Any, to: Any, word: Any) -> Any:
    """Write one word, which is at an address, `_MANY` times."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = builder.load(builder.inttoptr(args[1], _I32.as_pointer()))
        _Lanes.spread(builder, word, _MANY).store(args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def _address(typingctx: Any, job: Any) -> Any:
    """Return the address of a job's numbers, which stands for the job in all that is below."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.ptrtoint(array.data, _I64)

    return types.int64(job), build


def _of_job(builder: Any, job: Any, place: Any) -> Any:
    """Return a pointer to one of a job's numbers."""
    return builder.gep(builder.inttoptr(job, _I64.as_pointer()), [place])


@intrinsic
def _number(typingctx: Any, job: Any, place: Any) -> Any:
    """Return a number of a job."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_of_job(builder, *args))

    return types.int64(types.int64, types.int64), build


@intrinsic
def _take(typingctx: Any, job: Any, place: Any) -> Any:
    """Add 1 to a number of a job, atomically, and return what it was."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _of_job(builder, *args), _I64(1), "acq_rel")

    return types.int64(types.int64, types.int64), build


@intrinsic
def _read(typingctx: Any, job: Any, place: Any) -> Any:
    """Return a number of a job, and see all that was written before it was."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_of_job(builder, *args), "acquire", 8)

    return types.int64(types.int64, types.int64), build


@intrinsic
def _call(typingctx: Any, job: Any, place: Any, words: Any, index: Any, count: Any) -> Any:
    """Call the function whose address is one of a job's numbers, and return what it returns."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        job, place, *others = args
        kind = ir.FunctionType(_I64, [_I64] * 4).as_pointer()
        function = builder.inttoptr(builder.load(_of_job(builder, job, place)), kind)
        return builder.call(function, [job, *others])

    return types.int64(*[types.int64] * 5), build


# What the ways through an array call by its address. All but counts of elements are addresses or
# bytes, also a job.

# A part of another function. Else it would become machine code twice: by itself, and in there.
_part = njit(inline="always")

_BLOCK = 32  # bytes of its words
_decide_some, _decide_many = _decision(_BLOCKS), _decision(_MANY_BLOCKS)


def _decide(job: Any, words: Any, index: Any, count: Any) -> Any:
    """Write what decides elements index to index + count; return where the first one's is."""
    key = _number(job, KEY)
    offset = index & 7
    first = np.int64(np.uint64(index) >> np.uint64(3))
    blocks = (offset + count + 7) >> 3
    many = blocks & -_MANY_BLOCKS if _MANY_BLOCKS > _BLOCKS else 0
    for i in range(0, many, _MANY_BLOCKS):
        _decide_many(words + _BLOCK * i, first + i, key)
    for i in range(many, blocks, _BLOCKS):
        _decide_some(words + _BLOCK * i, first + i, key)
    return words + 4 * offset


@_part
def _select(job: Any, words: Any, at: Any, count: Any, many: Any, one: Any, item: Any) -> Any:
    """Select count elements, of ``item`` bytes, from element ``at`` on; return their number."""
    x, y = _number(job, X) + at * item, _number(job, Y) + at * item
    least, scale = _number(job, THRESHOLD), _number(job, SCALE)
    done = count & -_MANY
    for i in range(0, done, _MANY):
        many(words + 4 * i, x + i * item, y + i * item, least, scale)
    for i in range(done, count):
        one(words + 4 * i, x + i * item, y + i * item, least, scale)
    return count


# Written out, since Numba keeps no function that another one made.

_F32_MANY, _F32_ONE = _selections("float32", _F32, 1, _times)
_F64_MANY, _F64_ONE = _selections("float64", _F64, 1, _times)
_F16_MANY, _F16_ONE = _selections("float16", _I16, 1, _times_float16)
_BF16_MANY, _BF16_ONE = _selections("bfloat16", _I16, 1, _times_bfloat16)
_C64_MANY, _C64_ONE = _selections("complex64", _F32, 2, _times)
_C128_MANY, _C128_ONE = _selections("complex128", _F64, 2, _times)
_BOOL_MANY, _BOOL_ONE = _selections("bool", _I8, 1, None)


def _select_float32(job: Any, words: Any, at: Any, count: Any) -> Any:
    return _select(job, words, at, count, _F32_MANY, _F32_ONE, 4)


def _select_float64(job: Any, words: Any, at: Any, count: Any) -> Any:
    return _select(job, words, at, count, _F64_MANY, _F64_ONE, 8)


def _select_float16(job: Any, words: Any, at: Any, count: Any) -> Any:
    return _select(job, words, at, count, _F16_MANY, _F16_ONE, 2)


def _select_bfloat16(job: Any, words: Any, at: Any, count: Any) -> Any:
    return _select(job, words, at, count, _BF16_MANY, _BF16_ONE, 2)


def _select_complex64(job: Any, words: Any, at: Any, count: Any) -> Any:
    return _select(job, words, at, count, _C64_MANY, _C64_ONE, 8)


def _select_complex128(job: Any, words: Any, at: Any, count: Any) -> Any:
    return _select(job, words, at, count, _C128_MANY, _C128_ONE, 16)


def _select_bool(job: Any, words: Any, at: Any, count: Any) -> Any:
    return _select(job, words, at, count, _BOOL_MANY, _BOOL_ONE, 1)


# The two ways through an array. All but counts of elements are addresses or bytes.


def tile_columns(rows: int, stride: int) -> int:
    """Return the most columns of a tile of some rows, whose columns are a stride apart."""
    if stride == 0:
        return _SHARED_TILE_COLUMNS
    return TILE_ROWS * _TILE_COLUMNS // (-(-rows // _TURNED) * _TURNED)


def _bytes_of_words(count: int) -> int:
    """Return how many bytes the words of count elements take, if those begin inside a block."""
    return 4 * 8 * (-(-(count + 7) // 8) + _BLOCKS)


_LINE = _bytes_of_words(TILE_ROWS)
_WORDS_OF_CHUNK = _bytes_of_words(CHUNK)
_WORDS_OF_COLUMNS = _TURNED * _LINE
# A row of squares may end beyond the last column.
_TURNED_TILE = 4 * (TILE_ROWS * _TILE_COLUMNS + TILE_ROWS * _TURNED)


def _rows(numbers: Any, helper: Any) -> Any:
    """Go through rows whose elements follow each other in memory and in the mask's numbering."""
    job = _address(numbers)
    size, length = _number(job, SIZE), _number(job, AXES + 3 * (_number(job, NDIM) - 1))
    words = _room(_WORDS_OF_CHUNK)
    front = 0
    while _take(job, TAKEN) < _number(job, UNITS):
        unit = _number(job, UNITS) - 1 - _take(job, BACK) if helper else front
        front += 1
        at = unit * UNIT
        end = min(at + UNIT, size)
        row, column = at // length, at % length
        while at < end:
            count = min(min(end - at, length - column), CHUNK)
            index, _ = _place(job, row, _number(job, NDIM) - 1)
            begin = _call(job, DECIDE, words, index + column, count)
            _call(job, SELECT, begin, at, count)
            at += count
            column += count
            if column == length:
                row, column = row + 1, 0
        _take(job, DONE)
    _free(words)
    return _finished(job)


def _tiles(numbers: Any, helper: Any) -> Any:
    """Go through tiles of two axes: rows that follow the mask's numbering, columns memory.

    What decides a tile is made column by column, and turned over in the cache.
    """
    job = _address(numbers)
    last = AXES + 3 * (_number(job, NDIM) - 1)
    rows, step = _number(job, last - 3), _number(job, last - 1)
    columns, stride = _number(job, last), _number(job, last + 1)
    across, down = -(-columns // _number(job, COLUMNS)), -(-rows // _number(job, ROWS))
    words = _room(_WORDS_OF_COLUMNS + _TURNED_TILE + _TURNED * 8)
    turned = words + _WORDS_OF_COLUMNS
    begins = turned + _TURNED_TILE
    front = 0
    while _take(job, TAKEN) < _number(job, UNITS):
        unit = _number(job, UNITS) - 1 - _take(job, BACK) if helper else front
        front += 1
        column = unit % across * _number(job, COLUMNS)
        row = unit // across % down * _number(job, ROWS)
        index, at = _place(job, unit // across // down, _number(job, NDIM) - 2)
        index += row + column * stride
        at += row * step + column
        height = min(_number(job, ROWS), rows - row)
        width = min(_number(job, COLUMNS), columns - column)
        if stride == 0:
            begin = _call(job, DECIDE, words, index, height)
            # Short rows that follow each other in memory are selected together.
            most = max(1, CHUNK // width) if width == step else 1
            for i in range(0, height, most):
                together = min(most, height - i)
                for k in range(together):
                    for j in range(0, width, _MANY):
                        _spread(turned + 4 * (k * width + j), begin + 4 * (i + k))
                _call(job, SELECT, turned, at + i * step, together * width)
        else:
            # Backwards: a square may end beyond the last column, where the next row begins.
            for j in range((width - 1) & -_TURNED, -1, -_TURNED):
                _decide_columns(job, words, begins, index + j * stride, height, width - j, stride)
                for i in range(0, height, _TURNED):
                    _turn(turned + 4 * (i * width + j), 4 * width, 4 * i, begins)
            if width == step:  # as above
                height, width = 1, height * width
            for i in range(height):
                _call(job, SELECT, turned + 4 * i * width, at + i * step, width)
        _take(job, DONE)
    _free(words)
    return _finished(job)


@_part
def _decide_columns(
    job: Any, words: Any, begins: Any, index: Any, height: Any, width: Any, stride: Any
) -> Any:
    """Write what decides as many columns as are turned over at once, and where each begins."""
    if stride == height:
        # They follow each other in the numbering: no block is made twice.
        begin = _call(job, DECIDE, words, index, height * _TURNED)
        for j in range(_TURNED):
            _write(begins + 8 * j, begin + 4 * height * j)
        return
    for j in range(min(width, _TURNED)):
        begin = _call(job, DECIDE, words + _LINE * j, index + j * stride, height)
        _write(begins + 8 * j, begin)
    for j in range(width, _TURNED):
        _write(begins + 8 * j, words)


@_part
def _finished(job: Any) -> Any:
    """Wait a little for the units that others have taken; tell whether all are finished."""
    for _ in range(_PATIENCE):
        if _read(job, DONE) >= _number(job, UNITS):
            break
    return _read(job, DONE) >= _number(job, UNITS)


@_part
def _place(job: Any, number: Any, ndim: Any) -> Any:
    """Return where, in the mask's numbering and in memory, a position of the outer axes begins."""
    index, at = _number(job, BASE), 0
    for k in range(ndim):
        axis = AXES + 3 * (ndim - 1 - k)
        position = number % _number(job, axis)
        number //= _number(job, axis)
        index += position * _number(job, axis + 1)
        at += position * _number(job, axis + 2)
    return index, at


class Kernel(NamedTuple):
    """A way through arrays, and the addresses of what it calls, which its jobs must name.

    ``run`` takes units of a job until none is left, from the back if it runs on a helper's thread,
    and returns whether all are finished.
    """

    run: Callable[[Any, bool], bool]
    decide: int
    select: int


def kernel(way: str, kind: str) -> Kernel:
    """Return the kernel of a way, "rows" or "tiles", through arrays of a dtype, compiled or read.

    ``kind`` is the dtype's name.
    """
    decide, select = _function("decide"), _function(f"select_{kind}")
    return Kernel(_function(way), decide.address, select.address)


@cache
def _function(name: str) -> Any:
    """Return a function, compiled or read from disk. It is kept, for its address is in use."""
    try:
        return _compiled(name, cache=True)
    except RuntimeError:  # there is nowhere to keep a cache
        return _compiled(name)


def _compiled(name: str, **options: Any) -> Any:
    function = globals()[f"_{name}"]
    options |= {"error_model": "numpy"}
    if name in ("rows", "tiles"):
        options |= {"nogil": True, "no_cfunc_wrapper": True}
        return njit("boolean(int64[::1], boolean)", **options)(function)
    return cfunc("int64(int64, int64, int64, int64)", **options)(function)
