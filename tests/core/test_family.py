"""Members of the family: their masks are ordinary masks, and their outputs follow the formulas."""

import math
from functools import partial

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from unidrop import Key, keep_mask
from unidrop.family import (
    alpha_dropout,
    drop_key,
    drop_path,
    feature_alpha_dropout,
    locked_dropout,
)

KEY = Key(42).fold_in("encoder/0").fold_in(7)
X = (3 * np.random.default_rng(0).standard_normal((16, 6, 9))).astype("float32")
DTYPES = ["float16", ml_dtypes.bfloat16, "float32", "float64"]
LIMIT = 1.7580993408473766  # of SELU at minus infinity, without its sign


def alpha_by_steps(x, p, mask):
    """Return alpha dropout, rounded after each operation, as in the specification."""
    compute = np.float64 if x.dtype == np.float64 else np.float32
    a = 1 / math.sqrt((1 - p) * (1 + p * LIMIT * LIMIT))
    kept = (x.astype(compute) + compute(LIMIT * p)) * compute(a)
    dropped = compute(-LIMIT * (1 - p) * a)
    return np.where(mask, kept + compute(0), dropped).astype(x.dtype)


LOCKED = partial(locked_dropout, axis=1)
MEMBERS = {
    "alpha": (alpha_dropout, ()),
    "feature alpha": (feature_alpha_dropout, (2,)),
    "path": (drop_path, (1, 2)),
    "key": (drop_key, ()),
    "locked": (LOCKED, (1,)),
}
members = pytest.mark.parametrize(("member", "axes"), MEMBERS.values(), ids=MEMBERS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_rounds_alpha_dropout_after_each_operation(dtype, p):
    x = X.astype(dtype)
    expected = alpha_by_steps(x, p, keep_mask(x.shape, p, KEY))
    assert alpha_dropout(x, p, KEY).tobytes() == expected.tobytes()
    mask = keep_mask(x.shape, p, KEY, broadcast_axes=(2,))
    expected = alpha_by_steps(x, p, mask)
    assert feature_alpha_dropout(x, p, KEY).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_drops_whole_examples(dtype, scale_by_keep):
    x = X.astype(dtype)
    compute = np.float64 if dtype == "float64" else np.float32
    scale = compute(1 / (1 - 0.3) if scale_by_keep else 1)
    mask = keep_mask(x.shape, 0.3, KEY, broadcast_axes=(1, 2))
    expected = np.where(mask, x.astype(compute) * scale, compute(0)).astype(dtype)
    y = drop_path(x, 0.3, KEY, scale_by_keep=scale_by_keep)
    assert y.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_drops_scores_to_minus_infinity(dtype):
    x = X.astype(dtype)
    mask = keep_mask(x.shape, 0.3, KEY, broadcast_axes=(1,))
    y = drop_key(x, 0.3, KEY, broadcast_axes=(1,))
    assert y.tobytes() == np.where(mask, x, x.dtype.type(-np.inf)).tobytes()


def test_drops_every_kind_of_score_without_nan():
    x = np.array([np.nan, np.inf, -np.inf, 1.0])
    assert np.array_equal(drop_key(x, 1, KEY), np.full(4, -np.inf))
    y, mask = drop_key(np.full(64, np.nan), 0.5, KEY, return_mask=True)
    assert np.array_equal(np.isnan(y), mask)
    y, mask = drop_key(np.full(64, -np.inf), 0.5, KEY, return_mask=True)
    assert mask.any()
    assert np.isneginf(y).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_shares_one_mask_over_time(dtype, axis):
    x = X.astype(dtype)
    y, mask = locked_dropout(x, 0.3, KEY, axis=axis, return_mask=True)
    compute = np.float64 if dtype == "float64" else np.float32
    steps = x.astype(compute) * compute(1 / (1 - 0.3))
    one_step = keep_mask(np.take(x, [0], axis).shape, 0.3, KEY)
    assert np.array_equal(mask, one_step)
    assert y.tobytes() == np.where(one_step, steps, compute(0)).astype(dtype).tobytes()


def test_drops_batches_by_one_decision():
    for step in range(8):
        y, mask = drop_path(X, 0.5, KEY.fold_in(step), mode="batch", return_mask=True)
        assert mask.shape == (1, 1, 1)
        assert np.array_equal(y, X * 2 if mask else X * 0)


@members
def test_gives_blocks_of_the_whole(member, axes):
    whole, mask = member(X, 0.4, KEY, return_mask=True)
    for i in range(0, 16, 4):
        window = {"global_shape": X.shape, "start": (i, 0, 0)}
        block, part = member(X[i : i + 4], 0.4, KEY, **window, return_mask=True)
        assert np.array_equal(block, whole[i : i + 4])
        assert np.array_equal(part, mask[i : i + 4])


@members
def test_returns_the_ordinary_mask(member, axes):
    _, mask = member(X, 0.4, KEY, return_mask=True)
    assert np.array_equal(mask, keep_mask(X.shape, 0.4, KEY, broadcast_axes=axes))


@members
def test_is_the_identity_without_dropping(member, axes):
    assert member(X, 0, KEY) is X
    assert member(X, 0.5, KEY, training=False) is X


@pytest.mark.parametrize("member", [alpha_dropout, feature_alpha_dropout, drop_path, LOCKED])
def test_gives_zeros_at_rate_one(member):
    x = np.array([[[1.0, np.inf, np.nan]]])
    assert np.array_equal(member(x, 1, KEY), np.zeros_like(x))


def test_zeros_infinite_values_that_it_drops():
    y, mask = drop_path(np.full((64, 2), np.inf), 0.5, KEY, return_mask=True)
    assert np.array_equal(y == 0, np.broadcast_to(~mask, y.shape))
    assert not np.isnan(y).any()


def test_drops_at_small_rates_in_narrow_dtypes():
    y = drop_path(np.ones((100_000, 1), ml_dtypes.bfloat16), 0.001, KEY)
    assert 60 < np.count_nonzero(y == 0) < 140  # 100 on average, 10 standard deviation


@members
def test_serves_every_library_of_the_standard(member, axes):
    y = member(array_api_strict.asarray(X), 0.3, KEY)
    assert np.array_equal(np.asarray(y), member(X, 0.3, KEY))


@members
@pytest.mark.parametrize(
    ("x", "p", "error", "message"),
    [
        (X, 1.5, ValueError, r"dropout probability p .* 1\.5"),
        (X, np.float32(0.5), TypeError, "dropout probability p must be a Python int or float"),
        (np.ones((2, 3), int), 0.5, TypeError, "x must be of a floating-point dtype"),
        ([[[1.0]]], 0.5, TypeError, "x must be an array"),
    ],
    ids=["rate", "array", "integers", "list"],
)
def test_refuses_bad_arguments(member, axes, x, p, error, message):
    with pytest.raises(error, match=message):
        member(x, p, KEY)


def test_refuses_arrays_without_the_axes():
    with pytest.raises(ValueError, match=r"x must have an axis of rows for drop_path, got shape"):
        drop_path(np.ones(()), 0.5, KEY)
    with pytest.raises(ValueError, match=r"x must have axes of rows and channels"):
        feature_alpha_dropout(np.ones(3), 0.5, KEY)


def test_refuses_axes_that_do_not_exist():
    with pytest.raises(ValueError, match=r"axis must be an axis of an array of shape .*, got 3"):
        locked_dropout(X, 0.5, KEY, axis=3)
    for axis in (True, 1.0, (1,)):
        with pytest.raises(TypeError, match="axis must be an integer, got"):
            locked_dropout(X, 0.5, KEY, axis=axis)


def test_refuses_other_modes():
    with pytest.raises(ValueError, match=r"mode must be 'row' or 'batch', got 'column'"):
        drop_path(X, 0.5, KEY, mode="column")


def test_refuses_complex_numbers():
    with pytest.raises(TypeError, match=r"x must be of a real dtype for alpha dropout"):
        alpha_dropout(np.ones(3, complex), 0.5, KEY)
    with pytest.raises(TypeError, match=r"x must be of a real dtype for drop_key, got complex"):
        drop_key(np.ones(3, complex), 0.5, KEY)
