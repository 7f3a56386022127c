"""The fused path of TensorFlow's and JAX's arrays: gradients, graphs and memory."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from fused_arrays import KEY, assert_bits, dropped, fused, kept_by, portable, values

import unidrop
import unidrop.adapters.tensorflow
from unidrop import Key


def test_the_gradient_of_an_eager_tensor_has_the_forwards_mask():
    x = tf.constant(values((33, 9)))
    with unidrop.force_path("fused"), tf.GradientTape() as tape:
        tape.watch(x)
        y = unidrop.dropout(x, 0.4, KEY)
        z = tf.reduce_sum(y * y)
    with unidrop.force_path("fused"):
        gradient = tape.gradient(z, x)
    twice = portable(2 * portable(x.numpy(), 0.4), 0.4)
    assert_bits(gradient.numpy(), twice)


@pytest.mark.parametrize("return_mask", [False, True], ids=["output", "output and mask"])
def test_a_variable_is_taken_as_explain_says(return_mask):
    x = values((33, 9))
    variable = tf.Variable(x)
    before = variable.numpy()
    with unidrop.force_path(unidrop.explain_path(variable).name):
        y = unidrop.dropout(variable, 0.4, KEY, return_mask=return_mask)
    y = y[0] if return_mask else y
    variable.assign_add(tf.ones_like(variable))
    assert_bits(y.numpy(), portable(x, 0.4))
    assert_bits(variable.numpy(), before + 1)


def test_the_gradient_of_a_variable_has_the_forwards_mask():
    variable = tf.Variable(values((9,)))
    with tf.GradientTape() as tape:
        z = tf.reduce_sum(unidrop.adapters.tensorflow.dropout(variable, 0.5, key=KEY))
    assert_bits(tape.gradient(z, variable).numpy(), 2 * kept_by(KEY).numpy().astype("float32"))


def test_a_graph_is_portable_and_has_the_bits_of_the_kernels():
    names = []

    @tf.function
    def step(x):
        names.append(unidrop.explain_path(x).name)
        return unidrop.dropout(x, 0.4, KEY)

    x = values((33, 9))
    assert_bits(step(tf.constant(x)).numpy(), fused(x, 0.4))
    assert names == ["portable"]
    with unidrop.force_path("fused"), pytest.raises(RuntimeError, match="traced"):
        tf.function(dropped)(tf.constant(x))


def test_tensors_made_by_kernels_are_used_in_graphs_and_changed_there():
    x = values((33, 9))
    y = fused(tf.constant(x), 0.4)
    changed = tf.function(lambda v: tf.raw_ops.InplaceAdd(x=v, i=[0], v=v[:1]) + 0)
    expected = portable(x, 0.4)
    assert_bits((y * 2).numpy(), expected * 2)
    assert changed(tf.identity(y)).shape == y.shape


def test_the_gradient_of_jax_is_the_portable_one_by_the_kernels_mask():
    x = jnp.asarray(values((33, 9)))
    y = fused(x, 0.4)
    gradient = jax.grad(lambda v: (unidrop.dropout(v, 0.4, KEY) * y).sum())(x)
    assert_bits(np.asarray(gradient), portable(y, 0.4))


def test_a_jitted_function_says_portable_and_refuses_kernels():
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
def test_a_wide_array_where_jax_has_none_is_never_narrowed():
    with jax.enable_x64(True):
        x = jnp.asarray(values((9,), "float64"))
    with pytest.raises(TypeError, match="x has dtype float64"):
        unidrop.dropout(x, 0.5, KEY)


def test_the_output_is_committed_to_a_device_as_the_portable_one_is():
    x = jax.device_put(jnp.ones(9), jax.devices()[0])
    with unidrop.force_path("portable"):
        expected = unidrop.dropout(x, 0.5, KEY)
    y = unidrop.dropout(x, 0.5, KEY)
    assert y.committed == expected.committed
    assert y.weak_type == expected.weak_type
    assert y.sharding == expected.sharding


def test_results_outlive_their_inputs_and_everything_else(library):
    outputs = []
    for seed in range(12):
        x = library.array(np.full((40_000,), seed + 1, "float32"))
        y, mask = unidrop.dropout(x, 0.5, Key(seed), return_mask=True)
        outputs.append((y, mask))
        del x, y, mask
        np.full((40_000,), np.nan, "float32")
        np.full((40_000,), 7, "uint8")
    gc.collect()
    for seed, (y, mask) in enumerate(outputs):
        expected = portable(np.full((40_000,), seed + 1, "float32"), 0.5, Key(seed))
        assert_bits(library.back(y), expected)
        np.testing.assert_array_equal(library.back(mask), expected != 0)


def test_two_results_share_no_memory(library):
    x = library.array(values((99,)))
    first, second = fused(x, 0.5), fused(x, 0.5, Key(1))
    assert_bits(library.back(first), portable(values((99,)), 0.5))
    assert_bits(library.back(second), portable(values((99,)), 0.5, Key(1)))
    assert_bits(library.back(x), values((99,)))
