"""Dropout in TensorFlow's branches and loops: the function with a key, and Keras layers."""

import numpy as np
import pytest
import tensorflow as tf
from loops import KEY, X, chained, expected

from unidrop.adapters.keras import Dropout
from unidrop.adapters.tensorflow import dropout

MODES = {
    "eager": lambda function: function,
    "graph": tf.function,
    "XLA": tf.function(jit_compile=True),
}


def autograph_for(drop, x):
    for i in tf.range(3):
        x = drop(x, i)
    return x


# Each calls `drop(x, i)` for the iterations i.
BRANCHES = {
    "cond": lambda drop, x: tf.cond(x[0] > 0, lambda: drop(x, 0), lambda: x),
    "switch_case": lambda drop, x: tf.switch_case(
        tf.cast(x[0] > 0, tf.int32), [lambda: x, lambda: drop(x, 0)]
    ),
}
CHAINS = {
    "while_loop": lambda drop, x: tf.while_loop(
        lambda i, x: i < 3, lambda i, x: (i + 1, drop(x, i)), (0, x), maximum_iterations=3
    )[1],
    "foldl": lambda drop, x: tf.foldl(drop, tf.range(3), x),
    "for": autograph_for,
}
MAPS = {
    "scan": lambda drop, x: tf.scan(lambda _, i: drop(x, i), tf.range(3), tf.zeros_like(x)),
    "map_fn": lambda drop, x: tf.map_fn(
        lambda i: drop(x, i), tf.range(3), fn_output_signature=tf.float32, parallel_iterations=3
    ),
}
VECTORIZED = {
    "vectorized_map": lambda drop, x: tf.vectorized_map(
        lambda i: drop(x, i), tf.range(3), warn=False
    ),
}
ALL = BRANCHES | CHAINS | MAPS


def outputs_and_gradient(name, first=0):
    """Return the output and the gradient of a loop that begins with a call number."""
    ones, numbers = np.ones_like(X), [first, first + 1, first + 2]
    if name in BRANCHES:
        numbers = [first]
    if name in BRANCHES | CHAINS:
        return chained(numbers), chained(numbers[::-1], ones)
    return expected(numbers), expected(numbers, ones).sum(axis=0)


def run(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    return y, tape.gradient(y, x)


@pytest.mark.parametrize("mode", ["eager", "graph", pytest.param("XLA", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ALL | VECTORIZED)
def test_runs_function_with_key_and_its_gradient(name, mode):
    def loop(x):
        return (ALL | VECTORIZED)[name](lambda x, i: dropout(x, 0.5, key=KEY.fold_in(i)), x)

    actual = MODES[mode](lambda x: run(loop, x))(tf.constant(X))
    for one, other in zip(actual, outputs_and_gradient(name), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("mode", ["graph", pytest.param("XLA", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ALL)
def test_counts_each_call_of_layer(name, mode):
    layer = Dropout(0.5, seed=KEY)

    def loop(x):
        return ALL[name](lambda x, i: layer(x, training=True), x)

    step = MODES[mode](lambda x: run(loop, x))
    count = 1 if name in BRANCHES else 3
    for first in (0, count):
        for one, other in zip(step(tf.constant(X)), outputs_and_gradient(name, first), strict=True):
            np.testing.assert_array_equal(one, other)
    assert layer.calls == 2 * count


def test_counts_no_call_of_branch_that_does_not_run():
    layer = Dropout(0.5, seed=KEY)
    step = tf.function(lambda x: BRANCHES["cond"](lambda x, i: layer(x, training=True), x))
    np.testing.assert_array_equal(step(tf.constant(-X)), -X)
    assert layer.calls == 0


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_names_function_in_vectorized_map_of_layer(mode):
    layer, rows = Dropout(0.5, seed=KEY), tf.constant(np.stack([X, X]))
    step = MODES[mode](
        lambda rows: tf.vectorized_map(tf.function(lambda x: layer(x, training=True)), rows)
    )
    with pytest.raises(RuntimeError, match=f"{layer.name} .* use the function with a key"):
        step(rows)
    assert layer.calls == 0
    np.testing.assert_array_equal(layer(X, training=True), chained([0]))
