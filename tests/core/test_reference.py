"""Tests of the reference itself, and of the golden vectors that are built from it."""

import json
import math
from fractions import Fraction
from itertools import chain, product
from typing import Any

import make_golden
import ml_dtypes
import numpy as np
import pytest
import reference
from make_golden import GOLDEN

KEY = 0x4569F48A8D0F18C9  # Key(42).fold_in("encoder/0").fold_in(7)
RATES = [0.001, 0.1, 1 / 3, 0.5, 0.9, 0.999, 1 - 2.0**-30]

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def words(text: str) -> list[int]:
    """Return the 32-bit words of a line of hexadecimal."""
    return [int(word, 16) for word in text.split()]


def golden() -> dict[str, Any]:
    """Return the committed vectors."""
    return json.loads(GOLDEN.read_text(encoding="ascii"))


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_gives_known_answers_of_random123(counter, key, answer):
    """They pin the rounds, the multipliers and the order of the words."""
    assert list(reference.philox(words(counter), words(key))) == words(answer)


def test_gives_keys_of_specification_in_reference():
    """They pin both tags, the digest and its byte order, and the upper half of seeds and data."""
    assert reference.fold_in(reference.fold_in(42, "encoder/0"), 7) == KEY
    assert reference.fold_in(0, "") == 0x916CF6162038707F
    assert reference.fold_in(2**64 - 1, 2**64 - 1) == 0xA1951B70D619276D


@pytest.mark.parametrize("data", [True, 1.0, None])
def test_rejects_data_of_other_types(data):
    """A bool is an integer to Python, but not here."""
    with pytest.raises(TypeError):
        reference.fold_in(0, data)


@pytest.mark.parametrize("data", [-1, 2**64, "\ud800"])
def test_rejects_data_without_number(data):
    """Nothing wraps, and a lone surrogate has no UTF-8 bytes."""
    with pytest.raises(ValueError, match=r"in \[0, 2\*\*64\)|surrogates"):
        reference.fold_in(0, data)


@pytest.mark.parametrize(
    ("first", "answer"),
    [
        (0, "82594d58 75079bb8 14b29c17 b8a0e413 e5503b6b 2c60b437 59571dcc bee4ed7c"),
        (2**35, "82244d05 fcad0ff9 e37313b7 0ff4b633 93f587cb 20173617 492d5fa5 60990919"),
    ],
)
def test_gives_u_of_specification(first, answer):
    """The second block is the first whose number needs the counter's second word."""
    assert [reference.u(KEY, first + j) for j in range(8)] == words(answer)


def test_gives_decisions_of_specification():
    """One block decides eight elements; these are three."""
    keep = reference.keep_mask([24], 0.5, KEY)
    assert "".join(map(str, keep)) == "100110011000101101101100"


@pytest.mark.parametrize(
    ("p", "t"),
    [
        (0, 0),
        (2.0**-33, 0),
        (3 * 2.0**-33, 2),
        (5 * 2.0**-33, 2),
        (2.0**-32, 1),
        (0.1, 429496730),
        (0.5, 2**31),
        (1 - 2.0**-33, 2**32),
        (math.nextafter(1, 0), 2**32),
        (1, 2**32),
    ],
)
def test_rounds_threshold_half_to_even(p, t):
    """T is p in units of 2**-32."""
    assert reference.threshold(p) == t


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_rejects_threshold_of_no_probability(p):
    """NaN is in no interval."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        reference.threshold(p)


def test_numbers_broadcast_masks_by_their_own_shape():
    """The array's lengths along the broadcast axes do not matter."""
    keep = reference.keep_mask([3, 5, 7, 2], 0.5, KEY, broadcast_axes=[1, -1])
    assert reference.mask_shape([3, 5, 7, 2], [1, -1]) == (3, 1, 7, 1)
    assert keep == reference.keep_mask([21], 0.5, KEY)


@pytest.mark.parametrize(
    ("whole", "tile", "axes"),
    [
        ([100], [7], []),
        ([5, 64], [2, 24], []),
        ([6, 37], [4, 5], []),
        ([6, 37], [1, 1], []),
        ([4, 7, 11], [3, 2, 4], []),
        ([4, 7, 11], [3, 2, 4], [1]),
        ([4, 7, 11], [3, 2, 4], [0, 2]),
    ],
)
def test_tiles_whole_with_windows(whole, tile, axes):
    """Blocks of unequal sizes, put where they begin, give the mask of the whole array."""
    shape = reference.mask_shape(whole, axes)
    expected = np.reshape(reference.keep_mask(whole, 0.5, KEY, broadcast_axes=axes), shape)
    tiled = np.full(shape, -1)
    steps = [range(0, length, size) for length, size in zip(whole, tile, strict=True)]
    for start in product(*steps):
        block = [
            min(size, length - first)
            for first, length, size in zip(start, whole, tile, strict=True)
        ]
        keep = reference.keep_mask(
            block, 0.5, KEY, broadcast_axes=axes, global_shape=whole, start=start
        )
        where = tuple(
            slice(None) if axis in axes else slice(first, first + size)
            for axis, (first, size) in enumerate(zip(start, block, strict=True))
        )
        tiled[where] = np.reshape(keep, reference.mask_shape(block, axes))
    np.testing.assert_array_equal(tiled, expected)


def test_rejects_window_that_leaves_whole():
    """It would hold decisions of other rows."""
    with pytest.raises(ValueError, match="axis 1"):
        reference.keep_mask([1, 2], 0.5, KEY, global_shape=[4, 5], start=[0, 4])


def random_patterns(dtype: np.dtype[Any], size: int) -> np.ndarray[Any, Any]:
    """Return random patterns, a third of them with the smallest or the largest exponents."""
    bits = 8 * dtype.itemsize
    patterns = np.random.default_rng(0).integers(0, 2**bits, size, np.uint64, endpoint=False)
    fmt = reference.FORMATS[dtype.name]
    low, high = np.uint64(fmt.sign | 4 * fmt.normal - 1), np.uint64(fmt.infinity - 4 * fmt.normal)
    patterns[::6] &= low
    patterns[1::6] |= high
    patterns[:4] = [0, fmt.sign, fmt.infinity - 1, fmt.sign | fmt.infinity]
    return patterns.astype(f"u{dtype.itemsize}")


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rounds_exactly_as_numpy_does(dtype, p):
    """Products in the compute type and casts follow IEEE 754, subnormals included."""
    patterns = random_patterns(dtype, 3000)
    compute = np.result_type(dtype, np.float32)
    with np.errstate(all="ignore"):
        scaled = patterns.view(dtype).astype(compute) * compute.type(reference.scale(p))
        expected = scaled.astype(dtype)
    result = reference.dropout_bits(patterns.tolist(), dtype.name, [1] * len(patterns), p)
    actual = np.array(result, patterns.dtype).view(dtype)
    nan = np.isnan(expected)
    assert nan.any()
    assert np.isinf(expected).any()
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(
        actual[~nan].view(patterns.dtype), expected[~nan].view(patterns.dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_inverts_decode_by_encode(dtype):
    """Every finite value of a format is its own nearest value."""
    fmt = reference.FORMATS[dtype.name]
    magnitudes = [x % fmt.sign for x in random_patterns(dtype, 3000).tolist()]
    finite = [x for x in magnitudes if x < fmt.infinity]
    assert [fmt.encode(fmt.decode(x)) for x in finite] == finite


def test_encodes_halfway_to_even_neighbor():
    """Halfway beyond the largest finite number is infinity, halfway below the smallest is 0."""
    fmt = reference.FORMATS["float16"]
    one, least = fmt.encode(Fraction(1)), fmt.decode(1)
    assert fmt.encode(1 + Fraction(1, 2**11)) == one
    assert fmt.encode(1 + Fraction(3, 2**11)) == one + 2
    assert fmt.encode(Fraction(65520)) == fmt.infinity
    assert fmt.encode(Fraction(65520) - Fraction(1, 2**20)) == fmt.infinity - 1
    assert fmt.encode(least / 2) == 0
    assert fmt.encode(least * 3 / 2) == 2


def test_drops_complex_numbers_whole():
    """A complex product would make NaN of an infinite component's neighbor."""
    inf, one, two, minus_zero = 0x7F800000, 0x3F800000, 0x40000000, 0x80000000
    x = [inf, one, one, one, one, minus_zero]
    y = reference.dropout_bits(x, "complex64", [1, 0, 1], 0.5)
    assert y == [inf, two, 0, 0, two, minus_zero]


def test_returns_x_at_rate_0_and_zeros_at_rate_1():
    """Neither forms a product: the NaN keeps its payload."""
    x = [0xFFFF, 0x7C00, 0x8001]
    assert reference.dropout_bits(x, "float16", [1, 1, 1], 0) == x
    assert reference.dropout_bits(x, "float16", [0, 0, 0], 1) == [0, 0, 0]


def test_commits_golden_file_that_tool_builds():
    """Run tools/make_golden.py where this fails, unless a bit of the stream changed."""
    assert GOLDEN.read_text(encoding="ascii") == make_golden.build()


def test_names_each_golden_vector_once():
    """A failure names its vector."""
    names = [vector["name"] for vector in golden()["masks"] + golden()["outputs"]]
    assert len(set(names)) == len(names)


def test_keeps_golden_integers_exact_in_any_json_reader():
    """Beyond 2**53 a reader whose only numbers are doubles would round them."""
    for vector in golden()["masks"]:
        lists = [vector[name] or [] for name in ("shape", "global_shape", "start", "mask_shape")]
        assert all(0 <= n < 2**53 for n in [vector["step"], *chain(*lists)])


@pytest.mark.parametrize(
    ("relation", "decisions"),
    [("equals-u", {"1"}), ("is-u-plus-1", {"0"}), ("half-above-u", {"0", "1"})],
)
def test_decides_even_and_odd_elements_by_golden_thresholds(relation, decisions):
    """T = u keeps, T = u + 1 drops, and halfway between the two both occur."""
    seen = {"even": set(), "odd": set()}
    for vector in golden()["masks"]:
        if vector["name"].startswith(f"threshold-{relation}"):
            _, parity, i = vector["name"].rsplit("-", 2)
            seen[parity].add(vector["keep"][int(i)])
    assert seen == {"even": decisions, "odd": decisions}


def test_separates_two_elements_by_golden_threshold():
    """Of the even one T is u + 1, and of the odd one u."""
    (vector,) = (v for v in golden()["masks"] if v["name"].startswith("threshold-between-"))
    even, odd = (int(part) for part in vector["name"].split("-") if part.isdigit())
    threshold = vector["p"] * 2**32
    key = int(vector["key"], 16)
    assert [reference.u(key, i) - threshold for i in (even, odd)] == [-1, 0]
    assert (vector["keep"][even], vector["keep"][odd]) == ("0", "1")
    assert even % 2 == 0
    assert odd % 2 == 1


def test_decides_middle_element_by_golden_extremes():
    """Their names say which u it has and whether it is kept."""
    extremes = [v for v in golden()["masks"] if v["name"].endswith(("-keeps", "-drops"))]
    assert len(extremes) == 12
    for vector in extremes:
        value = vector["name"].split("-u-")[1].split("-rate-")[0]
        assert int(vector["u"][2], 16) == {"0": 0, "1": 1, "2^32-1": 2**32 - 1}[value]
        assert vector["keep"][2] == str(int(vector["name"].endswith("-keeps")))


@pytest.mark.parametrize("dtype", [*reference.FORMATS, *reference.COMPONENTS])
@pytest.mark.parametrize("rate", ["0.5", "1/3"])
def test_keeps_and_drops_each_special_value_in_golden_outputs(dtype, rate):
    """In complex numbers either component does."""
    p = make_golden.RATES[rate]
    name = f"{dtype}-rate-{rate.replace('/', '-over-')}"
    (vector,) = [vector for vector in golden()["outputs"] if vector["name"] == name]
    width = len(vector["x"]) // len(vector["keep"])
    for component in range(width):
        x = [int(pattern, 16) for pattern in vector["x"][component::width]]
        seen = set(zip(x, vector["keep"], strict=True))
        assert set(product(make_golden.specials(dtype, p), "01")) <= seen


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("case", "scale_dtype"),
    [
        ("spread-over-8", None),
        ("halfway-rate-1-over-3", "float64"),
        ("halfway-rate-0.4", "float32"),
    ],
)
def test_shows_scale_that_is_not_float32_in_golden_outputs(dtype, case, scale_dtype):
    """A scale in x's dtype, one in float64 and an unrounded product each give other bits."""
    (vector,) = [v for v in golden()["outputs"] if v["name"] == f"{dtype}-{case}"]
    fmt, scale_fmt = reference.FORMATS[dtype], reference.FORMATS[scale_dtype or dtype]
    s = scale_fmt.decode(scale_fmt.encode(Fraction(reference.scale(vector["p"]))))
    wrong = 0
    for x, y, decision in zip(vector["x"], vector["y"], vector["keep"], strict=True):
        sign, magnitude = divmod(int(x, 16), fmt.sign)
        rounded_once = sign * fmt.sign + fmt.encode(fmt.decode(magnitude) * s)
        wrong += decision == "1" and rounded_once != int(y, 16)
    assert wrong > 0
