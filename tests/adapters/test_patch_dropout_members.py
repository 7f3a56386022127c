"""Patch dropout in each framework: the tokens and gradients of the core, and layers."""

import dask.array
import jax
import keras
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
P = 0.4
X = np.random.default_rng(0).standard_normal((5, 17, 3)).astype("float32")
UPSTREAM = np.random.default_rng(1).standard_normal((5, 10, 3)).astype("float32")


def call_core(x, key, **options):
    return family.patch_dropout(x, P, key, **options)


def call_keyed(adapter):
    return lambda x, key, **options: adapter.patch_dropout(x, P, key=key, **options)


CALLS = {
    "numpy": (np.asarray, call_keyed(for_numpy)),
    "torch": (torch.from_numpy, call_keyed(for_torch)),
    "jax": (jnp.asarray, call_keyed(for_jax)),
    "tensorflow": (tf.constant, call_keyed(for_tensorflow)),
    "dask": (lambda x: dask.array.from_array(x, chunks=(2, 4, 3)), call_core),
}


@pytest.mark.parametrize("framework", CALLS)
@pytest.mark.parametrize("options", [{}, {"ordered": True}, {"num_prefix_tokens": 0}])
def test_keeps_the_tokens_of_the_core(framework, options):
    make, call = CALLS[framework]
    expected, kept = call_core(X, KEY, return_indices=True, **options)
    assert_bits(np.asarray(call(make(X), KEY, **options)), expected)
    y, indices = call(make(X), KEY, return_indices=True, **options)
    assert_bits(np.asarray(y), expected)
    assert np.array_equal(np.asarray(indices), kept)


@pytest.mark.slow
@pytest.mark.parametrize("framework", CALLS)
def test_keeps_the_tokens_of_a_part(framework):
    make, call = CALLS[framework]
    y = call(make(X[2:4]), KEY, global_shape=X.shape, start=(2, 0, 0))
    assert_bits(np.asarray(y), call_core(X, KEY)[2:4])


def compiled_torch():
    torch._dynamo.reset()
    function = torch.compile(
        lambda x, step: CALLS["torch"][1](x, KEY.fold_in(step)),
        fullgraph=True,
        backend="aot_eager",
    )
    return lambda x, step: function(torch.from_numpy(x), torch.tensor(step))


def graph(jit_compile=False):
    @tf.function(autograph=False, jit_compile=jit_compile)
    def function(x, step):
        return CALLS["tensorflow"][1](x, KEY.fold_in(step))

    return lambda x, step: function(tf.constant(x), tf.constant(step))


COMPILERS = {
    "torch.compile": compiled_torch,
    "jax.jit": lambda: jax.jit(lambda x, i: CALLS["jax"][1](x, KEY.fold_in(i))),
    "tf.function": graph,
    "XLA": lambda: graph(jit_compile=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_keeps_the_same_tokens_compiled(compiler):
    function = COMPILERS[compiler]()
    for step in (3, 4):
        assert_bits(np.asarray(function(X, step)), call_core(X, KEY.fold_in(step)))


@pytest.mark.parametrize("framework", ["torch", "jax", "tensorflow"])
def test_scatters_gradients_to_kept_tokens(framework):
    expected = for_numpy.patch_dropout_backward(UPSTREAM, P, length=17, key=KEY)
    assert_bits(call_core(expected, KEY), UPSTREAM)
    assert np.count_nonzero(expected) == UPSTREAM.size
    call = CALLS[framework][1]
    if framework == "torch":
        x = torch.from_numpy(X).requires_grad_()
        call(x, KEY).backward(torch.from_numpy(UPSTREAM))
        gradient = x.grad
    elif framework == "jax":
        _, pull = jax.vjp(lambda x: call(x, KEY), jnp.asarray(X))
        (gradient,) = pull(jnp.asarray(UPSTREAM))
    else:
        x = tf.constant(X)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x, KEY)
        gradient = tape.gradient(y, x, tf.constant(UPSTREAM))
    assert_bits(np.asarray(gradient), expected)


def test_removes_tokens_under_vmap():
    call = CALLS["torch"][1]
    x = torch.from_numpy(np.stack([X, X]))
    same = torch.func.vmap(lambda x: call(x, KEY), randomness="same")(x)
    assert_bits(same[1].numpy(), call_core(X, KEY))
    draw = torch.func.vmap(lambda x: call(x, KEY, return_indices=True), randomness="different")
    expected = family.permutation((2, 5, 16), KEY)[..., :9]
    assert np.array_equal(draw(x)[1].numpy(), expected)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: call(x, KEY))(x)
    steps = torch.func.vmap(lambda i: call(x[0], KEY.fold_in(i)), randomness="same")
    assert_bits(steps(torch.arange(3))[2].numpy(), call_core(X, KEY.fold_in(2)))


LAYERS = {
    "torch": lambda **o: for_torch.PatchDropout(P, seed=KEY, **o),
    "keras": lambda **o: for_keras.PatchDropout(P, seed=KEY, **o),
    "flax": lambda **o: for_flax.PatchDropout(P, seed=KEY, **o),
}


def call_layer(layer):
    if isinstance(layer, torch.nn.Module):
        return layer(torch.from_numpy(X)).detach().numpy()
    if isinstance(layer, keras.layers.Layer):
        return np.asarray(layer(X, training=True))
    return np.asarray(layer(jnp.asarray(X)))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("options", [{}, {"num_prefix_tokens": 2, "ordered": True}])
def test_counts_calls_with_tokens(layer, options):
    module = LAYERS[layer](**options)
    for step in range(3):
        assert_bits(call_layer(module), call_core(X, KEY.fold_in(step), **options))


@pytest.mark.slow
@pytest.mark.parametrize("has_indices", [True, False])
def test_has_eager_tokens_in_compiled_modules(has_indices):
    torch._dynamo.reset()
    kind = for_torch.PatchDropoutWithIndices if has_indices else for_torch.PatchDropout
    module = torch.compile(kind(P, seed=KEY), fullgraph=True, backend="aot_eager")
    for step in range(2):
        y = module(torch.from_numpy(X))
        assert_bits((y[0] if has_indices else y).numpy(), call_core(X, KEY.fold_in(step)))


def test_returns_indices_as_timm():
    module = for_torch.PatchDropoutWithIndices(P, seed=KEY)
    y, indices = module(torch.from_numpy(X))
    expected = call_core(X, KEY.fold_in(0), return_indices=True)
    assert_bits(y.numpy(), expected[0])
    assert np.array_equal(indices.numpy(), expected[1])
    assert int(module.calls) == 1
    y, indices = module.eval()(torch.from_numpy(X))
    assert indices is None
    assert_bits(y.numpy(), X)


def test_rebuilds_keras_layers_of_tokens():
    module = LAYERS["keras"](num_prefix_tokens=2, ordered=True)
    copy = type(module).from_config(module.get_config())
    assert copy.get_config() == module.get_config()
    assert_bits(call_layer(copy), call_layer(module))
    assert module(X, training=False).shape == X.shape


def test_describes_modules_of_tokens():
    assert repr(for_torch.PatchDropout(0.25)) == (
        "PatchDropout(prob=0.25, num_prefix_tokens=1, ordered=False)"
    )
    module = for_torch.PatchDropout(0.25, seed=KEY)
    module.prob = P
    assert_bits(call_layer(module), call_core(X, KEY.fold_in(0)))


@pytest.mark.parametrize(
    "call",
    [
        lambda: for_torch.PatchDropout(1.0),
        lambda: for_torch.patch_dropout(torch.ones(1, 2), 1.0),
        lambda: for_keras.PatchDropout(1.0),
        lambda: for_flax.PatchDropout(1.0),
        lambda: for_numpy.patch_dropout(X, 1.0),
        lambda: for_jax.patch_dropout(X, 1.0, KEY),
        lambda: for_tensorflow.patch_dropout(X, 1.0, key=KEY),
    ],
    ids=["module", "torch", "keras", "flax", "numpy", "jax", "tensorflow"],
)
def test_refuses_to_remove_all_tokens(call):
    with pytest.raises(ValueError, match="must be below 1 for patch dropout, got 1"):
        call()
