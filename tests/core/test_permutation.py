"""Permutations of a key, and patch dropout: the specification, windows, statistics and errors."""

import array_api_strict
import numpy as np
import pytest

from unidrop import Key
from unidrop.family import patch_dropout, permutation
from unidrop.philox import philox

KEY = Key(42).fold_in("encoder/0").fold_in(7)
X = np.random.default_rng(0).standard_normal((5, 17, 3)).astype("float32")


def compute_word(i):
    """Return word i of the numbering of permutations, by integers alone."""
    number = int(KEY)
    counter = (i // 4 % 2**32, i // 4 >> 32, 0, 4)
    return philox(counter, (number % 2**32, number >> 32))[i % 4]


def test_sorts_whole_words():
    words = [[compute_word(11 * row + i) for i in range(11)] for row in range(3)]
    expected = [sorted(range(11), key=row.__getitem__) for row in words]
    assert permutation((3, 11), KEY).tolist() == expected
    assert permutation((3, 1, 11), KEY).tolist() == [[row] for row in expected]


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0), (0, 4)])
def test_permutes_short_rows(shape):
    assert permutation(shape, KEY).shape == shape


def test_gives_permutations_of_a_part():
    whole = permutation((8, 9), KEY)
    part = permutation((3, 9), KEY, global_shape=(8, 9), start=(4, 0))
    assert np.array_equal(part, whole[4:7])
    with pytest.raises(ValueError, match="the window must not cut axis 1"):
        permutation((8, 3), KEY, global_shape=(8, 9), start=(0, 3))
    with pytest.raises(ValueError, match="shape must have an axis to permute"):
        permutation((), KEY)


@pytest.mark.slow
def test_has_all_permutations_equally_often():
    rows = permutation((120_000, 5), KEY)
    _, counts = np.unique(rows @ 5 ** np.arange(5), return_counts=True)
    assert counts.size == 120
    assert ((counts - 1000) ** 2 / 1000).sum() < 119 + 4 * np.sqrt(2 * 119)


@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("ordered", [True, False])
def test_keeps_the_first_tokens_of_permutations(prefix, ordered):
    options = {"num_prefix_tokens": prefix, "ordered": ordered, "return_indices": True}
    y, indices = patch_dropout(X, 0.4, KEY, **options)
    kept = int((17 - prefix) * 0.6)
    expected = permutation((5, 17 - prefix), KEY)[:, :kept]
    expected = np.sort(expected) if ordered else expected
    assert np.array_equal(indices, expected)
    assert np.array_equal(y[:, :prefix], X[:, :prefix])
    rows = np.arange(5)[:, None]
    assert y[:, prefix:].tobytes() == X[rows, prefix + indices].tobytes()


def test_keeps_one_token_at_least():
    assert patch_dropout(X, 0.999, KEY).shape == (5, 2, 3)
    assert patch_dropout(X[:, :1], 0.5, KEY).shape == (5, 1, 3)
    assert patch_dropout(X[:0], 0.4, KEY).shape == (0, 10, 3)


def test_returns_all_tokens_without_dropping():
    for options in ({"p": 0}, {"p": 0.5, "training": False}):
        y, indices = patch_dropout(X, key=KEY, return_indices=True, **options)
        assert y is X
        assert indices is None


def test_gives_tokens_of_a_part_of_the_batch():
    part = patch_dropout(X[2:4], 0.4, KEY, global_shape=X.shape, start=(2, 0, 0))
    assert np.array_equal(part, patch_dropout(X, 0.4, KEY)[2:4])
    with pytest.raises(ValueError, match="the window must not cut axis 1"):
        patch_dropout(X[:, 2:4], 0.4, KEY, global_shape=X.shape, start=(0, 2, 0))


@pytest.mark.slow
def test_keeps_each_token_equally_often():
    _, indices = patch_dropout(np.zeros((100_000, 11, 1)), 0.4, KEY, return_indices=True)
    counts = np.bincount(indices.reshape(-1), minlength=10)
    assert abs(counts - 60_000).max() < 4.5 * np.sqrt(100_000 * 0.24)


def test_removes_tokens_in_every_library_of_the_standard():
    y = patch_dropout(array_api_strict.asarray(X), 0.4, KEY)
    assert np.array_equal(np.asarray(y), patch_dropout(X, 0.4, KEY))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"p": 1}, ValueError, "dropout probability p must be below 1 for patch dropout, got 1"),
        ({"p": 1.5}, ValueError, r"dropout probability p .* 1\.5"),
        ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens must be at least 0, got -1"),
        ({"num_prefix_tokens": 18}, ValueError, "num_prefix_tokens must be at most the length"),
        ({"num_prefix_tokens": 1.0}, TypeError, "num_prefix_tokens"),
        ({"x": X[0, 0]}, ValueError, "x must have axes of rows and tokens, got shape"),
        ({"x": np.ones((2, 3), int)}, TypeError, "x must be of a floating-point dtype"),
    ],
)
def test_refuses_bad_arguments_of_patch_dropout(options, error, message):
    arguments = {"x": X, "p": 0.4, "key": KEY, **options}
    with pytest.raises(error, match=message):
        patch_dropout(**arguments)
