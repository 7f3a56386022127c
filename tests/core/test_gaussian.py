"""Normal deviates of a key and the members that use them: their bits, moments and errors."""

import hashlib
import math
from statistics import NormalDist

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from unidrop import Key
from unidrop.family import gaussian_dropout, gaussian_noise
from unidrop.normal import _make_tables
from unidrop.philox import philox

KEY = Key(42).fold_in("encoder/0").fold_in(7)
X = (3 * np.random.default_rng(0).standard_normal((16, 6, 9))).astype("float32")
NORMAL = NormalDist()
DTYPES = ["float16", ml_dtypes.bfloat16, "float32", "float64"]
MEMBERS = {"dropout": (gaussian_dropout, 0.3), "noise": (gaussian_noise, 0.37)}
members = pytest.mark.parametrize(("member", "value"), MEMBERS.values(), ids=MEMBERS)


def round_quantile(level, k):
    """Return an entry of the table of the specification."""
    u = (k * 2.0 ** (19 - 8 * level) + 0.5) / 2**32
    return round(-NORMAL.inv_cdf(min(u, 0.5)) * 2**21)


def compute_deviate(i, stddev):
    """Return deviate i of the key by integers alone, as in the specification."""
    number = int(KEY)
    counter = (i // 4 % 2**32, i // 4 >> 32, 0, 3)
    word = philox(counter, (number % 2**32, number >> 32))[i % 4]
    rank = word if word < 2**31 else 2**32 - 1 - word
    level = 0
    while level < 3 and rank < 2**23:
        rank, level = rank * 256, level + 1
    entry, rest = rank >> 19, (rank >> 3) % 2**16
    quantile = round_quantile(level, entry)
    quantile -= (quantile - round_quantile(level, entry + 1)) * rest >> 16
    fraction, exponent = math.frexp(stddev)
    size = quantile * math.floor(fraction * 2**32) >> 32
    return math.ldexp(size if word >= 2**31 else -size, exponent - 21)


@pytest.mark.parametrize("dtype", DTYPES)
def test_follows_the_specification_of_noise(dtype):
    x = X.reshape(-1)[:200].astype(dtype)
    compute = np.float64 if dtype == "float64" else np.float32
    noise = np.array([compute_deviate(i, 0.37) for i in range(200)], compute)
    expected = (x.astype(compute) + noise).astype(dtype)
    assert gaussian_noise(x, 0.37, KEY).tobytes() == expected.tobytes()
    stddev = math.sqrt(0.3 / (1 - 0.3))
    factor = np.array([compute_deviate(i, stddev) for i in range(200)], compute) + compute(1)
    expected = (x.astype(compute) * factor).astype(dtype)
    assert gaussian_dropout(x, 0.3, KEY).tobytes() == expected.tobytes()


def test_numbers_elements_beyond_32_bits():
    start = 2**35 + 3
    window = {"global_shape": (2**40,), "start": (start,)}
    y = gaussian_noise(np.zeros(9), 1.0, KEY, **window)
    assert y.tolist() == [compute_deviate(start + i, 1.0) for i in range(9)]


def test_has_the_table_of_the_specification():
    table, slopes = _make_tables()
    used = [
        number
        for level, first, step in ((0, 16, 1), (1, 16, 1), (2, 16, 1), (3, 0, 32))
        for k in range(level * 4096 + first, (level + 1) * 4096, step)
        for number in (int(table[k]), int(slopes[k]) if level < 3 else 0)
    ]
    digest = hashlib.blake2b(np.array(used, "<u4").tobytes(), digest_size=8).hexdigest()
    assert digest == "fc8cd29621a12d43"
    assert max(used) == 13291661


def test_interpolates_between_neighbors():
    table, slopes = (part.reshape(4, 4096) for part in _make_tables())
    for level in range(3):
        assert slopes[level, 16:].max() < 1 << 16
        assert np.array_equal(table[level, 16:-1] - table[level, 17:], slopes[level, 16:-1])
        assert table[level, 16] == table[level + 1, 0] - slopes[level + 1].sum()


@members
def test_gives_blocks_of_the_whole_noise(member, value):
    whole = member(X, value, KEY)
    for i, j, k in ((0, 0, 0), (3, 1, 2), (14, 2, 4)):
        window = {"global_shape": X.shape, "start": (i, j, k)}
        block = (slice(i, i + 2), slice(j, j + 4), slice(k, k + 5))
        assert np.array_equal(member(X[block], value, KEY, **window), whole[block])


@members
def test_shares_noise_along_axes(member, value):
    ones = np.ones_like(X)
    y = member(ones, value, KEY, broadcast_axes=(1,))
    assert np.array_equal(y, np.broadcast_to(y[:, :1], X.shape))
    assert np.array_equal(y[:, 0], member(ones[:, 0], value, KEY))


@members
def test_computes_large_noise_in_pieces(member, value):
    x = np.ones(600_001, "float32")
    y = member(x, value, KEY)
    last = member(x[-7:], value, KEY, global_shape=x.shape, start=(x.size - 7,))
    assert np.array_equal(y[-7:], last)


@members
def test_is_the_identity_without_noise(member, value):
    assert member(X, 0, KEY) is X
    assert member(X, value, KEY, training=False) is X
    assert member(X[:0], value, KEY).shape == (0, 6, 9)


@members
def test_differs_from_masks_and_from_other_keys(member, value):
    y = member(X, value, KEY)
    assert np.unique(y - X).size > 0.99 * X.size
    assert (member(X, value, KEY.fold_in(1)) != y).mean() > 0.99


def test_stays_finite_at_extreme_deviations():
    x = np.ones(1000, "float32")
    assert np.array_equal(gaussian_dropout(x, 5e-324, KEY), x)
    assert np.isfinite(gaussian_dropout(x, 1 - 2**-53, KEY)).all()
    large = gaussian_noise(np.zeros(1000, "float32"), 2.0**126, KEY)
    assert not np.isnan(large).any()
    assert np.array_equal(np.ldexp(large, -126), gaussian_noise(x * 0, 1.0, KEY))


@pytest.mark.slow
def test_has_the_moments_of_the_normal_distribution():
    z = gaussian_noise(np.zeros(4_000_000), 1.0, KEY)
    assert abs(z.mean()) < 4 / 2000
    assert abs(z.var() - 1) < 4 * math.sqrt(2) / 2000
    assert abs((z**3).mean()) < 4 * math.sqrt(15) / 2000
    assert abs((z**4).mean() / z.var() ** 2 - 3) < 0.01
    edges = [NORMAL.inv_cdf(i / 1000) for i in range(1, 1000)]
    shares = np.searchsorted(np.sort(z), edges) / z.size
    assert abs(shares - np.arange(1, 1000) / 1000).max() < 1.95 / 2000  # Kolmogorov, p = 0.001
    for least in (3, 4, 4.5):
        expected = 2 * NORMAL.cdf(-least) * z.size
        assert abs((abs(z) > least).sum() - expected) < 4 * math.sqrt(expected)
    lags = [np.mean(z[:-lag] * z[lag:]) for lag in range(1, 9)]
    assert max(map(abs, lags)) < 4.5 / 2000


def test_interpolates_quantiles_closely():
    words = np.unique(np.geomspace(1, 2**31 - 1, 20_000).astype(np.int64))
    table, slopes = _make_tables()
    rank, level = words.copy(), np.zeros_like(words)
    for _ in range(3):
        small = rank < 1 << 23
        rank, level = np.where(small, rank << 8, rank), level + small
    entry = (level << 12) + (rank >> 19)
    quantile = table[entry] - (slopes[entry] * ((rank >> 3) & 0xFFFF) >> 16)
    error = quantile / 2**21 + [NORMAL.inv_cdf((word + 0.5) / 2**32) for word in words.tolist()]
    assert abs(error).max() < 1.4e-4


@members
def test_serves_every_library_of_the_standard(member, value):
    y = member(array_api_strict.asarray(X), value, KEY)
    assert np.array_equal(np.asarray(y), member(X, value, KEY))


@members
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones((2, 3), int), TypeError, "x must be of a floating-point dtype"),
        (np.ones(3, complex), TypeError, r"x must be of a real dtype for Gaussian"),
    ],
    ids=["integers", "complex"],
)
def test_refuses_dtypes_without_noise(member, value, x, error, message):
    with pytest.raises(error, match=message):
        member(x, value, KEY)


@pytest.mark.parametrize("stddev", [-0.1, math.nan, math.inf, 2.0**127])
def test_refuses_deviations_outside_the_interval(stddev):
    with pytest.raises(ValueError, match=r"stddev must be at least 0 and below 2\*\*127, got"):
        gaussian_noise(X, stddev, KEY)


def test_refuses_deviations_whose_unit_is_subnormal():
    with pytest.raises(ValueError, match=r"stddev must be 0 or at least 2\*\*-100, got 1e-32"):
        gaussian_noise(X, 1e-32, KEY)
    assert gaussian_noise(X, 2.0**-100, KEY).shape == X.shape


@pytest.mark.parametrize("stddev", [True, "1", np.float32(0.5)])
def test_refuses_deviations_that_are_no_numbers(stddev):
    with pytest.raises(TypeError, match="stddev must be a Python int or float, got"):
        gaussian_noise(X, stddev, KEY)


def test_refuses_rates_without_a_variance():
    with pytest.raises(ValueError, match="the rate of Gaussian dropout must be below 1, got 1"):
        gaussian_dropout(X, 1.0, KEY)
    with pytest.raises(ValueError, match=r"dropout probability p .* 1\.5"):
        gaussian_dropout(X, 1.5, KEY)


@pytest.mark.parametrize(
    ("member", "value", "expected"),
    [
        (gaussian_dropout, 0.1, "3fb57956 bf5fbc04 3dffa91d 40906eaa"),
        (gaussian_dropout, 0.5, "40103600 bf1f3410 3e32b0e0 40e83c24"),
        (gaussian_noise, 0.1, "3f900acd bf84d700 3e32b0e2 4051724c"),
        (gaussian_noise, 1.0, "40103600 bfb065f8 3f5853ca 408e7422"),
    ],
)
def test_has_the_golden_noise_of_the_specification(member, value, expected):
    x = np.array([0x3F800000, 0xBF800000, 0x3DCCCCCD, 0x40490FDB], "uint32").view("float32")
    y = member(x, value, KEY).view("uint32")
    assert " ".join(f"{bits:08x}" for bits in y) == expected
