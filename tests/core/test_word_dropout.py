"""Word dropout: tokens replaced by an ordinary mask, in integers alone."""

import numpy as np
import pytest

from unidrop import Key, keep_mask
from unidrop.family import word_dropout

KEY = Key(42).fold_in("words").fold_in(7)
P = 0.3
X = np.random.default_rng(0).integers(0, 100, (7, 9))
INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_replaces_tokens_by_the_ordinary_mask(dtype):
    x, most = X.astype(dtype), np.iinfo(dtype).max
    y, mask = word_dropout(x, P, KEY, unk_id=int(most), return_mask=True)
    assert np.array_equal(mask, keep_mask(x.shape, P, KEY))
    assert y.dtype == dtype
    assert np.array_equal(y, np.where(mask, x, most))


def test_keeps_special_tokens():
    x = X % 5
    y, mask = word_dropout(x, P, KEY, unk_id=9, special_ids=[0, 3], return_mask=True)
    kept = keep_mask(x.shape, P, KEY)
    assert np.array_equal(mask, kept)
    assert np.array_equal(y, np.where(kept | (x == 0) | (x == 3), x, 9))


def test_replaces_all_tokens_or_none():
    assert word_dropout(X, 0, KEY, unk_id=1) is X
    assert word_dropout(X, 0.5, KEY, unk_id=1, training=False) is X
    y = word_dropout(X % 5, 1, KEY, unk_id=9, special_ids=(2,))
    assert np.array_equal(y, np.where(X % 5 == 2, 2, 9))
    assert word_dropout(X[:0], P, KEY, unk_id=1).shape == (0, 9)


def test_gives_tokens_of_a_block():
    block = word_dropout(X[2:4, 1:3], P, KEY, unk_id=1, global_shape=X.shape, start=(2, 1))
    assert np.array_equal(block, word_dropout(X, P, KEY, unk_id=1)[2:4, 1:3])


@pytest.mark.slow
def test_replaces_tokens_at_the_rate():
    y = word_dropout(np.zeros(10**6, "int8"), 0.2, KEY, unk_id=1)
    assert abs(y.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 10**6)


@pytest.mark.parametrize("dtype", ["float32", "bool", "complex64"])
def test_raises_unless_tokens_are_integers(dtype):
    with pytest.raises(TypeError, match=f"x must be of an integer dtype .*, got {dtype}"):
        word_dropout(X.astype(dtype), P, KEY, unk_id=1)


@pytest.mark.parametrize(
    ("dtype", "unk_id", "interval"),
    [("uint8", 256, r"\[0, 255\]"), ("uint8", -1, r"\[0, 255\]"), ("int8", 128, r"\[-128, 127\]")],
)
def test_raises_for_tokens_outside_the_dtype(dtype, unk_id, interval):
    with pytest.raises(ValueError, match=f"unk_id must be in {interval} for {dtype}, got {unk_id}"):
        word_dropout(X.astype(dtype), P, KEY, unk_id=unk_id)
    with pytest.raises(ValueError, match=f"special_ids must be in {interval}"):
        word_dropout(X.astype(dtype), P, KEY, unk_id=1, special_ids=(unk_id,))


@pytest.mark.parametrize("unk_id", [1.0, True, None, "1"])
def test_raises_for_tokens_that_are_not_integers(unk_id):
    with pytest.raises(TypeError, match="unk_id must be an integer, got"):
        word_dropout(X, P, KEY, unk_id=unk_id)
    with pytest.raises(TypeError, match="special_ids must"):
        word_dropout(X, P, KEY, unk_id=1, special_ids=unk_id)
