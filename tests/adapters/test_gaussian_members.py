"""Gaussian dropout and noise in each framework: bits, gradients and layers of the core's ones."""

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
X = (3 * np.random.default_rng(0).standard_normal((16, 30, 9))).astype("float32")
UPSTREAM = np.random.default_rng(1).standard_normal(X.shape).astype("float32")

members = pytest.mark.parametrize("name", ["gaussian_dropout", "gaussian_noise"])


def call_core(name, x, key, **options):
    return getattr(family, name)(x, P, key, **options)


def call_keyed(adapter):
    return lambda name, x, key, **options: getattr(adapter, name)(x, P, key=key, **options)


CALLS = {
    "numpy": (np.asarray, call_keyed(for_numpy)),
    "torch": (torch.from_numpy, call_keyed(for_torch)),
    "jax": (jnp.asarray, call_keyed(for_jax)),
    "tensorflow": (tf.constant, call_keyed(for_tensorflow)),
    "dask": (lambda x: dask.array.from_array(x, chunks=(7, 30, 4)), call_core),
}
frameworks = pytest.mark.parametrize("framework", ["torch", "jax", "tensorflow"])


@members
@pytest.mark.parametrize("framework", CALLS)
def test_has_the_noise_of_the_core(framework, name):
    make, call = CALLS[framework]
    assert_bits(np.asarray(call(name, make(X), KEY)), call_core(name, X, KEY))


@members
@pytest.mark.parametrize("framework", CALLS)
def test_gives_windows_of_noise(framework, name):
    make, call = CALLS[framework]
    window = {"global_shape": X.shape, "start": (3, 5, 2)}
    y = call(name, make(X[3:9, 5:10, 2:7]), KEY, **window)
    assert_bits(np.asarray(y), call_core(name, X, KEY)[3:9, 5:10, 2:7])


@members
@frameworks
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounds_narrow_noise_as_the_core(framework, dtype, name):
    x = X.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    expected = call_core(name, x, KEY).astype("float32")
    call = CALLS[framework][1]
    if framework == "torch":
        y = call(name, torch.from_numpy(X).to(getattr(torch, dtype)), KEY).to(torch.float32)
    elif framework == "jax":
        y = call(name, jnp.asarray(x), KEY).astype("float32")
    else:
        y = tf.cast(call(name, tf.constant(x), KEY), tf.float32)
    assert_bits(np.asarray(y), expected)


@members
def test_has_the_noise_of_the_core_in_double_precision(name):
    x = X.astype("float64")
    expected = call_core(name, x, KEY)
    assert_bits(CALLS["torch"][1](name, torch.from_numpy(x), KEY).numpy(), expected)
    assert_bits(CALLS["tensorflow"][1](name, tf.constant(x), KEY).numpy(), expected)
    with jax.enable_x64(True):
        assert_bits(np.asarray(CALLS["jax"][1](name, jnp.asarray(x), KEY)), expected)


def compiled_torch(name):
    torch._dynamo.reset()

    # One member by Inductor, whose kernels take long to compile, and the other by the graph.
    @torch.compile(fullgraph=True, backend="inductor" if name == "gaussian_noise" else "aot_eager")
    def function(x, step):
        return getattr(for_torch, name)(x, P, key=KEY.fold_in(step))

    return lambda x, step: function(torch.from_numpy(x), torch.tensor(step))


def graph(name, jit_compile=False):
    @tf.function(autograph=False, jit_compile=jit_compile)
    def function(x, step):
        return getattr(for_tensorflow, name)(x, P, key=KEY.fold_in(step))

    return lambda x, step: function(tf.constant(x), tf.constant(step))


COMPILERS = {
    "torch.compile": compiled_torch,
    "jax.jit": lambda name: jax.jit(lambda x, i: getattr(for_jax, name)(x, P, KEY.fold_in(i))),
    "tf.function": graph,
    "XLA": lambda name: graph(name, jit_compile=True),
}


@pytest.mark.slow
@members
@pytest.mark.parametrize("compiler", COMPILERS)
def test_has_the_same_noise_compiled(compiler, name):
    function = COMPILERS[compiler](name)
    for step in (3, 4):
        expected = call_core(name, X, KEY.fold_in(step))
        assert_bits(np.asarray(function(X, step)), expected)


def compute_gradient(framework, name):
    call = CALLS[framework][1]
    if framework == "torch":
        x = torch.from_numpy(X).requires_grad_()
        call(name, x, KEY).backward(torch.from_numpy(UPSTREAM))
        return x.grad.numpy()
    if framework == "jax":
        _, pull = jax.vjp(lambda x: call(name, x, KEY), jnp.asarray(X))
        return pull(jnp.asarray(UPSTREAM))[0]
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = call(name, x, KEY)
    return tape.gradient(y, x, tf.constant(UPSTREAM))


@frameworks
def test_multiplies_gradients_by_the_factors(framework):
    expected = for_numpy.gaussian_dropout_backward(UPSTREAM, P, key=KEY)
    assert_bits(expected, call_core("gaussian_dropout", UPSTREAM, KEY))
    assert_bits(np.asarray(compute_gradient(framework, "gaussian_dropout")), expected)


@frameworks
def test_passes_gradients_of_noise_unchanged(framework):
    assert_bits(np.asarray(compute_gradient(framework, "gaussian_noise")), UPSTREAM)


@members
def test_saves_no_noise_for_the_backward_pass_of_torch(name):
    saved = []
    x = torch.from_numpy(X).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        getattr(for_torch, name)(x, P, key=KEY)
    assert saved == []


@pytest.mark.slow
def test_differentiates_compiled_gaussian_dropout():
    torch._dynamo.reset()
    x = torch.from_numpy(X).requires_grad_()
    function = torch.compile(for_torch.gaussian_dropout, fullgraph=True, backend="aot_eager")
    function(x, P, key=KEY).backward(torch.from_numpy(UPSTREAM))
    assert_bits(x.grad.numpy(), call_core("gaussian_dropout", UPSTREAM, KEY))


def test_follows_transformations_of_functions():
    def drop(x):
        return for_torch.gaussian_dropout(x, P, key=KEY)

    x, expected = torch.from_numpy(X), call_core("gaussian_dropout", X, KEY)
    assert_bits(torch.func.vmap(drop, randomness="different")(x).numpy(), expected)
    same = torch.func.vmap(drop, randomness="same")(x)
    assert_bits(same[3].numpy(), call_core("gaussian_dropout", X[3], KEY))
    steps = jax.vmap(lambda i: for_jax.gaussian_dropout(jnp.asarray(X), P, KEY.fold_in(i)))
    expected = call_core("gaussian_dropout", X, KEY.fold_in(2))
    assert_bits(np.asarray(steps(jnp.arange(3))[2]), expected)
    tangents = jax.jvp(lambda x: for_jax.gaussian_dropout(x, P, KEY), (X,), (UPSTREAM,))[1]
    assert_bits(np.asarray(tangents), call_core("gaussian_dropout", UPSTREAM, KEY))


LAYERS = {
    "torch dropout": (lambda: for_torch.GaussianDropout(P, seed=KEY), "gaussian_dropout"),
    "torch noise": (lambda: for_torch.GaussianNoise(P, seed=KEY), "gaussian_noise"),
    "keras dropout": (lambda: for_keras.GaussianDropout(P, seed=KEY), "gaussian_dropout"),
    "keras noise": (lambda: for_keras.GaussianNoise(P, seed=KEY), "gaussian_noise"),
    "flax dropout": (lambda: for_flax.GaussianDropout(P, seed=KEY), "gaussian_dropout"),
    "flax noise": (lambda: for_flax.GaussianNoise(P, seed=KEY), "gaussian_noise"),
}


def call_layer(layer, **options):
    if isinstance(layer, torch.nn.Module):
        return layer(torch.from_numpy(X)).detach().numpy()
    if isinstance(layer, keras.layers.Layer):
        return np.asarray(layer(X, **{"training": True, **options}))
    return np.asarray(layer(jnp.asarray(X)))


@pytest.mark.parametrize("layer", LAYERS)
def test_counts_calls_with_noise(layer):
    make, name = LAYERS[layer]
    module = make()
    for step in range(3):
        assert_bits(call_layer(module), call_core(name, X, KEY.fold_in(step)))
    calls = module.calls
    assert int(calls.get_value() if isinstance(calls, flax.nnx.Variable) else calls) == 3


@pytest.mark.parametrize("layer", LAYERS)
def test_is_the_identity_in_evaluation(layer):
    module = LAYERS[layer][0]()
    if not isinstance(module, keras.layers.Layer):
        module.eval()
    assert_bits(call_layer(module, training=False), X)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["torch dropout", "torch noise"])
def test_has_eager_noise_in_compiled_modules(layer):
    make, name = LAYERS[layer]
    torch._dynamo.reset()
    module = torch.compile(make(), fullgraph=True, backend="aot_eager")
    for step in range(2):
        assert_bits(call_layer(module), call_core(name, X, KEY.fold_in(step)))


@members
def test_writes_noise_in_place(name):
    for requires_grad in (False, True):
        leaf = torch.from_numpy(X.copy()).requires_grad_(requires_grad)
        x = leaf * 1
        assert getattr(for_torch, name)(x, P, inplace=True, key=KEY) is x
        assert_bits(x.detach().numpy(), call_core(name, X, KEY))
    x.backward(torch.from_numpy(UPSTREAM))
    factors = name == "gaussian_dropout"
    assert_bits(leaf.grad.numpy(), call_core(name, UPSTREAM, KEY) if factors else UPSTREAM)
    out = np.empty_like(X)
    assert getattr(for_numpy, name)(X, P, key=KEY, out=out) is out
    assert_bits(out, call_core(name, X, KEY))


def test_describes_noise_modules():
    assert repr(for_torch.GaussianDropout(0.1)) == "GaussianDropout(p=0.1, inplace=False)"
    assert repr(for_torch.GaussianNoise(2, seed=1)) == (
        "GaussianNoise(stddev=2.0, inplace=False, seed=Key(0x0000000000000001))"
    )


@pytest.mark.parametrize("layer", ["torch noise", "flax noise", "keras noise"])
def test_lets_schedules_set_the_deviation(layer):
    module = LAYERS[layer][0]()
    module.stddev = 0.5
    y = call_layer(module)
    assert_bits(y, family.gaussian_noise(X, 0.5, KEY.fold_in(0)))
    with pytest.raises(ValueError, match="stddev"):
        module.stddev = -1.0
    module.stddev = 0.0
    assert_bits(call_layer(module), X)
    module.stddev = 0.5
    assert_bits(call_layer(module), family.gaussian_noise(X, 0.5, KEY.fold_in(1)))


@pytest.mark.parametrize("layer", ["keras dropout", "keras noise"])
def test_rebuilds_keras_layers_with_noise(layer):
    module = LAYERS[layer][0]()
    copy = type(module).from_config(module.get_config())
    assert copy.get_config() == module.get_config()
    assert_bits(call_layer(copy), call_layer(module))
    native = getattr(keras.layers, type(module).__name__)
    assert isinstance(module, native)
    assert set(module.get_config()) == set(native(P).get_config())


@pytest.mark.parametrize(
    "call",
    [
        lambda: for_torch.gaussian_dropout(torch.ones(3), 1.0),
        lambda: for_jax.gaussian_dropout(jnp.ones(3), 1.0, KEY),
        lambda: for_tensorflow.gaussian_dropout(tf.ones(3), 1.0, key=KEY),
        lambda: for_numpy.gaussian_dropout(np.ones(3), 1.0),
        lambda: for_keras.GaussianDropout(1.0, seed=1)(X, training=True),
        lambda: for_flax.GaussianDropout(1.0, seed=1)(jnp.ones(3)),
    ],
    ids=["torch", "jax", "tensorflow", "numpy", "keras", "flax"],
)
def test_refuses_rate_one(call):
    with pytest.raises(ValueError, match="the rate of Gaussian dropout must be below 1, got 1"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: for_torch.gaussian_noise(torch.ones(3), -0.5),
        lambda: for_torch.GaussianNoise(-0.5),
        lambda: for_jax.gaussian_noise(jnp.ones(3), -0.5, KEY),
        lambda: for_tensorflow.gaussian_noise(tf.ones(3), -0.5, key=KEY),
        lambda: for_numpy.gaussian_noise(np.ones(3), -0.5),
        lambda: for_keras.GaussianNoise(-0.5),
        lambda: for_flax.GaussianNoise(-0.5),
    ],
    ids=["torch", "module", "jax", "tensorflow", "numpy", "keras", "flax"],
)
def test_refuses_negative_deviations(call):
    with pytest.raises(ValueError, match=r"stddev.*-0\.5"):
        call()


def test_counts_no_call_that_raises():
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match="input must be of a real dtype for Gaussian noise"):
        for_torch.gaussian_noise(torch.ones(3, dtype=torch.complex64), 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    module = for_torch.GaussianDropout(P, seed=KEY)
    with pytest.raises(TypeError, match="input must be of a floating-point dtype"):
        module(torch.ones(3, dtype=torch.int32))
    assert int(module.calls) == 0
