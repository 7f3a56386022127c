"""Dropout in the branches and loops of `keras.ops`; `test_keras_backends.py` runs each backend."""

import numpy as np
import pytest
from keras import ops
from keras_models import BACKEND, SITE, X, assert_bits, dropped

import unidrop
from unidrop.adapters.keras import Dropout

# Each calls `drop(x, i)` for the iterations i.
CHAINS = {
    "cond": lambda drop, x: ops.cond(ops.sum(x) != 0, lambda: drop(x, 0), lambda: x),
    "switch": lambda drop, x: ops.switch(
        ops.cast(ops.sum(x) != 0, "int32"), [lambda x: x, lambda x: drop(x, 0)], x
    ),
    "while_loop": lambda drop, x: ops.while_loop(
        lambda i, x: i < 3, lambda i, x: (i + 1, drop(x, i)), (ops.convert_to_tensor(0), x)
    )[1],
    "fori_loop": lambda drop, x: ops.fori_loop(0, 3, lambda i, x: drop(x, i), x),
    "scan": lambda drop, x: ops.scan(lambda x, i: (drop(x, i),) * 2, x, ops.arange(3))[0],
}
MAPS = {
    "map": lambda drop, x: ops.map(lambda i: drop(x, i), ops.arange(3)),
    "vectorized_map": lambda drop, x: ops.vectorized_map(lambda i: drop(x, i), ops.arange(3)),
}


def expected(name, numbers=range(3)):
    """Return the output of a loop whose iterations have these call numbers."""
    if name in MAPS:
        return np.stack([dropped(X, n) for n in numbers])
    y = X
    for n in numbers if name not in ("cond", "switch") else numbers[:1]:
        y = dropped(y, n)
    return y


@pytest.mark.parametrize("name", [*CHAINS, *MAPS])
def test_runs_function_with_key(name):
    def drop(x, i):
        return unidrop.dropout(x, 0.5, SITE.fold_in(i))

    assert_bits((CHAINS | MAPS)[name](drop, ops.convert_to_tensor(X)), expected(name))


@pytest.mark.parametrize("name", [*CHAINS, "map"])
def test_counts_iterations_of_layer_or_names_function(name):
    layer, x = Dropout(0.5, seed=SITE), ops.convert_to_tensor(X)

    def run():
        return (CHAINS | MAPS)[name](lambda x, i: layer(x, training=True), x)

    if BACKEND == "jax":
        with pytest.raises(RuntimeError, match=f"{layer.name} .* use the function with a key"):
            run()
        assert layer.calls == 0
        return
    # TensorFlow runs the function of a map once before, to learn its outputs.
    first = int(name == "map" and BACKEND == "tensorflow")
    assert_bits(run(), expected(name, range(first, first + 3)))
    count = first + (1 if name in ("cond", "switch") else 3)
    assert layer.calls == count
    assert_bits(layer(x, training=True), dropped(X, count))


def test_raises_in_vectorized_map_of_layer():
    layer, x = Dropout(0.5, seed=SITE), ops.convert_to_tensor(np.stack([X, X]))
    remedy = "randomness" if BACKEND == "torch" else "use the function with a key"
    with pytest.raises(RuntimeError, match=remedy):
        ops.vectorized_map(lambda x: layer(x, training=True), x)
    assert layer.calls == 0
    assert_bits(layer(X, training=True), dropped(X, 0))


if BACKEND == "jax":
    import jax

    @pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, jax.jacrev])
    def test_counts_one_call_in_gradient(transform):
        layer = Dropout(0.5, seed=SITE)
        x = ops.convert_to_tensor(X[0])
        gradient = transform(lambda x: layer(x, training=True).sum())(x)
        assert_bits(gradient, dropped(np.ones_like(X[0]), 0))
        assert layer.calls == 1

    @pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
    def test_raises_if_call_number_would_leak(transform):
        layer = Dropout(0.5, seed=SITE)
        with pytest.raises(RuntimeError, match="use the function with a key"):
            transform(lambda x: layer(x, training=True))(X)
        assert_bits(layer(X, training=True), dropped(X, 0))
