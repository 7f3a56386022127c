"""Embedding dropout: a look-up in the matrix after ordinary dropout of its rows."""

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

import unidrop
from unidrop import Key, keep_mask
from unidrop.family import embedding_dropout

KEY = Key(42).fold_in("words").fold_in(7)
W = np.random.default_rng(0).standard_normal((40, 6)).astype("float32")
INDICES = np.random.default_rng(1).integers(-40, 40, (5, 30))


@pytest.mark.parametrize("p", [0.3, 1])
@pytest.mark.parametrize(
    "dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64", "complex64"]
)
def test_looks_up_the_dropped_matrix(dtype, p):
    weight = W.astype(dtype)
    y, mask = embedding_dropout(weight, INDICES, p, KEY, return_mask=True)
    expected = unidrop.dropout(weight, p, KEY, broadcast_axes=(1,))[INDICES]
    assert y.tobytes() == expected.tobytes()
    assert np.array_equal(mask, keep_mask(W.shape, p, KEY, broadcast_axes=(1,)))


def test_multiplies_rows_that_it_looks_up_alone(monkeypatch):
    sizes = []
    select = unidrop.embedding.select

    def record(library, x, *rest):
        sizes.append(x.shape)
        return select(library, x, *rest)

    monkeypatch.setattr(unidrop.embedding, "select", record)
    embedding_dropout(np.ones((1000, 4)), np.array([7, 7, 999]), 0.5, KEY)
    assert sizes == [(3, 4)]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint64"])
def test_accepts_all_integers(dtype):
    weight = np.arange(1000.0)[:, None]
    indices = np.array([100, 3, 3, 0], dtype)
    if not dtype.startswith("u"):
        indices[1] = -3
    expected = unidrop.dropout(weight, 0.5, KEY, broadcast_axes=(1,))[indices]
    assert np.array_equal(embedding_dropout(weight, indices, 0.5, KEY), expected)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_looks_up_any_shape(shape):
    y = embedding_dropout(W, np.zeros(shape, int), 0.5, KEY)
    expected = unidrop.dropout(W, 0.5, KEY, broadcast_axes=(1,))[np.zeros(shape, int)]
    assert np.array_equal(y, expected)


def test_gives_rows_of_a_part_of_the_words():
    whole = embedding_dropout(W, np.arange(10, 30), 0.5, KEY)
    window = {"global_shape": W.shape, "start": (10, 0)}
    assert np.array_equal(embedding_dropout(W[10:30], np.arange(20), 0.5, KEY, **window), whole)


def test_drops_infinite_rows_to_zero():
    y, mask = embedding_dropout(np.full((64, 2), np.inf), np.arange(64), 0.5, KEY, return_mask=True)
    assert np.array_equal(y == 0, np.broadcast_to(~mask, y.shape))


def test_looks_up_all_words_without_dropping():
    for options in {"p": 0}, {"p": 0.5, "training": False}:
        y, mask = embedding_dropout(W, INDICES, **options, key=KEY, return_mask=True)
        assert np.array_equal(y, W[INDICES])
        assert mask.all()


def test_agrees_in_a_strict_library():
    expected = embedding_dropout(W, INDICES, 0.3, KEY)
    strict = array_api_strict.asarray
    y = embedding_dropout(strict(W), strict(INDICES), 0.3, KEY)
    assert np.array_equal(np.asarray(y), expected)


@pytest.mark.slow
def test_keeps_words_at_the_rate():
    y = embedding_dropout(np.ones((10**6, 1)), np.arange(10**6), 0.2, KEY)
    assert abs(y.mean() - 1) < 4 * np.sqrt(0.2 / 0.8 / 10**6)


@pytest.mark.parametrize(
    ("weight", "indices", "error", "message"),
    [
        (W[0], INDICES, ValueError, r"weight must have axes of words and features, got shape \(6,"),
        (W[None], INDICES, ValueError, "weight must have axes of words and features"),
        (W.astype(int), INDICES, TypeError, "weight must be"),
        (W, INDICES * 1.0, TypeError, "indices must be of an integer dtype, got float64"),
        (W, INDICES > 0, TypeError, "indices must be of an integer dtype, got bool"),
        (W, [1, 2], TypeError, "indices must be"),
        (W, np.array([40]), IndexError, "out of bounds"),
        (W, np.array([-41]), IndexError, "out of bounds"),
    ],
)
def test_raises_for_bad_input(weight, indices, error, message):
    with pytest.raises(error, match=message):
        embedding_dropout(weight, indices, 0.5, KEY)
