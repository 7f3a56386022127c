"""DropHead: ordinary dropout with one decision for each head of each example."""

import ml_dtypes
import numpy as np
import pytest

from unidrop import Key, keep_mask
from unidrop.family import drop_head

KEY = Key(42).fold_in("encoder/0").fold_in(7)
X = (3 * np.random.default_rng(0).standard_normal((6, 5, 4, 3))).astype("float32")


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64"])
@pytest.mark.parametrize(
    ("axis", "shared"), [(1, (2, 3)), (-2, (1, 3)), (2, (1, 3)), (0, (1, 2, 3))]
)
def test_drops_whole_heads(dtype, axis, shared):
    x = X.astype(dtype)
    compute = np.float64 if dtype == "float64" else np.float32
    y, mask = drop_head(x, 0.3, KEY, axis=axis, return_mask=True)
    assert np.array_equal(mask, keep_mask(x.shape, 0.3, KEY, broadcast_axes=shared))
    expected = np.where(mask, x.astype(compute) * compute(1 / (1 - 0.3)), compute(0))
    assert y.tobytes() == expected.astype(dtype).tobytes()


def test_gives_heads_of_a_block():
    whole = drop_head(X, 0.5, KEY, axis=1)
    window = {"global_shape": X.shape, "start": (2, 1, 0, 0)}
    block = drop_head(X[2:4, 1:3], 0.5, KEY, axis=1, **window)
    assert np.array_equal(block, whole[2:4, 1:3])


def test_zeros_examples_that_lose_all_heads():
    y = drop_head(np.full((4, 2, 3, 3), np.inf), 1, KEY, axis=1)
    assert np.array_equal(y, np.zeros_like(y))


def test_is_the_identity_without_dropping():
    assert drop_head(X, 0, KEY, axis=1) is X
    assert drop_head(X, 0.5, KEY, axis=1, training=False) is X


@pytest.mark.slow
def test_keeps_heads_at_the_rate():
    x = np.ones((1000, 1000, 2))
    y = drop_head(x, 0.2, KEY, axis=1)
    assert abs(y[..., 0].mean() - 1) < 4 * np.sqrt(0.2 / 0.8 / 10**6)
    assert np.array_equal(y[..., 0], y[..., 1])


@pytest.mark.parametrize("axis", [4, -5])
def test_raises_for_an_axis_that_does_not_exist(axis):
    with pytest.raises(ValueError, match=rf"axis must be an axis of an array .*, got {axis}"):
        drop_head(X, 0.5, KEY, axis=axis)


@pytest.mark.parametrize("axis", [1.0, True, None, "1"])
def test_raises_unless_the_axis_is_an_integer(axis):
    with pytest.raises(TypeError, match="axis must be an integer"):
        drop_head(X, 0.5, KEY, axis=axis)
