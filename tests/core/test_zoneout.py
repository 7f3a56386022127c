"""Zoneout: a selection between two states by an ordinary mask, and its expectation."""

import ml_dtypes
import numpy as np
import pytest

from unidrop import Key, keep_mask
from unidrop.family import zoneout

KEY = Key(42).fold_in("encoder/0").fold_in(7)
P = 0.3
NEW, OLD = np.random.default_rng(0).standard_normal((2, 5, 6, 7)).astype("float32")
DTYPES = ["float16", ml_dtypes.bfloat16, "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_selects_states_by_the_ordinary_mask(dtype):
    new, old = NEW.astype(dtype), OLD.astype(dtype)
    y, mask = zoneout(new, old, P, KEY, return_mask=True)
    assert np.array_equal(mask, keep_mask(new.shape, P, KEY))
    assert y.tobytes() == np.where(mask, new, old).tobytes()
    assert zoneout(new, old, P, KEY).tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_returns_the_expectation_in_evaluation(dtype):
    new, old = NEW.astype(dtype), OLD.astype(dtype)
    compute = np.float64 if dtype == "float64" else np.float32
    expected = old.astype(compute) * compute(P) + new.astype(compute) * compute(1 - P)
    y = zoneout(new, old, P, KEY, training=False)
    assert y.tobytes() == expected.astype(dtype).tobytes()


def test_keeps_numbers_that_are_not_finite_apart():
    new = np.array([np.nan, 1.0] * 4)
    old = np.array([2.0, np.inf] * 4)
    y, mask = zoneout(new, old, 0.5, KEY, return_mask=True)
    assert np.array_equal(y, np.where(mask, new, old), equal_nan=True)
    expected = zoneout(new, old, 0.5, KEY, training=False)
    assert np.isnan(expected[::2]).all()
    assert np.isinf(expected[1::2]).all()


@pytest.mark.parametrize("training", [True, False])
def test_returns_one_state_at_the_ends(training):
    assert zoneout(NEW, OLD, 0, KEY, training=training) is NEW
    assert np.array_equal(zoneout(NEW, OLD, 1, KEY, training=training), OLD)


def test_gives_states_of_a_block():
    window = {"global_shape": NEW.shape, "start": (1, 2, 0)}
    block = zoneout(NEW[1:3, 2:], OLD[1:3, 2:], P, KEY, **window)
    assert np.array_equal(block, zoneout(NEW, OLD, P, KEY)[1:3, 2:])


@pytest.mark.slow
def test_keeps_old_states_at_the_rate():
    y = zoneout(np.zeros(10**6), np.ones(10**6), 0.2, KEY)
    assert abs(y.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 10**6)


@pytest.mark.parametrize(
    ("old", "error", "message"),
    [
        (OLD[:4], ValueError, r"old must be of the shape of new, \(5, 6, 7\), got \(4, 6, 7\)"),
        (OLD[:1], ValueError, "old must be of the shape of new"),
        (OLD[0], ValueError, "old must be of the shape of new"),
        (OLD.astype("float64"), TypeError, "old must be of the dtype of new, float32, got float64"),
        (OLD.tolist(), TypeError, "old"),
    ],
    ids=["length", "broadcast", "rank", "dtype", "list"],
)
def test_raises_for_states_that_differ(old, error, message):
    with pytest.raises(error, match=message):
        zoneout(NEW, old, P, KEY)


def test_raises_for_other_bad_arguments():
    with pytest.raises(TypeError, match="new must be of a real dtype for zoneout, got complex64"):
        zoneout(NEW.astype("complex64"), NEW.astype("complex64"), P, KEY)
    with pytest.raises(TypeError, match="new must be of a floating-point dtype"):
        zoneout(NEW.astype(int), OLD.astype(int), P, KEY)
    with pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
        zoneout(NEW, OLD, 1.5, KEY)
