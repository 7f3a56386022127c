"""Word dropout in each framework: the tokens of the core, and layers."""

import dask.array
import jax
import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from jax import numpy as jnp

import unidrop.adapters.flax as for_flax
import unidrop.adapters.jax as for_jax
import unidrop.adapters.keras as for_keras
import unidrop.adapters.numpy as for_numpy
import unidrop.adapters.tensorflow as for_tensorflow
import unidrop.adapters.torch as for_torch
from unidrop import Key, family

KEY = Key(42).fold_in("words").fold_in(7)
P = 0.3
X = np.random.default_rng(0).integers(0, 9, (8, 20)).astype("int32")
TOKENS = {"unk_id": 11, "special_ids": (0, 5)}


def call_core(x, key, **options):
    return family.word_dropout(x, P, key, **TOKENS, **options)


def call_keyed(adapter):
    return lambda x, key, **options: adapter.word_dropout(x, P, key=key, **TOKENS, **options)


CALLS = {
    "numpy": (np.asarray, call_keyed(for_numpy)),
    "torch": (torch.from_numpy, call_keyed(for_torch)),
    "jax": (jnp.asarray, call_keyed(for_jax)),
    "tensorflow": (tf.constant, call_keyed(for_tensorflow)),
    "dask": (lambda x: dask.array.from_array(x, chunks=(3, 8)), call_core),
}


@pytest.mark.parametrize("framework", CALLS)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64"])
def test_has_the_tokens_of_the_core(framework, dtype):
    make, call = CALLS[framework]
    x = X.astype(dtype)
    expected, mask = call_core(x, KEY, return_mask=True)
    with jax.enable_x64(dtype == "int64"):
        y, kept = call(make(x), KEY, return_mask=True)
        assert dtype in str(y.dtype)
        assert np.array_equal(np.asarray(y), expected)
        assert np.array_equal(np.asarray(kept), mask)
        assert np.array_equal(np.asarray(call(make(x), KEY)), expected)


def compiled_torch():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x, step):
        return CALLS["torch"][1](x, KEY.fold_in(step))

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
def test_has_the_same_tokens_compiled(compiler):
    function = COMPILERS[compiler]()
    for step in (3, 4):
        assert np.array_equal(np.asarray(function(X, step)), call_core(X, KEY.fold_in(step)))


LAYERS = {
    "torch": lambda: for_torch.WordDropout(P, seed=KEY, **TOKENS),
    "keras": lambda: for_keras.WordDropout(P, seed=KEY, **TOKENS),
    "flax": lambda: for_flax.WordDropout(P, seed=KEY, **TOKENS),
}


def call_layer(layer, x=X, training=True):
    if isinstance(layer, torch.nn.Module):
        return layer.train(training)(torch.from_numpy(x)).numpy()
    if isinstance(layer, keras.layers.Layer):
        return np.asarray(layer(x, training=training))
    return np.asarray(layer(jnp.asarray(x), deterministic=not training))


@pytest.mark.parametrize("layer", LAYERS)
def test_counts_calls_with_tokens(layer):
    module = LAYERS[layer]()
    for step in range(2):
        assert np.array_equal(call_layer(module), call_core(X, KEY.fold_in(step)))
    assert np.array_equal(call_layer(module, training=False), X)
    assert int(module.calls) == 2


@pytest.mark.parametrize("layer", LAYERS)
def test_refuses_tokens_of_floats(layer):
    module = LAYERS[layer]()
    with pytest.raises(TypeError, match="must be of an integer dtype for word dropout"):
        call_layer(module, X.astype("float32"))
    assert int(module.calls) == 0


def test_trains_keras_models_of_tokens():
    inputs = keras.Input((20,), dtype="int32")
    words = LAYERS["keras"]()(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Embedding(12, 4)(words)))
    copy = keras.Model.from_config(model.get_config())
    copy.compile("sgd", "mse")
    copy.fit(X, np.zeros((8, 20, 1)), batch_size=4, verbose=0)
    assert tuple(copy.layers[1].special_ids) == TOKENS["special_ids"]
    assert copy.layers[1].calls == 2


def test_describes_modules_of_words():
    module = for_torch.WordDropout(P, unk_id=1)
    assert repr(module) == "WordDropout(p=0.3, unk_id=1, special_ids=())"


@pytest.mark.parametrize("adapter", [for_numpy, for_torch, for_jax, for_tensorflow])
def test_refuses_tokens_that_the_dtype_cannot_hold(adapter):
    make = {for_torch: torch.from_numpy, for_jax: jnp.asarray}.get(adapter, np.asarray)
    with pytest.raises(ValueError, match=r"unk_id must be in .* for uint8, got 300"):
        adapter.word_dropout(make(X.astype("uint8")), P, key=KEY, unk_id=300)


@pytest.mark.parametrize("kind", [for_torch.WordDropout, for_keras.WordDropout])
def test_refuses_tokens_that_are_not_integers(kind):
    with pytest.raises(TypeError, match=r"unk_id must be an integer, got 1\.5"):
        kind(P, unk_id=1.5)
