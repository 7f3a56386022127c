"""The rate, the mean and the variance of each member over a million decisions."""

import math

import numpy as np
import pytest

from unidrop import Key, family

pytestmark = pytest.mark.slow

KEY = Key(42).fold_in("statistics")
MILLION = 10**6
SIDE = 1000

# The shape of x, the options, and the power of 1 / (1 - p) that scales kept elements.
MASKED = {
    "drop_path": ("drop_path", (MILLION, 2), {}, 1),
    "drop_path unscaled": ("drop_path", (MILLION, 2), {"scale_by_keep": False}, 0),
    "locked_dropout": ("locked_dropout", (SIDE, 2, SIDE), {"axis": 1}, 1),
    "drop_key": ("drop_key", (SIDE, SIDE), {}, 0),
}


def normal(shape):
    return np.random.default_rng(1).standard_normal(shape)


@pytest.mark.parametrize("p", [0.01, 0.2, 0.9])
@pytest.mark.parametrize(("member", "shape", "options", "power"), MASKED.values(), ids=MASKED)
def test_drops_at_the_rate_and_keeps_the_mean(member, shape, options, power, p):
    y, mask = getattr(family, member)(np.ones(shape), p, KEY, return_mask=True, **options)
    assert mask.size == MILLION
    assert abs(mask.mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / MILLION)
    mean = np.where(np.isfinite(y), y, 0).mean()
    assert mean == pytest.approx(mask.mean() / (1 - p) ** power, rel=1e-12)


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("member", ["alpha_dropout", "feature_alpha_dropout"])
def test_keeps_mean_and_variance_of_normal_inputs(member, p):
    y, mask = getattr(family, member)(normal((SIDE, SIDE, 2)), p, KEY, return_mask=True)
    assert mask.size >= MILLION
    assert abs(mask.mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / mask.size)
    assert abs(y.mean()) < 0.005
    assert abs(y.var() - 1) < 0.01


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_drops_the_expected_share_of_blocks(size, p):
    shape = (64, 16, 32, 32)
    options = {"block_size": size, "axes": (2, 3), "return_mask": True}
    y, mask = family.drop_block(normal(shape) + 3, p, KEY, **options)
    gamma = p * 32**2 / (size**2 * (33 - size) ** 2)
    # The number of corners that reach each place of an axis.
    reach = np.convolve(np.ones(33 - size), np.ones(size))
    expected = ((1 - gamma) ** np.outer(reach, reach)).mean()
    assert abs(mask.mean() - expected) < 4 * size * math.sqrt(p * (1 - p) / mask.size)
    assert abs(y.mean() - 3) < 4 * math.sqrt(1 / mask.sum())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_keeps_the_mean_of_kept_tokens(p):
    x = normal((SIDE, SIDE + 1)) + 3
    y = family.patch_dropout(x, p, KEY)
    assert y.shape == (SIDE, 1 + math.floor(SIDE * (1 - p)))
    assert abs(y[:, 1:].mean() - x[:, 1:].mean()) < 4 / math.sqrt(y[:, 1:].size)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_multiplies_by_the_variance_of_dropout(p):
    x = normal(MILLION) + 3
    y, ratio = family.gaussian_dropout(x, p, KEY), p / (1 - p)
    assert abs(y.mean() - x.mean()) < 4 * math.sqrt(ratio * (x**2).mean() / MILLION)
    expected = x.var() + ratio * (x**2).mean()
    assert abs(y.var() / expected - 1) < 0.01


@pytest.mark.parametrize("stddev", [0.1, 1.0, 5.0])
def test_adds_the_variance_of_noise(stddev):
    x = normal(MILLION)
    noise = family.gaussian_noise(x, stddev, KEY) - x
    assert abs(noise.mean()) < 4 * stddev / 1000
    assert abs(noise.std() / stddev - 1) < 4 / math.sqrt(2) / 1000
    assert abs((noise * x).mean()) < 4 * stddev / 1000
