"""DropHead in each framework: bits, gradients, modes and layers."""

import flax.nnx
import jax
import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
import torch
from jax import numpy as jnp
from keras_models import assert_bits

import unidrop.adapters.flax as for_flax
import unidrop.adapters.jax as for_jax
import unidrop.adapters.keras as for_keras
import unidrop.adapters.numpy as for_numpy
import unidrop.adapters.tensorflow as for_tensorflow
import unidrop.adapters.torch as for_torch
from unidrop import Key, family

KEY = Key(42).fold_in("encoder/0").fold_in(7)
P = 0.3
X = (3 * np.random.default_rng(0).standard_normal((8, 6, 5, 3))).astype("float32")
UPSTREAM = np.random.default_rng(1).standard_normal(X.shape).astype("float32")

# Each function with the axis that it has by default, and how it makes an array.
FUNCTIONS = {
    "numpy": (np.asarray, lambda x, key: for_numpy.drop_head(x, P, axis=1, key=key), 1),
    "torch": (torch.as_tensor, lambda x, key: for_torch.drop_head(x, P, key=key), 1),
    "jax": (jnp.asarray, lambda x, key: for_jax.drop_head(x, P, key), -2),
    "tensorflow": (tf.constant, lambda x, key: for_tensorflow.drop_head(x, P, key=key), -2),
}
functions = pytest.mark.parametrize(("make", "call", "axis"), FUNCTIONS.values(), ids=FUNCTIONS)


@functions
def test_has_the_bits_of_the_core(make, call, axis):
    assert_bits(np.asarray(call(make(X), KEY)), family.drop_head(X, P, KEY, axis=axis))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounds_narrow_dtypes_as_the_core(dtype):
    x = X.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    expected = family.drop_head(x, P, KEY, axis=2).astype("float32")
    tensor = torch.from_numpy(X).to(getattr(torch, dtype))
    assert_bits(for_torch.drop_head(tensor, P, axis=2, key=KEY).float().numpy(), expected)
    assert_bits(np.asarray(for_jax.drop_head(jnp.asarray(x), P, KEY)).astype("float32"), expected)
    y = tf.cast(for_tensorflow.drop_head(tf.constant(x), P, key=KEY), tf.float32)
    assert_bits(y.numpy(), expected)


@pytest.mark.slow
def test_has_the_same_bits_compiled():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, step):
        return for_torch.drop_head(x, P, axis=-2, key=KEY.fold_in(step))

    @tf.function(jit_compile=True)
    def xla(x, step):
        return for_tensorflow.drop_head(x, P, key=KEY.fold_in(step))

    jitted = jax.jit(lambda x, step: for_jax.drop_head(x, P, KEY.fold_in(step)))
    for step in (3, 4):
        expected = family.drop_head(X, P, KEY.fold_in(step), axis=2)
        assert_bits(compiled(torch.from_numpy(X), torch.tensor(step)).numpy(), expected)
        assert_bits(xla(tf.constant(X), tf.constant(step)).numpy(), expected)
        assert_bits(np.asarray(jitted(X, step)), expected)


def test_has_one_gradient_in_all_frameworks():
    expected = for_numpy.drop_head_backward(UPSTREAM, P, axis=2, key=KEY)
    assert_bits(expected, family.drop_head(UPSTREAM, P, KEY, axis=2))
    x = torch.from_numpy(X).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        y = for_torch.drop_head(x, P, axis=2, key=KEY)
    assert saved == []
    y.backward(torch.from_numpy(UPSTREAM))
    assert_bits(x.grad.numpy(), expected)
    _, pull = jax.vjp(lambda x: for_jax.drop_head(x, P, KEY), jnp.asarray(X))
    assert_bits(np.asarray(pull(jnp.asarray(UPSTREAM))[0]), expected)
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = for_tensorflow.drop_head(x, P, key=KEY)
    assert_bits(tape.gradient(y, x, tf.constant(UPSTREAM)).numpy(), expected)


LAYERS = {
    "torch": (lambda: for_torch.DropHead(P, seed=KEY), 1),
    "torch axis": (lambda: for_torch.DropHead(P, axis=-2, seed=KEY), 2),
    "keras": (lambda: for_keras.DropHead(P, seed=KEY), 2),
    "flax": (lambda: for_flax.DropHead(P, seed=KEY), 2),
}


def call_layer(layer, x=X):
    if isinstance(layer, torch.nn.Module):
        return layer(torch.from_numpy(x)).numpy()
    if isinstance(layer, keras.layers.Layer):
        return np.asarray(layer(x, training=True))
    return np.asarray(layer(jnp.asarray(x)))


@pytest.mark.parametrize(("make", "axis"), LAYERS.values(), ids=LAYERS)
def test_counts_calls_of_layers(make, axis):
    layer = make()
    for step in range(3):
        expected = family.drop_head(X, P, KEY.fold_in(step), axis=axis)
        assert_bits(call_layer(layer), expected)
    calls = layer.calls
    assert int(calls.get_value() if isinstance(calls, flax.nnx.Variable) else calls) == 3


@pytest.mark.parametrize("framework", ["torch", "keras", "flax"])
def test_counts_no_call_without_the_axis_of_heads(framework):
    make, axis = LAYERS[framework]
    layer = make()
    with pytest.raises(ValueError, match="axis must be an axis"):
        call_layer(layer, X[0, 0, 0])
    assert_bits(call_layer(layer), family.drop_head(X, P, KEY.fold_in(0), axis=axis))


def test_rebuilds_a_keras_layer_of_its_configuration():
    layer = for_keras.DropHead(P, axis=1, seed=KEY)
    copy = for_keras.DropHead.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    assert_bits(call_layer(copy), family.drop_head(X, P, KEY.fold_in(0), axis=1))


def test_drops_heads_of_attention():
    q = torch.from_numpy(X).requires_grad_()
    heads = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    y, mask = for_torch.drop_head(heads, P, key=KEY, return_mask=True)
    assert mask.shape == (8, 6, 1, 1)
    assert torch.equal(y == 0, ~mask.expand_as(y))


def test_describes_the_torch_module():
    assert repr(for_torch.DropHead(0.1)) == "DropHead(p=0.1, axis=1, inplace=False)"
    x = torch.from_numpy(X.copy())
    y = for_torch.DropHead(P, inplace=True, seed=KEY)(x)
    assert y is x
    assert_bits(x.numpy(), family.drop_head(X, P, KEY.fold_in(0), axis=1))


def test_accepts_a_rate_that_changes():
    expected = family.drop_head(X, 0.5, KEY, axis=1)
    rate = jnp.float32(0.5)
    y = jax.jit(lambda x, rate: for_jax.drop_head(x, rate, KEY, axis=1))(X, rate)
    assert_bits(np.asarray(y), expected)
    rate = tf.constant(0.5)
    assert_bits(for_tensorflow.drop_head(X, rate, axis=1, key=KEY).numpy(), expected)
    y = for_torch.drop_head(torch.as_tensor(X), torch.tensor(0.5), key=KEY)
    assert_bits(y.numpy(), expected)
    assert_bits(for_numpy.drop_head(X, np.array(0.5), axis=1, key=KEY), expected)
    layer = for_keras.DropHead(keras.Variable(0.5, trainable=False), axis=1, seed=KEY)
    expected = family.drop_head(X, 0.5, KEY.fold_in(0), axis=1)
    assert_bits(np.asarray(layer(X, training=True)), expected)
    module = for_torch.DropHead(torch.tensor(0.5), seed=KEY)
    assert_bits(module(torch.as_tensor(X)).numpy(), expected)
