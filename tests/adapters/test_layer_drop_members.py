"""LayerDrop in each framework: the decisions of the core, stacks and traces."""

import jax
import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from flax import nnx
from jax import numpy as jnp

import unidrop.adapters.flax as for_flax
import unidrop.adapters.jax as for_jax
import unidrop.adapters.keras as for_keras
import unidrop.adapters.tensorflow as for_tensorflow
import unidrop.adapters.torch as for_torch
from unidrop import Key, family

KEY = Key(42).fold_in("stack").fold_in(7)
P, COUNT = 0.5, 6
NUMBERS = range(1, COUNT + 1)


def get_expected(key):
    """Return what a stack makes of 0, if layer n appends the digit n."""
    kept = family.layer_drop(COUNT, P, key)
    return float("".join(str(n) for n, keeps in zip(NUMBERS, kept, strict=True) if keeps) or 0)


STEPS = [get_expected(KEY.fold_in(step)) for step in range(4)]


class Append(torch.nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return (x * 10 + self.number) * self.weight


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = for_torch.LayerDropModuleList(P, map(Append, NUMBERS), seed=KEY)

    def forward(self, x):
        x = x + 0
        for layer in self.layers:
            x = layer(x)
        return x * 1


@pytest.mark.parametrize(
    "decide",
    [
        lambda key: for_torch.layer_drop(COUNT, P, key=key),
        lambda key: for_tensorflow.layer_drop(COUNT, P, key=key),
        lambda key: family.layer_drop(COUNT, P, key, xp=jnp),
    ],
    ids=["torch", "tensorflow", "jax"],
)
def test_has_the_decisions_of_the_core(decide):
    assert np.array_equal(np.asarray(decide(KEY)), family.layer_drop(COUNT, P, KEY))


def test_yields_kept_modules_in_training():
    stack = Stack()
    assert [stack(torch.zeros(())).item() for _ in STEPS] == STEPS
    assert int(stack.layers.calls) == len(STEPS)
    assert stack.eval()(torch.zeros(())).item() == 123456
    assert int(stack.layers.calls) == len(STEPS)
    layers = Stack().layers
    assert [layers(torch.zeros(())).item() for _ in STEPS] == STEPS


def test_gives_no_gradient_to_skipped_modules():
    layers = Stack().layers
    layers(torch.zeros(())).backward()
    kept = family.layer_drop(COUNT, P, KEY.fold_in(0))
    gradients = [parameter.grad is not None for parameter in layers.parameters()]
    # The first kept layer multiplies a sum with 0, and it has a gradient too.
    assert gradients == kept.tolist()


def test_draws_decisions_without_a_seed():
    layers = for_torch.LayerDropModuleList(P, map(Append, NUMBERS))
    torch.manual_seed(0)
    first = [len(list(layers)) for _ in range(20)]
    torch.manual_seed(0)
    assert [len(list(layers)) for _ in range(20)] == first
    assert len(set(first)) > 2


def test_resumes_the_decisions_of_a_stack():
    stack, resumed = Stack(), Stack()
    first = [stack(torch.zeros(())).item() for _ in range(2)]
    resumed.load_state_dict(stack.state_dict())
    rest = [resumed(torch.zeros(())).item() for _ in range(2)]
    assert first + rest == STEPS
    plain = torch.nn.ModuleList(map(Append, NUMBERS))
    resumed.layers.load_state_dict(plain.state_dict())


def test_sees_all_modules_in_other_uses():
    layers = Stack().layers
    assert repr(layers).count("Append()") == COUNT
    assert all(layer in layers for layer in layers.eval())
    layers.train()
    assert all(layers[i] in layers for i in range(COUNT))
    assert type(layers[1:3]) is torch.nn.ModuleList
    assert [layer.number for layer in layers[1:3]] == [2, 3]
    assert len(layers + [Append(9)]) == COUNT + 1  # noqa: RUF005 # the sum of module lists
    assert int(layers.calls) == 0
    layers.append(Append(7))
    del layers[0]
    assert len(layers) == COUNT


def test_joins_all_modules_of_lists():
    layers, others = Stack().layers, Stack().layers
    assert len(layers + others) == 2 * COUNT
    assert len(torch.nn.ModuleList([Append(9)]) + others) == COUNT + 1
    assert len(for_torch.LayerDropModuleList(P, others, seed=1)) == COUNT
    layers += others
    assert len(layers.extend(others)) == 3 * COUNT
    assert int(layers.calls) == int(others.calls) == 0


# Dynamo looks at the gradient of a tensor between two graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.slow
def test_decides_anew_in_compiled_stacks():
    torch._dynamo.reset()
    stack = Stack()
    compiled = torch.compile(stack, backend="eager")
    for expected in STEPS:
        y = compiled(torch.zeros(()))
        y.backward()
        assert y.item() == expected
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_decide"):
        torch.compile(Stack(), backend="eager", fullgraph=True)(torch.zeros(()))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x, step):
        kept = for_torch.layer_drop(COUNT, P, key=KEY.fold_in(step))
        for number in NUMBERS:
            x = torch.where(kept[number - 1], x * 10 + number, x)
        return x

    for step, expected in enumerate(STEPS):
        assert run(torch.zeros(()), torch.tensor(step)).item() == expected
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "trace",
    [
        torch.fx.symbolic_trace,
        lambda stack: torch.export.export(stack, (torch.zeros(()),)),
        lambda stack: torch.jit.trace(stack, (torch.zeros(()),)),
    ],
    ids=["fx", "export", "jit"],
)
def test_refuses_to_trace_a_choice(trace):
    with pytest.raises(RuntimeError, match="LayerDropModuleList cannot be traced in training"):
        trace(Stack())
    trace(Stack().eval())


def test_skips_layers_of_jax():
    def run(key, x):
        for i, number in enumerate(NUMBERS):
            x = for_jax.layer_drop(lambda x, n=number: 10 * x + n, x, P, key, index=i)
        return x

    def scan(key, x):
        def step(x, layer):
            i, number = layer
            return for_jax.layer_drop(lambda x: 10 * x + number, x, P, key, index=i), None

        return jax.lax.scan(step, x, (jnp.arange(COUNT), jnp.arange(1.0, COUNT + 1)))[0]

    zero = jnp.zeros(())
    jitted = jax.jit(lambda i: run(KEY.fold_in(i), zero))
    scanned = jax.jit(lambda i: scan(KEY.fold_in(i), zero))
    for step, expected in enumerate(STEPS):
        assert run(KEY.fold_in(step), zero) == expected
        assert jitted(step) == expected
        assert scanned(step) == expected
    mapped = jax.vmap(lambda i: run(KEY.fold_in(i), zero))(jnp.arange(4))
    assert mapped.tolist() == STEPS
    assert for_jax.layer_drop(lambda x: x + 1, zero, P, index=0, deterministic=True) == 1


def test_differentiates_layers_of_jax():
    def run(weights):
        x = jnp.ones(())
        for i in range(COUNT):
            x = for_jax.layer_drop(lambda x, i=i: x * weights[i], x, P, KEY, index=i)
        return x

    gradient = jax.grad(run)(jnp.ones(COUNT))
    assert np.array_equal(gradient != 0, family.layer_drop(COUNT, P, KEY))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_skips_modules_of_flax(is_compiled):
    layers = [Block(number) for number in NUMBERS]
    module = for_flax.LayerDrop(layers, P, seed=KEY)
    call = nnx.jit(lambda module, x: module(x)) if is_compiled else for_flax.LayerDrop.__call__
    for expected in STEPS:
        assert call(module, jnp.zeros(())) == expected
    ran = sum(family.layer_drop(COUNT, P, KEY.fold_in(step)) for step in range(4))
    assert [int(layer.dropout.calls.get_value()) for layer in layers] == ran.tolist()
    assert module(jnp.zeros(()), deterministic=True) == 123456


class Block(nnx.Module):
    """A layer with state, which only counts if the layer runs."""

    def __init__(self, number):
        self.number = number
        self.dropout = for_flax.Dropout(0.5, seed=Key(number))

    def __call__(self, x):
        return 10 * x + self.number + 0 * self.dropout(x)


def make_keras(**options):
    layers = [keras.layers.Rescaling(10.0, number) for number in NUMBERS]
    return for_keras.LayerDrop(layers, P, seed=KEY, **options)


def test_replaces_outputs_of_keras_layers():
    layer, zero = make_keras(), np.zeros((1, 1), "float32")
    assert [float(layer(zero, training=True)[0, 0]) for _ in STEPS] == STEPS
    assert float(layer(zero)[0, 0]) == 123456
    assert layer.calls == len(STEPS)
    traced = tf.function(lambda layer: layer(zero, training=True)[0, 0], autograph=False)
    other = make_keras()
    assert [float(traced(other)) for _ in STEPS] == STEPS


def test_trains_and_rebuilds_stacks_of_keras():
    inputs = keras.Input((3,))
    layers = [keras.layers.Dense(3), for_keras.Dropout(0.5, seed=Key(1)), keras.layers.Dense(3)]
    model = keras.Model(inputs, for_keras.LayerDrop(layers, P, seed=KEY, name="stack")(inputs))
    copy = keras.Model.from_config(model.get_config())
    copy.set_weights(model.get_weights())
    assert len(copy.get_weights()) == len(model.get_weights())
    x = np.ones((4, 3), "float32")
    for one in (model, copy):
        one.compile("sgd", "mse")
        one.fit(x, x, batch_size=2, epochs=2, verbose=0)
        assert one.get_layer("stack").calls == 4
        assert one.get_layer("stack").layers[1].calls == 4
    for one, other in zip(model.get_weights(), copy.get_weights(), strict=True):
        assert np.array_equal(one, other)


def test_assigns_seeds_to_layers_of_each_kind():
    seeded = [
        for_keras.GaussianDropout(0.5),
        for_keras.GaussianNoise(0.5),
        for_keras.Zoneout(0.5),
        for_keras.WordDropout(0.5, unk_id=1),
        for_keras.LayerDrop([for_keras.Dropout(0.5)], P),
    ]
    model = for_keras.assign_seeds(keras.Sequential(seeded), 7)
    seeds = [Key(7).fold_in(f"layers.{i}") for i in range(len(seeded))]
    assert [layer.seed for layer in model.layers] == seeds
    assert seeded[-1].layers[0].seed == Key(7).fold_in("layers.4.layers.0")


def test_refuses_keras_layers_that_change_the_shape():
    layer = for_keras.LayerDrop([keras.layers.Dense(2)], P, seed=KEY)
    with pytest.raises(ValueError, match="layers must keep the shape and the dtype"):
        layer(np.ones((1, 3), "float32"), training=True)
    assert layer.calls == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: for_torch.LayerDropModuleList(1.5),
        lambda: for_torch.layer_drop(3, 1.5, key=KEY),
        lambda: for_jax.layer_drop(lambda x: x, jnp.ones(2), 1.5, KEY, index=0),
        lambda: for_flax.LayerDrop([], 1.5),
        lambda: for_tensorflow.layer_drop(3, 1.5, key=KEY),
        lambda: for_keras.LayerDrop([], 1.5),
    ],
    ids=["list", "torch", "jax", "flax", "tensorflow", "keras"],
)
def test_refuses_rates_outside_the_interval(call):
    with pytest.raises(ValueError, match=r"1\.5"):
        call()


def test_refuses_bad_layers_of_jax():
    with pytest.raises(TypeError, match="cond"):
        for_jax.layer_drop(lambda x: x[:1], jnp.ones(2), P, KEY, index=0)
    with pytest.raises(ValueError, match="start"):
        for_jax.layer_drop(lambda x: x, jnp.ones(2), P, KEY, index=-1)
