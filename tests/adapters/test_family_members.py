"""Members of the family in each framework: bits, gradients and modes of the core's functions."""

import dask.array
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
X = (3 * np.random.default_rng(0).standard_normal((8, 6, 9))).astype("float32")
UPSTREAM = np.random.default_rng(1).standard_normal(X.shape).astype("float32")


def call_core(name, x, key, **options):
    return getattr(family, name)(x, P, key, **options)


def call_numpy(name, x, key, **options):
    return getattr(for_numpy, name)(x, P, key=key, **options)


def call_torch(name, x, key, **options):
    function = getattr(for_torch, name)
    if "axis" in options:
        options = {"batch_first": options["axis"] == 1}
    return function(x, P, training=True, key=key, **options)


def call_jax(name, x, key, **options):
    return getattr(for_jax, name)(x, P, key, **options)


def call_tensorflow(name, x, key, **options):
    if name == "feature_alpha_dropout":
        return for_tensorflow.alpha_dropout(x, P, (None, None, 1), key=key, **options)
    return getattr(for_tensorflow, name)(x, P, key=key, **options)


MEMBERS = {
    "alpha": ("alpha_dropout", {}),
    "feature alpha": ("feature_alpha_dropout", {}),
    "key": ("drop_key", {}),
    "locked": ("locked_dropout", {"axis": 1}),
    "path": ("drop_path", {}),
    "path unscaled": ("drop_path", {"scale_by_keep": False}),
}
members = pytest.mark.parametrize(("name", "options"), MEMBERS.values(), ids=MEMBERS)
EAGER = {
    "numpy": (np.asarray, call_numpy),
    "torch": (torch.from_numpy, call_torch),
    "jax": (jnp.asarray, call_jax),
    "tensorflow": (tf.constant, call_tensorflow),
    "dask": (lambda x: dask.array.from_array(x, chunks=(3, 6, 4)), call_core),
}


@members
@pytest.mark.parametrize("framework", EAGER)
def test_has_the_bits_of_the_core(framework, name, options):
    make, call = EAGER[framework]
    y = call(name, make(X), KEY, **options)
    assert_bits(np.asarray(y), call_core(name, X, KEY, **options))


@members
@pytest.mark.parametrize("framework", ["torch", "jax", "tensorflow"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounds_narrow_dtypes_as_the_core(framework, dtype, name, options):
    x = X.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    expected = call_core(name, x, KEY, **options).astype("float32")
    if framework == "torch":
        y = call_torch(name, torch.from_numpy(X).to(getattr(torch, dtype)), KEY, **options)
        y = y.to(torch.float32)
    elif framework == "jax":
        y = call_jax(name, jnp.asarray(x), KEY, **options).astype("float32")
    else:
        y = tf.cast(call_tensorflow(name, tf.constant(x), KEY, **options), tf.float32)
    assert_bits(np.asarray(y), expected)


def compiled_torch(name, options):
    torch._dynamo.reset()

    # One member by Inductor, whose kernels take long to compile, and all by the graph.
    @torch.compile(fullgraph=True, backend="inductor" if name == "alpha_dropout" else "aot_eager")
    def function(x, step):
        return call_torch(name, x, KEY.fold_in(step), **options)

    return lambda x, step: function(torch.from_numpy(x), torch.tensor(step))


def jitted(name, options):
    return jax.jit(lambda x, step: call_jax(name, x, KEY.fold_in(step), **options))


def graph(name, options, jit_compile=False):
    @tf.function(autograph=False, jit_compile=jit_compile)
    def function(x, step):
        return call_tensorflow(name, x, KEY.fold_in(step), **options)

    return lambda x, step: function(tf.constant(x), tf.constant(step))


COMPILERS = {
    "torch.compile": compiled_torch,
    "jax.jit": jitted,
    "tf.function": graph,
    "XLA": lambda name, options: graph(name, options, jit_compile=True),
}


@pytest.mark.slow
@members
@pytest.mark.parametrize("compiler", COMPILERS)
def test_has_the_same_bits_compiled(compiler, name, options):
    function = COMPILERS[compiler](name, options)
    for step in (3, 4):
        expected = call_core(name, X, KEY.fold_in(step), **options)
        assert_bits(np.asarray(function(X, step)), expected)


def gradient_of_numpy(name, options):
    return getattr(for_numpy, f"{name}_backward")(UPSTREAM, P, key=KEY, **options)


@members
def test_gives_the_gradient_of_the_formula(name, options):
    y, mask = call_core(name, X, KEY, **options, return_mask=True)
    shifted = call_core(name, X + np.float32(1), KEY, **options)
    slope = np.zeros_like(X)
    np.subtract(shifted, y, out=slope, where=np.broadcast_to(mask, X.shape))
    np.testing.assert_allclose(
        gradient_of_numpy(name, options), UPSTREAM * slope, rtol=1e-5, atol=1e-5
    )


@members
@pytest.mark.parametrize("framework", ["torch", "jax", "tensorflow"])
def test_has_one_gradient_in_all_frameworks(framework, name, options):
    if framework == "torch":
        x = torch.from_numpy(X).requires_grad_()
        call_torch(name, x, KEY, **options).backward(torch.from_numpy(UPSTREAM))
        gradient = x.grad.numpy()
    elif framework == "jax":
        _, pull = jax.vjp(lambda x: call_jax(name, x, KEY, **options), jnp.asarray(X))
        (gradient,) = pull(jnp.asarray(UPSTREAM))
    else:
        x = tf.constant(X)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call_tensorflow(name, x, KEY, **options)
        gradient = tape.gradient(y, x, tf.constant(UPSTREAM))
    assert_bits(np.asarray(gradient), gradient_of_numpy(name, options))


@members
def test_saves_no_tensor_for_the_backward_pass_of_torch(name, options):
    saved = []
    x = torch.from_numpy(X).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        call_torch(name, x, KEY, **options)
    assert saved == []


LAYERS = {
    "torch alpha": (lambda: for_torch.AlphaDropout(P, seed=KEY), "alpha_dropout"),
    "torch feature alpha": (
        lambda: for_torch.FeatureAlphaDropout(P, seed=KEY),
        "feature_alpha_dropout",
    ),
    "torch key": (lambda: for_torch.DropKey(P, seed=KEY), "drop_key"),
    "torch path": (lambda: for_torch.DropPath(P, seed=KEY), "drop_path"),
    "torch depth": (lambda: for_torch.StochasticDepth(P, "row", seed=KEY), "drop_path"),
    "keras alpha": (lambda: for_keras.AlphaDropout(P, seed=KEY), "alpha_dropout"),
    "keras key": (lambda: for_keras.DropKey(P, seed=KEY), "drop_key"),
    "keras path": (lambda: for_keras.DropPath(P, seed=KEY), "drop_path"),
    "flax alpha": (lambda: for_flax.AlphaDropout(P, seed=KEY), "alpha_dropout"),
    "flax key": (lambda: for_flax.DropKey(P, seed=KEY), "drop_key"),
    "flax path": (lambda: for_flax.DropPath(P, seed=KEY), "drop_path"),
}


def call_layer(layer):
    if isinstance(layer, torch.nn.Module):
        return layer(torch.from_numpy(X)).numpy()
    if isinstance(layer, keras.layers.Layer):
        return np.asarray(layer(X, training=True))
    return np.asarray(layer(jnp.asarray(X)))


@pytest.mark.parametrize("layer", LAYERS)
def test_counts_calls_of_layers(layer):
    make, name = LAYERS[layer]
    module = make()
    for step in range(3):
        assert_bits(call_layer(module), call_core(name, X, KEY.fold_in(step)))
    calls = module.calls
    assert int(calls.get_value() if isinstance(calls, flax.nnx.Variable) else calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["torch alpha", "torch depth"])
def test_has_eager_bits_in_compiled_modules(layer):
    make, name = LAYERS[layer]
    torch._dynamo.reset()
    module = torch.compile(make(), fullgraph=True, backend="aot_eager")
    for step in range(2):
        assert_bits(call_layer(module), call_core(name, X, KEY.fold_in(step)))


def test_raises_as_torch_without_channels():
    with pytest.raises(RuntimeError, match="Feature dropout requires at least 2 dimensions"):
        for_torch.feature_alpha_dropout(torch.ones(3), 0.5, True)
    assert for_torch.feature_alpha_dropout(torch.ones(3), 0.5, False).tolist() == [1, 1, 1]


def test_writes_alpha_dropout_in_place():
    for requires_grad in (False, True):
        leaf = torch.from_numpy(X.copy()).requires_grad_(requires_grad)
        x = leaf * 1
        y = for_torch.alpha_dropout(x, P, training=True, inplace=True, key=KEY)
        assert y is x
        assert_bits(x.detach().numpy(), call_core("alpha_dropout", X, KEY))
    y.backward(torch.from_numpy(UPSTREAM))
    assert_bits(leaf.grad.numpy(), gradient_of_numpy("alpha_dropout", {}))


def test_describes_modules_as_their_libraries():
    assert repr(for_torch.DropPath(0.1)) == "DropPath(drop_prob=0.100)"
    assert repr(for_torch.StochasticDepth(0.1, "row")) == "StochasticDepth(p=0.1, mode=row)"
    assert repr(for_torch.AlphaDropout(0.1)) == repr(torch.nn.AlphaDropout(0.1))
    assert repr(for_torch.DropKey(0.1)) == "DropKey(p=0.1, inplace=False)"
    assert repr(for_torch.LockedDropout(0.1)) == "LockedDropout(p=0.1)"
    module = for_torch.LockedDropout(0.1, True, seed=1)
    assert repr(module) == f"LockedDropout(p=0.1, batch_first=True, seed={module.seed})"
    assert isinstance(for_torch.FeatureAlphaDropout(), torch.nn.FeatureAlphaDropout)


def test_lets_schedules_set_the_rate_of_a_path():
    module = for_torch.DropPath(0.1, seed=KEY)
    module.drop_prob = P
    assert_bits(call_layer(module), call_core("drop_path", X, KEY.fold_in(0)))
    with pytest.raises(ValueError, match="dropout probability drop_prob"):
        module.drop_prob = 1.5
    assert module.drop_prob == P


@pytest.mark.parametrize("layer", ["keras alpha", "keras key", "keras path"])
def test_rebuilds_keras_layers_of_their_configuration(layer):
    module = LAYERS[layer][0]()
    copy = type(module).from_config(module.get_config())
    assert copy.get_config() == module.get_config()
    assert_bits(call_layer(copy), call_layer(module))


def test_shares_scores_along_axes():
    expected = family.drop_key(X, P, KEY, broadcast_axes=(1,))
    y = for_torch.drop_key(torch.from_numpy(X), P, key=KEY, broadcast_axes=(1,))
    assert_bits(y.numpy(), expected)
    assert_bits(for_numpy.drop_key(X, P, key=KEY, broadcast_axes=(1,)), expected)
    y = for_tensorflow.drop_key(tf.constant(X), P, (None, 1, None), key=KEY)
    assert_bits(y.numpy(), expected)
    y = for_jax.drop_key(jnp.asarray(X), P, KEY, broadcast_dims=(1,))
    assert_bits(np.asarray(y), expected)
    expected = family.drop_key(X, P, KEY.fold_in(0), broadcast_axes=(1,))
    assert_bits(call_layer(for_keras.DropKey(P, (None, 1, None), seed=KEY)), expected)
    assert_bits(call_layer(for_flax.DropKey(P, broadcast_dims=(1,), seed=KEY)), expected)


def test_locks_masks_of_layers():
    first, second = (call_core("locked_dropout", X, KEY.fold_in(0), axis=axis) for axis in (0, 1))
    for layer, expected in [
        (for_torch.LockedDropout(P, seed=KEY), first),
        (for_torch.LockedDropout(P, batch_first=True, seed=KEY), second),
        (for_keras.SpatialDropout1D(P, seed=KEY), second),
        (for_keras.Dropout(P, (None, 1, None), seed=KEY), second),
        (for_flax.Dropout(P, broadcast_dims=(1,), seed=KEY), second),
    ]:
        assert_bits(call_layer(layer), expected)


def test_locks_masks_of_sequences_without_a_batch():
    for batch_first in (False, True):
        module = for_torch.LockedDropout(P, batch_first, seed=KEY)
        y = module(torch.from_numpy(X[0])).numpy()
        assert_bits(y, call_core("locked_dropout", X[0], KEY.fold_in(0), axis=0))
    with pytest.raises(ValueError, match=r"input must have 2 or 3 axes, got shape \(3,\)"):
        module(torch.ones(3))
    assert int(module.calls) == 1


def test_gives_softmax_finite_gradients():
    scores = torch.from_numpy(X).requires_grad_()
    weights = torch.softmax(for_torch.drop_key(scores, P, key=KEY), -1)
    kept = np.isfinite(call_core("drop_key", X, KEY))
    assert np.array_equal(weights.detach().numpy() > 0, kept)
    np.testing.assert_allclose(weights.detach().sum(-1), 1, rtol=1e-6)
    (weights**2).sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert np.array_equal(scores.grad.numpy() != 0, kept)


def test_gives_zeros_at_rate_one_in_keras():
    y = np.asarray(for_keras.AlphaDropout(1.0, seed=1)(X, training=True))
    assert np.array_equal(y, np.zeros_like(X))


@pytest.mark.parametrize(
    "call",
    [
        lambda: for_torch.drop_path(torch.ones(3), 1.5, training=True),
        lambda: for_jax.drop_path(jnp.ones(3), 1.5, KEY),
        lambda: for_tensorflow.drop_path(tf.ones(3), 1.5, key=KEY),
        lambda: for_numpy.drop_path(np.ones(3), 1.5),
        lambda: for_keras.DropPath(1.5),
        lambda: for_flax.DropPath(1.5),
    ],
    ids=["torch", "jax", "tensorflow", "numpy", "keras", "flax"],
)
def test_refuses_rates_outside_the_interval(call):
    with pytest.raises(ValueError, match=r"1\.5"):
        call()


def test_draws_nothing_in_calls_that_raise():
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match="input must be of a real dtype for alpha dropout"):
        for_torch.alpha_dropout(torch.ones(3, dtype=torch.complex64), 0.5, True)
    assert torch.equal(torch.get_rng_state(), state)
    module = for_torch.DropPath(P, seed=KEY)
    with pytest.raises(ValueError, match="x must have an axis of rows"):
        module(torch.ones(()))
    assert int(module.calls) == 0
