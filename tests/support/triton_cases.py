"""Cases for the kernels in Triton's interpreter, against NumPy's operations and golden vectors.

The interpreter must be chosen before Triton is imported, so a test runs this file as a program. It
prints a line of JSON for each case: its name, and the traceback if it failed.
"""

import inspect
import itertools
import json
import math
import os
import sys
import traceback
from importlib import resources

import ml_dtypes
import numpy as np

import unidrop
from unidrop import Key
from unidrop.fused import triton as kernels
from unidrop.fused.triton import layout
from unidrop.protocols import DeviceBuffer
from unidrop.rate import Rate
from unidrop.window import Window

KEY = Key(42).fold_in("encoder/0").fold_in(7)
KINDS = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
RATES = [2.0**-40, 2.0**-32, 0.1, 0.5, 1 - 2.0**-20, 1 - 2.0**-32]
MARGIN = 4096  # elements around an output, which no kernel may write to
CASES = {}


def case(function):
    """Add a function to the cases."""
    CASES[function.__name__] = function
    return function


# --- Arrays ---------------------------------------------------------------------------------------


def get_dtype(kind):
    return np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)


def get_component(kind):
    return {"complex64": "float32", "complex128": "float64"}.get(kind, kind)


def make_array(shape, kind="float32", seed=0):
    """Return random bits: NaN, infinities, subnormals and zeros are among them."""
    dtype = get_dtype(kind)
    if kind == "bool":
        return np.zeros(shape, bool)
    x = np.frombuffer(np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize), dtype)
    parts = x.view(get_dtype(get_component(kind))).copy()
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0]
    parts[: len(special)] = special[: parts.size]
    return parts.view(dtype).reshape(shape)


def get_bits(x):
    """Return the bits of an array's components, with one NaN for all."""
    x = np.ascontiguousarray(x).reshape(-1)
    if x.dtype == bool:
        return x.view(np.uint8)
    x = x.view(get_dtype(get_component(x.dtype.name)))
    bits = x.view(f"u{x.dtype.itemsize}").copy()
    bits[np.isnan(x.astype("float64"))] = 1
    return bits


def as_tensor(array):
    """Return a tensor of PyTorch that shares the memory of a NumPy array."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class Memory:
    """An array in memory with any strides, between margins of a known pattern."""

    def __init__(self, shape, strides, kind):
        self.kind, self.dtype = kind, get_dtype(kind)
        size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        self.all = np.full((size + 2 * MARGIN) * self.dtype.itemsize, 0xA5, np.uint8)
        elements = self.all.view(self.dtype)[MARGIN : MARGIN + size]
        byte_strides = [s * self.dtype.itemsize for s in strides]
        self.array = np.lib.stride_tricks.as_strided(elements, shape, byte_strides)
        parts = elements if kind == "bool" else elements.view(get_dtype(get_component(kind)))
        self.elements = DeviceBuffer(as_tensor(parts), tuple(strides))

    def copy_untouched(self):
        """Return a copy of the memory that has the known pattern in the array too."""
        before = self.all.copy()
        self.array.view(f"V{self.dtype.itemsize}")[...] = bytes([0xA5] * self.dtype.itemsize)
        outside, self.all[...] = self.all.copy(), before
        return outside


def get_strides(shape, order=None, step=1, gap=0):
    """Return strides in an order of axes in memory, outermost first, with gaps between them."""
    strides = [0] * len(shape)
    stride = step
    for axis in reversed(order or range(len(shape))):
        strides[axis] = stride
        stride = stride * shape[axis] + gap
    return tuple(strides)


def number_to_tensor(number):
    return as_tensor(np.array([number % 2**64], np.uint64).view(np.int64))


def key_to_tensor(key):
    return as_tensor(np.array(key.words, np.int64))


def check(
    shape, kind="float32", p=0.3, *, key=KEY, x_strides=None, y_strides=None, in_memory=False,
    in_place=False, seed=0, **options,
):  # fmt: skip
    """Compare the output of the kernels with NumPy's operations, and the memory around it."""
    x_strides = x_strides or get_strides(shape)
    window = Window.from_args(shape, **options)
    source = Memory(shape, x_strides, kind)
    source.array[...] = make_array(shape, kind, seed)
    original = np.array(source.array, order="C")
    target = source if in_place else Memory(shape, y_strides or x_strides, kind)
    base = window.whole.base
    kernels.dropout(
        source.elements,
        target.elements,
        kind,
        tuple(shape),
        window.strides,
        Rate.from_p(p),
        key_to_tensor(key) if in_memory else key.words,
        number_to_tensor(base) if in_memory else base,
    )
    with unidrop.force_path("portable"), np.errstate(all="ignore"):
        if kind == "bool":
            mask = unidrop.keep_mask(shape, p, key, **options)
            expected = np.broadcast_to(mask, shape)
        else:
            expected = unidrop.dropout(original, p, key, **options)
    assert get_bits(target.array).tolist() == get_bits(expected).tolist()
    assert (target.copy_untouched() == 0xA5).all(), "a kernel wrote outside of the array"


# --- Contiguous arrays ----------------------------------------------------------------------------


SIZES = [1, 7, 8, 2047, 2048, 4099]


def add_flat(kind):
    def flat():
        for size in SIZES:
            check((size,), kind, seed=size)
        check((3, 5, 8), kind, in_place=kind != "bool")
        check((), kind)

    flat.__name__ = f"flat_{kind}"
    case(flat)


for name in (*KINDS, "bool"):
    add_flat(name)


@case
def rates():
    for p in RATES:
        for kind in ("float32", "bfloat16"):
            check((333,), kind, p)
        for kind in ("float64", "bool", "complex64"):
            check((33,), kind, p)


@case
def thresholds():
    from unidrop.philox import ODD_MULTIPLIER, philox

    lo, hi = KEY.words
    for i in (0, 1, 6, 13):
        word = philox((i // 8, 0, 0, 0), (lo, hi))[i // 2 % 4]
        u = word * ODD_MULTIPLIER % 2**32 if i % 2 else word
        for threshold, keeps in ((u, True), (u + 1, False)):
            mask = Memory((16,), (1,), "bool")
            rate = Rate.from_p(threshold / 2**32)
            kernels.dropout(mask.elements, mask.elements, "bool", (16,), (1,), rate, (lo, hi), 0)
            assert mask.array[i] == keeps, (i, threshold)


@case
def keys():
    for key in (Key(0), Key(2**31), Key(2**63 - 1), Key(2**63), Key(2**64 - 1)):
        check((77,), key=key)
        check((7, 9), "bool", key=key, x_strides=(1, 7))
        check((77,), key=key, in_memory=True)


def in_run(first, size, whole=2**64):
    """Return a run of elements of a long mask."""
    return {"shape": (size,), "global_shape": (whole,), "start": (first,)}


@case
def numbers_beyond_32_bits():
    for first in (2**34 + 8, 2**35 - 64, 2**63 - 8, 2**64 - 136):
        for kind in ("float32", "float16"):
            check(kind=kind, **in_run(first, 136))
    for first in (5, 2**31 - 3, 2**35 - 67, 2**63 - 9, 2**64 - 131):
        check(**in_run(first, 131))
        check(kind="bfloat16", in_memory=True, **in_run(first, 131))
    check(kind="float64", in_memory=True, **in_run(2**35 - 64, 136))


@case
def windows_with_large_strides():
    for shape, whole, start in (
        ((2, 3), (2, 2**63), (0, 2**63 - 3)),  # the mask's stride exceeds int64
        ((2, 21), (2, 2**63), (0, 2**62)),
        ((3, 5, 4), (3, 5, 2**60), (0, 0, 2**60 - 4)),
        ((2, 2, 2, 2), (2, 2**20, 2**21, 2**21), (0, 2**19, 2**20, 2**21 - 2)),
        ((5, 1), (2**60, 9), (2**59, 3)),  # no axis with stride 1
        ((5, 1, 3), (2**50, 9, 8), (2**49, 8, 2)),
    ):
        for in_memory in (False, True):
            check(shape, global_shape=whole, start=start, in_memory=in_memory)


# --- Layouts --------------------------------------------------------------------------------------


def add_layouts(kind):
    def layouts():
        check((40, 24), kind, x_strides=(1, 40))
        check((24, 40), kind, global_shape=(24, 80), start=(0, 40))
        check((5, 33), kind, global_shape=(9, 40), start=(3, 6))
        check((3, 4, 9, 8), kind, x_strides=get_strides((3, 4, 9, 8), (0, 2, 1, 3)))
        check((3, 17, 16), kind, broadcast_axes=(0,))
        check((4, 20, 30), kind, broadcast_axes=(2,))
        check(
            (5, 3, 4, 6),
            kind,
            broadcast_axes=(2, 3),
            x_strides=get_strides((5, 3, 4, 6), (0, 2, 3, 1)),
        )
        check((6, 31), kind, x_strides=(64, 2))
        check((13, 11), kind, in_memory=True)

    layouts.__name__ = f"layouts_{kind}"
    case(layouts)


for name in ("bfloat16", "float32", "float64", "complex64", "bool"):
    add_layouts(name)


@case
def random_layouts():
    rng = np.random.default_rng(0)
    for seed in range(20):
        ndim = int(rng.integers(1, 5))
        most = (0, 600, 60, 9, 4)[ndim]
        shape = tuple(int(n) for n in rng.integers(1, most, ndim, endpoint=True))
        order = tuple(int(i) for i in rng.permutation(ndim))
        axes = tuple(i for i in range(ndim) if rng.integers(4) == 0)
        more = [int(rng.choice([0, 0, 3, 8, 2**20])) for _ in shape]
        start = tuple(int(rng.integers(0, m + 1)) for m in more)
        options = {"global_shape": tuple(n + m for n, m in zip(shape, more, strict=True))}
        strides = get_strides(shape, order, int(rng.integers(1, 3)), int(rng.choice([0, 0, 8, 5])))
        check(
            shape,
            str(rng.choice([*KINDS, "bool"])),
            x_strides=strides,
            in_place=bool(rng.integers(2)),
            in_memory=bool(rng.integers(2)),
            seed=seed,
            broadcast_axes=axes,
            start=start,
            **options,
        )


@case
def different_strides():
    shape = (3, 24, 16)
    for kind, axes in (("float32", ()), ("bfloat16", ()), ("float32", (0,)), ("bfloat16", (2,))):
        order, other = get_strides(shape), get_strides(shape, (2, 0, 1))
        for x_strides, y_strides in (
            *((order, other), (other, order)),
            *(((0, 16, 1), order), ((16, 0, 1), other), ((1, 1, 0), order)),
        ):
            check(shape, kind, x_strides=x_strides, y_strides=y_strides, broadcast_axes=axes)


@case
def many_axes():
    shape = (2, 1, 2, 3, 2, 2, 2)
    whole = tuple(n + 1 for n in shape)
    strides = get_strides(shape, gap=1)  # no two axes can be joined
    check(shape, x_strides=strides, broadcast_axes=(0, 3), in_memory=True)
    strides = get_strides(shape, (6, 4, 2, 0, 1, 3, 5), gap=1)
    check(shape, "bfloat16", x_strides=strides, global_shape=whole, start=(1, 0, 1, 0, 1, 0, 1))
    check((1,) * 60 + (3, 1, 5), x_strides=(1,) * 60 + (5, 1, 1))


@case
def several_programs_along_each_axis():
    """Every axis of a grid may number the tiles of columns, of rows or the outer axes."""
    check((3, 2100), x_strides=(2200, 1), global_shape=(3, 9000), start=(0, 6))
    check((600, 3, 8), x_strides=(40, 12, 1))
    check((70, 2, 65), x_strides=get_strides((70, 2, 65), (1, 2, 0)))
    check((3, 40, 70), x_strides=(2800, 1, 40))
    check((2, 3, 300, 16), x_strides=get_strides((2, 3, 300, 16), (0, 2, 1, 3)))


@case
def loops_where_a_grid_is_too_large():
    with_limit(2, lambda: check((5, 90, 6, 8), x_strides=get_strides((5, 90, 6, 8), gap=3)))


def with_limit(limit, function):
    """Call a function while the second and third axis of a grid are short."""
    most, layout._MAX_GRID = layout._MAX_GRID, limit
    forget()
    try:
        function()
    finally:
        layout._MAX_GRID = most
        forget()


@case
def distances_beyond_32_bits():
    is_wide, layout._is_wide = layout._is_wide, lambda *arguments: True
    forget()
    try:
        check((9, 30), x_strides=(40, 1), global_shape=(9, 33), start=(0, 1))
        check((40, 24), "float16", x_strides=(1, 40))
        check((16, 24), "float32", x_strides=(32, 1))
        check((4, 20, 30), "bool", broadcast_axes=(2,))
    finally:
        layout._is_wide = is_wide
        forget()


def forget():
    layout.choose_layout.cache_clear()
    kernels.launch._prepare.cache_clear()


# --- Golden vectors -------------------------------------------------------------------------------


def read_vectors(section):
    text = resources.files("unidrop.conformance").joinpath("vectors/vectors.json").read_text()
    return json.loads(text)[section]


@case
def golden_masks():
    for vector in read_vectors("masks"):
        p, shape = float(vector["p"]), vector["shape"]
        rate = Rate.from_p(p)
        if 0 in shape or rate.keeps_nothing or p == 0:
            continue
        if vector["name"].startswith("seed-"):  # golden_keys checks these
            continue
        options = {n: vector[n] for n in ("broadcast_axes", "global_shape", "start")}
        window = Window.from_args(shape, **options)
        mask = Memory(window.shape, get_strides(window.shape), "bool")
        kernels.dropout(
            mask.elements, mask.elements, "bool", window.shape, window.strides, rate,
            Key(int(vector["key"], 16)).words, window.whole.base,
        )  # fmt: skip
        actual = "".join(map(str, mask.array.astype(int).reshape(-1)))
        assert actual == vector["keep"], vector["name"]


@case
def golden_outputs():
    for vector in read_vectors("outputs"):
        rate, kind = Rate.from_p(float(vector["p"])), vector["dtype"]
        if rate.keeps_nothing or rate.p == 0:
            continue
        shape = tuple(vector["shape"])
        source, target = (Memory(shape, get_strides(shape), kind) for _ in range(2))
        part = get_dtype(get_component(kind))
        bits, expected = (
            np.array([int(b, 16) for b in vector[name]], f"u{part.itemsize}") for name in "xy"
        )
        source.array[...] = bits.view(get_dtype(kind)).reshape(shape)
        key = Key(int(vector["key"], 16))
        kernels.dropout(
            source.elements, target.elements, kind, shape, get_strides(shape), rate, key.words, 0
        )
        expected = expected.view(get_dtype(kind))
        assert get_bits(target.array).tolist() == get_bits(expected).tolist(), vector["name"]


@case
def golden_keys():
    for vector in read_vectors("keys"):
        key = as_tensor(np.zeros(2, np.int64))
        number = int(vector["seed"], 16)
        key[0], key[1] = number % 2**32, number >> 32
        for item in vector["fold_in"]:
            if "str" in item:
                data, tag = unidrop.key.string_data(item["str"]), 2
            else:
                data, tag = int(item["int"], 16), 1
            kernels.fold_in(key, number_to_tensor(data), tag, key)
        assert int(key[1]) << 32 | int(key[0]) == int(vector["key"], 16), vector


# --- Keys -----------------------------------------------------------------------------------------


NUMBERS = [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**62]


@case
def call_numbers():
    for number in NUMBERS:
        for key in (KEY.words, key_to_tensor(KEY)):
            calls = np.array([number, ~number])
            out = np.full(5, 99)
            kernels.next_key(as_tensor(calls), key, as_tensor(out[1:4]))
            assert calls.tolist() == [number + 1, ~(number + 1)]
            assert out.tolist() == [99, *KEY.fold_in(number).words, number, 99]


@case
def batches_of_call_numbers():
    keys = [KEY.fold_in(name) for name in NUMBERS]
    several = as_tensor(np.array([key.words for key in keys], np.int64))
    for key, stride in ((KEY.words, 0), (key_to_tensor(KEY), 0), (several, 2)):
        calls = np.array([(n, ~n) for n in NUMBERS])
        out = np.zeros((len(NUMBERS), 3), np.int64)
        kernels.next_key(as_tensor(calls), key, as_tensor(out), len(NUMBERS), key_stride=stride)
        assert calls.tolist() == [[n + 1, ~(n + 1)] for n in NUMBERS]
        of_each = keys if stride else itertools.repeat(KEY)
        pairs = zip(NUMBERS, of_each, strict=bool(stride))
        assert out.tolist() == [[*key.fold_in(n).words, n] for n, key in pairs]


@case
def damaged_call_numbers():
    for number, check_number in ((5, 5), (0, 0), (-3, 7), (2**63 - 1, -(2**63))):
        calls = np.array([number, check_number])
        was_damaged = check_number != ~number
        kernels.next_key(as_tensor(calls), KEY.words, as_tensor(np.zeros(3, np.int64)))
        assert (calls[1] != ~calls[0]) == was_damaged


@case
def folded_integers():
    for data in (*NUMBERS, 2**63, 2**64 - 1):
        for key in (KEY.words, key_to_tensor(KEY)):
            out = np.zeros(2, np.int64)
            kernels.fold_in(key, number_to_tensor(data), 1, as_tensor(out))
            assert tuple(out.tolist()) == KEY.fold_in(data).words


# --- The program ----------------------------------------------------------------------------------


def round_bfloat16(interpreter):
    """Make the interpreter convert float32 and bfloat16 as a GPU does: it truncates, for one."""
    import triton.language as tl

    convert = interpreter._convert_float

    def convert_float(values, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.view(np.uint16).astype(np.uint32) << np.uint32(16)
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        bits = values.view(np.uint32)
        nearest = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(is_nan, 0x7FC0, nearest).astype(np.uint16)

    assert list(inspect.signature(convert).parameters)[1:3] == ["input_dtype", "output_dtype"]
    interpreter._convert_float = convert_float


def main(names):
    """Run cases and print their results."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    import triton.runtime.interpreter

    round_bfloat16(triton.runtime.interpreter)
    for name in names or CASES:
        try:
            # NaN as input is a warning of NumPy, and so is an overflow to infinity.
            with np.errstate(all="ignore"):
                CASES[name]()
        except Exception:
            print(json.dumps([name, traceback.format_exc()]), flush=True)
        else:
            print(json.dumps([name, None]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
