"""What PyTorch's and timm's own tests check of members of the family, for the modules here.

timm has no test of its PatchDropout. Its DropBlock can couple channels and add noise, which the one
of torchvision cannot, and so neither can the module here.
"""

import itertools

import pytest
import torch

from unidrop.adapters.torch import (
    AlphaDropout,
    DropBlock2d,
    DropBlock3d,
    DropKey,
    DropPath,
    FeatureAlphaDropout,
    GaussianDropout,
    LockedDropout,
    PatchDropout,
    drop_block2d,
    drop_path,
)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (AlphaDropout, (5000,)),
        (FeatureAlphaDropout, (1000, 3, 2, 4, 5)),
        (FeatureAlphaDropout, (50, 20, 64, 64)),
    ],
    ids=["elements", "channels of volumes", "channels of images"],
)
def test_keeps_mean_and_deviation(kind, shape, p):
    x = draw(*shape).requires_grad_()
    y = kind(p, seed=42)(x)
    assert abs(y.mean() - x.mean()) < 0.1
    assert abs(y.std() - x.std()) < 0.1
    y.backward(x.detach())
    assert x.grad.isfinite().all()


MODULES = {
    "AlphaDropout": (AlphaDropout, ()),
    "FeatureAlphaDropout": (FeatureAlphaDropout, ()),
    "GaussianDropout": (GaussianDropout, ()),
    "DropKey": (DropKey, ()),
    "DropPath": (DropPath, ()),
    "DropBlock2d": (DropBlock2d, (3,)),
}

modules = pytest.mark.parametrize(("kind", "options"), MODULES.values(), ids=MODULES)


@modules
def test_rejects_a_rate_outside_of_its_interval(kind, options):
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match=str(p)):
            kind(p, *options, seed=42)


@modules
def test_keeps_strides_of_dense_inputs(kind, options):
    x = draw(4, 3, 5, 6)
    for order in itertools.permutations(range(4)):
        back = [order.index(axis) for axis in range(4)]
        dense = x.permute(order).contiguous().permute(back).requires_grad_()
        y = kind(0.3, *options, seed=42)(dense)
        (gradient,) = torch.autograd.grad(y, dense, torch.ones_like(dense))
        assert y.stride() == gradient.stride() == dense.stride()
        assert torch.equal(y, kind(0.3, *options, seed=42)(x))


@modules
def test_reads_inputs_with_gaps(kind, options):
    wide = torch.empty(2, 3, 4, 12).to(memory_format=torch.channels_last)[..., ::2]
    x = wide.copy_(draw(2, 3, 4, 6))
    for p in (0, 1e-10, 0.5):
        y = kind(p, *options, seed=42)(x)
        assert torch.equal(y, kind(p, *options, seed=42)(x.contiguous()))


@modules
def test_returns_its_input_in_evaluation(kind, options):
    x = draw(4, 3, 5, 6)
    module = kind(0.5, *options, seed=42)
    assert not torch.equal(module(x), x)
    assert torch.equal(module.eval()(x), x)
    assert "0.5" in repr(module)
    assert "0.5" in module.extra_repr()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("kind", [AlphaDropout, FeatureAlphaDropout, DropPath])
def test_keeps_or_drops_all_at_the_ends(kind, p, train):
    x = draw(5, 2).requires_grad_()
    y = kind(p, seed=42).train(train)(x)
    y.sum().backward()
    is_dropped = train and p == 1
    assert torch.equal(y, torch.zeros_like(x) if is_dropped else x)
    assert torch.equal(x.grad, torch.full_like(x, 0.0 if is_dropped else 1.0))


@pytest.mark.parametrize(("height", "width"), [(7, 7), (4, 8), (10, 5), (3, 3), (14, 7)])
@pytest.mark.parametrize("size", [2, 3, 5, 6])
def test_drops_blocks_of_images_of_any_size(height, width, size):
    x = torch.ones(2, 3, height, width)
    for p in (0.0, 0.1, 0.7):
        y = DropBlock2d(p, size, seed=42)(x)
        assert y.shape == x.shape
        assert y.isfinite().all()
        kept = y[y != 0]
        assert torch.equal(kept, torch.full_like(kept, x.numel() / max(1, kept.numel())))
        assert p > 0 or torch.equal(y, x)


@pytest.mark.slow
def test_drops_about_the_rate_of_images():
    y = DropBlock2d(0.1, 7, seed=42)(torch.ones(32, 16, 56, 56))
    assert abs((y == 0).float().mean() - 0.1) < 0.03


def test_draws_blocks_of_each_channel():
    y = DropBlock2d(0.3, 5, seed=42)(torch.ones(2, 4, 16, 16)) == 0
    assert not any(torch.equal(y[0, i], y[0, j]) for i in range(4) for j in range(i))


def test_writes_blocks_into_the_input():
    x = torch.ones(2, 3, 8, 8)
    assert drop_block2d(x, 0.3, 3, inplace=True) is x
    assert x.min() == 0
    volume = torch.ones(2, 3, 4, 8, 8)
    assert DropBlock3d(0.3, 3, inplace=True, seed=42)(volume) is volume


@pytest.mark.parametrize(("scale_by_keep", "value"), [(True, 1.25), (False, 1.0)])
def test_scales_kept_paths_if_it_should(scale_by_keep, value):
    x = torch.ones(100, 8, 4, 4)
    y = DropPath(0.2, scale_by_keep, seed=42)(x)
    rows = y.flatten(1)
    kept = rows[:, 0] != 0
    assert 60 < kept.sum() < 95
    assert torch.equal(rows[kept], torch.full_like(rows[kept], value))
    assert not rows[~kept].any()


def test_drops_no_path_by_default_and_in_evaluation():
    x = torch.ones(4, 8, 16, 16)
    assert torch.equal(drop_path(x, 0.0, training=True), x)
    assert torch.equal(drop_path(x, 0.5), x)


@pytest.mark.parametrize("kind", [PatchDropout, LockedDropout])
def test_changes_sequences_in_training_alone(kind):
    x = draw(4, 17, 6)
    module = kind(0.5, seed=42)
    assert not torch.equal(module(x), x)
    assert torch.equal(module.eval()(x), x)
    with pytest.raises(ValueError, match=r"-0\.1"):
        kind(-0.1, seed=42)
