"""Tests of windows in the NumPy adapter: forward, backward, into out, and with a generator."""

import re

import numpy as np
import pytest

import unidrop
from unidrop import Key
from unidrop.adapters.numpy import dropout, dropout_backward

KEY = Key(42).fold_in("encoder/0").fold_in(7)
X = np.random.default_rng(0).standard_normal((3, 5, 4)).astype("float32")
WHOLE = {"global_shape": (9, 6, 8), "start": (4, 1, 3)}


def assert_bits(actual, expected):
    """Compare two arrays: shape, dtype and bits."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


@pytest.fixture(params=["fused", "portable"])
def path(request):
    """Force each path in turn."""
    with unidrop.force_path(request.param):
        yield


@pytest.mark.parametrize("axes", [(), (1,), (0, 2)], ids=str)
@pytest.mark.usefixtures("path")
def test_equals_block_of_the_whole(axes):
    whole = np.random.default_rng(1).standard_normal((9, 6, 8))
    block = whole[4:7, 1:6, 3:7]
    options = {"key": KEY, "broadcast_axes": axes, "return_mask": True}
    output, mask = dropout(block, 0.3, **options, **WHOLE)
    of_whole, mask_of_whole = dropout(whole, 0.3, **options)
    np.testing.assert_array_equal(output, of_whole[4:7, 1:6, 3:7], strict=True)
    starts = [0 if axis in axes else s for axis, s in enumerate(WHOLE["start"])]
    cut = tuple(slice(s, s + n) for s, n in zip(starts, mask.shape, strict=True))
    np.testing.assert_array_equal(mask, mask_of_whole[cut], strict=True)


@pytest.mark.parametrize("by", ["key", "mask"])
@pytest.mark.parametrize("axes", [(), (1,)], ids=str)
@pytest.mark.usefixtures("path")
def test_uses_mask_of_window_in_backward_pass(by, axes):
    options = {"broadcast_axes": axes, **WHOLE}
    _, mask = dropout(X, 0.3, key=KEY, return_mask=True, **options)
    given = {"key": KEY} if by == "key" else {"mask": mask}
    expected = unidrop.dropout(X, 0.3, KEY, **options)
    assert_bits(dropout_backward(X, 0.3, **given, **options), expected)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("function", [dropout, dropout_backward])
def test_writes_window_to_out(function):
    out = np.full_like(X, 7)
    assert function(X, 0.3, key=KEY, out=out, **WHOLE) is out
    assert_bits(out, unidrop.dropout(X, 0.3, KEY, **WHOLE))


def test_accepts_keep_prob_and_generator_with_window():
    key = Key(int(np.random.default_rng(5).integers(0, 2**64, dtype=np.uint64)))
    actual = dropout(X, keep_prob=0.75, rng=5, **WHOLE)
    assert_bits(actual, unidrop.dropout(X, 0.25, key, **WHOLE))


@pytest.mark.parametrize("options", [{"p": 0}, {"training": False}], ids=str)
@pytest.mark.parametrize("function", [dropout, dropout_backward])
def test_returns_the_input_if_nothing_is_dropped(function, options):
    assert function(X, key=KEY, **options, **WHOLE) is X


@pytest.mark.parametrize("function", [dropout, dropout_backward])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        ({"start": (0, 0, 0)}, ValueError, "got start without global_shape"),
        ({"global_shape": (9, 6, 8)}, ValueError, "got global_shape without start"),
        ({**WHOLE, "start": (7, 0, 0)}, ValueError, "got start 7 and 3 elements along axis 0"),
        ({**WHOLE, "start": (0, 0)}, ValueError, "start must have one element per axis"),
        ({**WHOLE, "global_shape": (9, 6)}, ValueError, "global_shape must have one length"),
        ({**WHOLE, "global_shape": 9}, TypeError, "global_shape must be a sequence"),
        ({**WHOLE, "start": (0, 0.5, 0)}, TypeError, "start must hold integers, got 0.5"),
    ],
    ids=str,
)
def test_rejects_a_window_that_does_not_fit(function, training, window, error, message):
    out = np.full_like(X, 7)
    with pytest.raises(error, match=re.escape(message)):
        function(X, 0.5, key=KEY, training=training, out=out, **window)
    np.testing.assert_array_equal(out, 7)
