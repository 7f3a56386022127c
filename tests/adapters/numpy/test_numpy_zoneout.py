"""Zoneout for NumPy: its gradients for both states, and an output to write to."""

import numpy as np
import pytest

from unidrop import Key, keep_mask
from unidrop.adapters.numpy import zoneout, zoneout_backward

KEY = Key(42).fold_in("encoder/0").fold_in(7)
P = 0.3
NEW, OLD = np.random.default_rng(0).standard_normal((2, 5, 6, 7)).astype("float32")


@pytest.mark.parametrize("p", [0, P, 1])
def test_divides_the_gradient_among_states(p):
    upstream = NEW
    mask = keep_mask(NEW.shape, p, KEY)
    new, old = zoneout_backward(upstream, p, key=KEY)
    assert np.array_equal(new, np.where(mask, upstream, 0))
    assert np.array_equal(old, np.where(mask, 0, upstream))
    new, old = zoneout_backward(upstream, p, training=False)
    assert np.array_equal(new, upstream * np.float32(1 - p))
    assert np.array_equal(old, upstream * np.float32(p))


def test_raises_without_the_key():
    with pytest.raises(ValueError, match="pass the forward call's key"):
        zoneout_backward(NEW, P)


def test_writes_states_to_an_array():
    out = np.empty_like(NEW)
    assert zoneout(NEW, OLD, P, key=KEY, out=out) is out
    assert np.array_equal(out, zoneout(NEW, OLD, P, key=KEY))
    zoneout(NEW, OLD, P, training=False, out=out)
    assert np.array_equal(out, zoneout(NEW, OLD, P, key=KEY, training=False))
