"""Kernels and TensorFlow: gradients, variables and graphs."""

import numpy as np
import pytest
import tensorflow as tf
from fused_arrays import KEY, assert_bits, fused, portable, values

import unidrop
from unidrop.adapters.tensorflow import dropout


def test_gives_gradient_by_forward_mask():
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
def test_takes_variable_on_explained_path(return_mask):
    x = values((33, 9))
    variable = tf.Variable(x)
    before = variable.numpy()
    with unidrop.force_path(unidrop.explain_path(variable).name):
        y = unidrop.dropout(variable, 0.4, KEY, return_mask=return_mask)
    y = y[0] if return_mask else y
    variable.assign_add(tf.ones_like(variable))
    assert_bits(y.numpy(), portable(x, 0.4))
    assert_bits(variable.numpy(), before + 1)


def test_gives_gradient_of_variable_by_forward_mask():
    variable = tf.Variable(values((9,)))
    with tf.GradientTape() as tape:
        z = tf.reduce_sum(dropout(variable, 0.5, key=KEY))
    assert_bits(tape.gradient(z, variable).numpy(), portable(np.ones(9, "float32"), 0.5))


def test_takes_portable_path_in_graph_with_bits_of_kernels():
    names = []

    @tf.function
    def step(x):
        names.append(unidrop.explain_path(x).name)
        return unidrop.dropout(x, 0.4, KEY)

    x = values((33, 9))
    assert_bits(step(tf.constant(x)).numpy(), fused(x, 0.4))
    assert names == ["portable"]
    with unidrop.force_path("fused"), pytest.raises(RuntimeError, match="traced"):
        tf.function(lambda x: unidrop.dropout(x, 0.5, KEY))(tf.constant(x))


def test_gives_tensors_that_graphs_use_and_change():
    x = values((33, 9))
    y = fused(tf.constant(x), 0.4)
    changed = tf.function(lambda v: tf.raw_ops.InplaceAdd(x=v, i=[0], v=v[:1]) + 0)
    expected = portable(x, 0.4)
    assert_bits((y * 2).numpy(), expected * 2)
    assert changed(tf.identity(y)).shape == y.shape
