"""Kernels and JAX: gradients, jit, devices and layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_arrays import KEY, assert_bits, fused, portable, subsets, values

import unidrop
from unidrop import Key


def test_gives_gradient_by_mask_of_kernels():
    x = jnp.asarray(values((33, 9)))
    y = fused(x, 0.4)
    gradient = jax.grad(lambda v: (unidrop.dropout(v, 0.4, KEY) * y).sum())(x)
    assert_bits(np.asarray(gradient), portable(y, 0.4))


def test_takes_portable_path_in_jit_and_refuses_kernels():
    names = []

    @jax.jit
    def step(x):
        names.append(unidrop.explain_path(x).name)
        with unidrop.force_path("fused"):
            return unidrop.dropout(x, 0.4, KEY)

    with pytest.raises(RuntimeError, match="traced"):
        step(jnp.ones(9))
    assert names == ["portable"]


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")
def test_rejects_float64_where_jax_has_none():
    with jax.enable_x64(True):
        x = jnp.asarray(values((9,), "float64"))
    with jax.enable_x64(False), pytest.raises(TypeError, match="x has dtype float64"):
        unidrop.dropout(x, 0.5, KEY)


def test_commits_output_to_device_as_portable_path_does():
    x = jax.device_put(jnp.ones(9), jax.devices()[0])
    with unidrop.force_path("portable"):
        expected = unidrop.dropout(x, 0.5, KEY)
    y = unidrop.dropout(x, 0.5, KEY)
    assert y.committed == expected.committed
    assert y.weak_type == expected.weak_type
    assert y.sharding == expected.sharding


def test_gives_portable_bits_of_array_in_another_order():
    layout = pytest.importorskip("jax.experimental.layout", reason="this JAX sets no layouts")
    x = jnp.asarray(values((6, 5)))
    turned = jax.device_put(x, layout.Format(layout.Layout((1, 0)), x.sharding))
    for axes in subsets(2):
        for seed in range(3):
            y = unidrop.dropout(turned, 0.5, Key(seed), broadcast_axes=axes)
            assert_bits(np.asarray(y), portable(x, 0.5, Key(seed), broadcast_axes=axes))
