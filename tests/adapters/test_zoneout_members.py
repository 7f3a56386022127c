"""Zoneout in each framework: states and gradients of the core, layers and loops."""

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
NEW, OLD = np.random.default_rng(0).standard_normal((2, 8, 6, 9)).astype("float32")
UPSTREAM = np.random.default_rng(1).standard_normal(NEW.shape).astype("float32")


def call_core(new, old, key, **options):
    return family.zoneout(new, old, P, key, **options)


def call_jax(new, old, key, training=True, **options):
    return for_jax.zoneout(new, old, P, key, deterministic=not training, **options)


def call_keyed(adapter):
    return lambda new, old, key, **options: adapter.zoneout(new, old, P, key=key, **options)


CALLS = {
    "numpy": (np.asarray, call_keyed(for_numpy)),
    "torch": (torch.from_numpy, call_keyed(for_torch)),
    "jax": (jnp.asarray, call_jax),
    "tensorflow": (tf.constant, call_keyed(for_tensorflow)),
    "dask": (lambda x: dask.array.from_array(x, chunks=(3, 6, 4)), call_core),
}
phases = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@phases
@pytest.mark.parametrize("framework", CALLS)
def test_has_the_states_of_the_core(framework, training):
    make, call = CALLS[framework]
    expected, mask = call_core(NEW, OLD, KEY, training=training, return_mask=True)
    y, kept = call(make(NEW), make(OLD), KEY, training=training, return_mask=True)
    assert_bits(np.asarray(y), expected)
    assert np.array_equal(np.asarray(kept), mask)
    y = call(make(NEW), make(OLD), KEY, training=training)
    assert_bits(np.asarray(y), expected)


@phases
@pytest.mark.parametrize("framework", ["torch", "jax", "tensorflow"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_rounds_other_dtypes_as_the_core(framework, dtype, training):
    name = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    new, old = NEW.astype(name), OLD.astype(name)
    expected = call_core(new, old, KEY, training=training).astype("float64")
    _, call = CALLS[framework]
    if framework == "torch":
        new, old = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (NEW, OLD))
        y = call(new, old, KEY, training=training).to(torch.float64)
    elif framework == "jax":
        with jax.enable_x64(True):
            y = np.asarray(call(jnp.asarray(new), jnp.asarray(old), KEY, training=training))
    else:
        y = call(tf.constant(new), tf.constant(old), KEY, training=training).numpy()
    assert_bits(np.asarray(y).astype("float64"), expected)


def compiled_torch(training):
    torch._dynamo.reset()

    # In training, Inductor would see opaque operators and one sum.
    @torch.compile(fullgraph=True, backend="aot_eager" if training else "inductor")
    def function(new, old, step):
        return CALLS["torch"][1](new, old, KEY.fold_in(step), training=training)

    return lambda *states, step: function(*map(torch.from_numpy, states), torch.tensor(step))


def graph(training, jit_compile=False):
    @tf.function(autograph=False, jit_compile=jit_compile)
    def function(new, old, step):
        return CALLS["tensorflow"][1](new, old, KEY.fold_in(step), training=training)

    return lambda *states, step: function(*map(tf.constant, states), tf.constant(step))


def jitted(training):
    function = jax.jit(lambda n, o, i: call_jax(n, o, KEY.fold_in(i), training=training))
    return lambda *states, step: function(*states, step)


COMPILERS = {
    "torch.compile": compiled_torch,
    "jax.jit": jitted,
    "tf.function": graph,
    "XLA": lambda training: graph(training, jit_compile=True),
}


@pytest.mark.slow
@phases
@pytest.mark.parametrize("compiler", COMPILERS)
def test_has_the_same_states_compiled(compiler, training):
    new, old = np.random.default_rng(0).standard_normal((2, 10**5)).astype("float32")
    function = COMPILERS[compiler](training)
    for step in (3, 4):
        expected = call_core(new, old, KEY.fold_in(step), training=training)
        assert_bits(np.asarray(function(new, old, step=step)), expected)


def differentiate(framework, training):
    make, call = CALLS[framework]
    new, old, upstream = map(make, (NEW, OLD, UPSTREAM))
    if framework == "torch":
        new.requires_grad_(), old.requires_grad_()
        call(new, old, KEY, training=training).backward(upstream)
        return new.grad, old.grad
    if framework == "jax":
        return jax.vjp(lambda n, o: call(n, o, KEY, training=training), new, old)[1](upstream)
    with tf.GradientTape() as tape:
        tape.watch([new, old])
        y = call(new, old, KEY, training=training)
    return tape.gradient(y, [new, old], upstream)


@phases
@pytest.mark.parametrize("framework", ["torch", "jax", "tensorflow"])
def test_divides_gradients_by_the_key(framework, training):
    key = KEY if training else None
    expected = for_numpy.zoneout_backward(UPSTREAM, P, key=key, training=training)
    for actual, gradient in zip(differentiate(framework, training), expected, strict=True):
        assert_bits(np.asarray(actual), gradient)


def test_stores_no_mask_for_the_gradient():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        new, old = (torch.from_numpy(x).requires_grad_() for x in (NEW, OLD))
        for_torch.zoneout(new, old, P, key=KEY)
    assert saved == []


@pytest.mark.slow
def test_compiles_gradients_of_both_states():
    torch._dynamo.reset()
    module = torch.compile(for_torch.Zoneout(P, seed=KEY), fullgraph=True, backend="aot_eager")
    for step in range(2):
        new, old = (torch.from_numpy(x).requires_grad_() for x in (NEW, OLD))
        y = module(new, old)
        assert_bits(y.detach().numpy(), call_core(NEW, OLD, KEY.fold_in(step)))
        y.backward(torch.from_numpy(UPSTREAM))
        expected = for_numpy.zoneout_backward(UPSTREAM, P, key=KEY.fold_in(step))
        assert_bits(new.grad.numpy(), expected[0])
        assert_bits(old.grad.numpy(), expected[1])


def test_selects_states_under_vmap():
    states = torch.from_numpy(NEW), torch.from_numpy(OLD)
    draw = lambda n, o: for_torch.zoneout(n, o, P, key=KEY)  # noqa: E731
    y = torch.func.vmap(draw, randomness="different")(*states)
    assert_bits(y.numpy(), call_core(NEW, OLD, KEY))
    y = torch.func.vmap(draw, randomness="same")(*states)
    assert_bits(y[3].numpy(), call_core(NEW[3], OLD[3], KEY))
    call = CALLS["torch"][1]
    steps = torch.func.vmap(lambda n, o, i: call(n, o, KEY.fold_in(i)), randomness="same")
    y = steps(*states, torch.arange(8))
    assert_bits(y[5].numpy(), call_core(NEW[5], OLD[5], KEY.fold_in(5)))
    steps = jax.vmap(lambda n, o, i: call_jax(n, o, KEY.fold_in(i)))(NEW, OLD, np.arange(8))
    assert_bits(np.asarray(steps[5]), call_core(NEW[5], OLD[5], KEY.fold_in(5)))


LAYERS = {
    "torch": lambda: for_torch.Zoneout(P, seed=KEY),
    "keras": lambda: for_keras.Zoneout(P, seed=KEY),
    "flax": lambda: for_flax.Zoneout(P, seed=KEY),
}


def call_layer(layer, training=True):
    if isinstance(layer, torch.nn.Module):
        states = torch.from_numpy(NEW), torch.from_numpy(OLD)
        return layer.train(training)(*states).detach().numpy()
    if isinstance(layer, keras.layers.Layer):
        return np.asarray(layer(NEW, OLD, training=training))
    return np.asarray(layer(jnp.asarray(NEW), jnp.asarray(OLD), deterministic=not training))


@pytest.mark.parametrize("layer", LAYERS)
def test_counts_timesteps(layer):
    module = LAYERS[layer]()
    for step in range(2):
        assert_bits(call_layer(module), call_core(NEW, OLD, KEY.fold_in(step)))
    expected = call_core(NEW, OLD, KEY, training=False)
    assert_bits(call_layer(module, training=False), expected)
    assert int(module.calls) == 2


def test_rebuilds_keras_models_of_states():
    new, old = keras.Input((6, 9)), keras.Input((6, 9))
    model = keras.Model([new, old], for_keras.Zoneout(P, seed=KEY)(new, old))
    copy = keras.Model.from_config(model.get_config())
    assert copy.output_shape == (None, 6, 9)
    expected = call_core(NEW, OLD, KEY.fold_in(0))
    assert_bits(np.asarray(copy([NEW, OLD], training=True)), expected)


def test_describes_modules_of_states():
    assert repr(for_torch.Zoneout(0.25)) == "Zoneout(p=0.25)"
    module = for_torch.Zoneout(0.25, seed=KEY)
    assert repr(module) == f"Zoneout(p=0.25, seed={KEY})"
    traced = torch.fx.symbolic_trace(TwoStates(module))
    assert [node.op for node in traced.graph.nodes].count("call_module") == 1


class TwoStates(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, new, old):
        return self.module(new, old)


def test_runs_a_recurrent_loop():
    cell, zoneout = torch.nn.LSTMCell(3, 4), for_torch.Zoneout(P, seed=KEY)
    x = torch.randn(5, 2, 3)
    h, c = torch.zeros(2, 2, 4).unbind()
    for step in x:
        h_new, c_new = cell(step, (h, c))
        h, c = zoneout(h_new, h), zoneout(c_new, c)
    h.sum().backward()
    assert int(zoneout.calls) == 10
    assert all(p.grad.isfinite().all() for p in cell.parameters())


@pytest.mark.parametrize(
    "call",
    [
        lambda: for_numpy.zoneout(NEW, OLD[:1], P, key=KEY),
        lambda: for_torch.zoneout(torch.ones(2, 3), torch.ones(1, 3), P, key=KEY),
        lambda: for_torch.Zoneout(P)(torch.ones(2, 3), torch.ones(1, 3)),
        lambda: for_jax.zoneout(NEW, OLD[:1], P, KEY),
        lambda: for_flax.Zoneout(P, seed=KEY)(NEW, OLD[:1]),
        lambda: for_tensorflow.zoneout(NEW, OLD[:1], P, key=KEY),
        lambda: for_keras.Zoneout(P, seed=KEY)(NEW, OLD[:1], training=True),
    ],
    ids=["numpy", "torch", "module", "jax", "flax", "tensorflow", "keras"],
)
def test_raises_for_states_of_other_shapes(call):
    with pytest.raises(ValueError, match="old must be of the shape of new"):
        call()
