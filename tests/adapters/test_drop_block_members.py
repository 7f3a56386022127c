"""DropBlock in each framework: bits, gradients and layers of the core's function."""

import itertools

import dask.array
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
X = (3 * np.random.default_rng(0).standard_normal((4, 3, 12, 10))).astype("float32")
UPSTREAM = np.random.default_rng(1).standard_normal(X.shape).astype("float32")
BLOCK = {"block_size": 3, "axes": (2, 3)}


def call_core(x, key, **options):
    return family.drop_block(x, P, key, **BLOCK, **options)


def call_torch(x, key, **options):
    return for_torch.drop_block2d(x, P, 3, key=key, **options)


def call_tensorflow(x, key, **options):
    return for_tensorflow.drop_block(x, P, key=key, **BLOCK, **options)


def call_jax(x, key, **options):
    return for_jax.drop_block(x, P, key, **BLOCK, **options)


CALLS = {
    "numpy": (np.asarray, lambda x, key, **o: for_numpy.drop_block(x, P, key=key, **BLOCK, **o)),
    "torch": (torch.from_numpy, call_torch),
    "jax": (jnp.asarray, call_jax),
    "tensorflow": (tf.constant, call_tensorflow),
    "dask": (lambda x: dask.array.from_array(x, chunks=(3, 3, 5, 4)), call_core),
}
frameworks = pytest.mark.parametrize("framework", ["torch", "jax", "tensorflow"])


@pytest.mark.parametrize("framework", CALLS)
def test_has_the_blocks_of_the_core(framework):
    make, call = CALLS[framework]
    expected, kept = call_core(X, KEY, return_mask=True)
    assert_bits(np.asarray(call(make(X), KEY)), expected)
    y, mask = call(make(X), KEY, return_mask=True)
    assert_bits(np.asarray(y), expected)
    assert np.array_equal(np.asarray(mask), kept)


@frameworks
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounds_narrow_blocks_as_the_core(framework, dtype):
    x = X.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    expected = call_core(x, KEY).astype("float32")
    call = CALLS[framework][1]
    if framework == "torch":
        y = call(torch.from_numpy(X).to(getattr(torch, dtype)), KEY).to(torch.float32)
    elif framework == "jax":
        y = call(jnp.asarray(x), KEY).astype("float32")
    else:
        y = tf.cast(call(tf.constant(x), KEY), tf.float32)
    assert_bits(np.asarray(y), expected)


def compiled_torch():
    torch._dynamo.reset()
    function = torch.compile(
        lambda x, step: call_torch(x, KEY.fold_in(step)), fullgraph=True, backend="aot_eager"
    )
    return lambda x, step: function(torch.from_numpy(x), torch.tensor(step))


def graph(jit_compile=False):
    @tf.function(autograph=False, jit_compile=jit_compile)
    def function(x, step):
        return call_tensorflow(x, KEY.fold_in(step))

    return lambda x, step: function(tf.constant(x), tf.constant(step))


COMPILERS = {
    "torch.compile": compiled_torch,
    "jax.jit": lambda: jax.jit(lambda x, i: call_jax(x, KEY.fold_in(i))),
    "tf.function": graph,
    "XLA": lambda: graph(jit_compile=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_has_the_same_blocks_compiled(compiler):
    function = COMPILERS[compiler]()
    for step in (3, 4):
        assert_bits(np.asarray(function(X, step)), call_core(X, KEY.fold_in(step)))


@frameworks
def test_drops_the_same_blocks_of_gradients(framework):
    expected = for_numpy.drop_block_backward(UPSTREAM, P, key=KEY, **BLOCK)
    assert_bits(expected, call_core(UPSTREAM, KEY))
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


def test_saves_no_blocks_for_the_backward_pass_of_torch():
    saved = []
    x = torch.from_numpy(X).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        call_torch(x, KEY)
    assert saved == []


def test_drops_cubes():
    x = X.reshape(2, 2, 3, 12, 10)
    options = {"block_size": 2, "axes": (2, 3, 4)}
    expected = family.drop_block(x, P, KEY, **options)
    y = for_torch.drop_block3d(torch.from_numpy(x), P, 2, key=KEY)
    assert_bits(y.numpy(), expected)
    expected = family.drop_block(x, P, KEY.fold_in(0), **options)
    assert_bits(for_torch.DropBlock3d(P, 2, seed=KEY)(torch.from_numpy(x)).numpy(), expected)
    layer = for_keras.DropBlock3D(P, 2, data_format="channels_first", seed=KEY)
    assert_bits(np.asarray(layer(x, training=True)), expected)


def test_takes_the_largest_block_that_fits_as_torchvision():
    y = for_torch.drop_block2d(torch.from_numpy(X), P, 99, key=KEY)
    assert_bits(y.numpy(), family.drop_block(X, P, KEY, block_size=10, axes=(2, 3)))


def test_writes_blocks_in_place():
    x = torch.from_numpy(X.copy())
    assert call_torch(x, KEY, inplace=True) is x
    assert_bits(x.numpy(), call_core(X, KEY))
    out = np.empty_like(X)
    for_numpy.drop_block(X, P, key=KEY, **BLOCK, out=out)
    assert_bits(out, call_core(X, KEY))


def test_drops_blocks_of_unknown_batches():
    signature = [tf.TensorSpec([None, *X.shape[1:]])]
    function = tf.function(lambda x: call_tensorflow(x, KEY), input_signature=signature)
    assert_bits(function(tf.constant(X)).numpy(), call_core(X, KEY))
    signature = [tf.TensorSpec([4, 3, None, 10])]
    function = tf.function(lambda x: call_tensorflow(x, KEY), input_signature=signature)
    with pytest.raises(ValueError, match=r"x must have known lengths along axes \(2, 3\)"):
        function(tf.constant(X))


LAYERS = {
    "torch": lambda: for_torch.DropBlock2d(P, 3, seed=KEY),
    "keras": lambda: for_keras.DropBlock2D(P, 3, data_format="channels_first", seed=KEY),
    "flax": lambda: for_flax.DropBlock(P, **BLOCK, seed=KEY),
}


def call_layer(layer):
    if isinstance(layer, torch.nn.Module):
        return layer(torch.from_numpy(X)).detach().numpy()
    if isinstance(layer, keras.layers.Layer):
        return np.asarray(layer(X, training=True))
    return np.asarray(layer(jnp.asarray(X)))


@pytest.mark.parametrize("layer", LAYERS)
def test_counts_calls_with_blocks(layer):
    module = LAYERS[layer]()
    for step in range(3):
        assert_bits(call_layer(module), call_core(X, KEY.fold_in(step)))


@pytest.mark.slow
def test_has_eager_blocks_in_compiled_modules():
    torch._dynamo.reset()
    module = torch.compile(LAYERS["torch"](), fullgraph=True, backend="aot_eager")
    for step in range(2):
        assert_bits(call_layer(module), call_core(X, KEY.fold_in(step)))


def test_rebuilds_keras_layers_with_blocks():
    module = LAYERS["keras"]()
    copy = type(module).from_config(module.get_config())
    assert copy.get_config() == module.get_config()
    assert_bits(call_layer(copy), call_layer(module))
    last = for_keras.DropBlock2D(P, 3, seed=KEY)
    x = np.moveaxis(X, 1, -1)
    expected = family.drop_block(x, P, KEY.fold_in(0), block_size=3, axes=(1, 2))
    assert_bits(np.asarray(last(x, training=True)), expected)


def test_describes_blocks_as_torchvision():
    assert repr(for_torch.DropBlock2d(0.1, 7)) == "DropBlock2d(p=0.1, block_size=7, inplace=False)"
    assert "seed=" in repr(for_torch.DropBlock3d(0.1, 7, seed=1))


@pytest.mark.parametrize(
    "call",
    [
        lambda: for_torch.DropBlock2d(P, 0),
        lambda: for_keras.DropBlock2D(P, 0),
        lambda: for_flax.DropBlock(P, block_size=0, axes=(1,)),
        lambda: for_numpy.drop_block(X, P, block_size=0, axes=(1,)),
        lambda: for_jax.drop_block(X, P, KEY, block_size=0, axes=(1,)),
        lambda: for_tensorflow.drop_block(X, P, key=KEY, block_size=0, axes=(1,)),
    ],
    ids=itertools.count(),
)
def test_refuses_empty_blocks(call):
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        call()


def test_raises_for_other_ranks_as_torchvision():
    with pytest.raises(ValueError, match=r"input should be 4 dimensional\. Got 3 dimensions\."):
        for_torch.drop_block2d(torch.ones(3, 4, 4), 0.5, 3)
    module = for_torch.DropBlock3d(P, 3, seed=KEY)
    with pytest.raises(ValueError, match=r"input should be 5 dimensional\. Got 4 dimensions\."):
        module(torch.ones(1, 3, 4, 4))
    assert int(module.calls) == 0
    with pytest.raises(ValueError, match="incompatible with the layer"):
        for_keras.DropBlock2D(P, 3)(np.ones((2, 4, 3)), training=True)


@pytest.mark.slow  # torch.export imports Dynamo
def test_exports_a_batch_of_any_size():
    module = for_torch.DropBlock2d(0.4, 2, seed=KEY)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(module, (torch.ones(2, 2, 5, 4),), dynamic_shapes=shapes)
    x = torch.rand(7, 2, 5, 4)
    expected = for_torch.DropBlock2d(0.4, 2, seed=KEY)(x)
    assert torch.equal(exported.module()(x), expected)
