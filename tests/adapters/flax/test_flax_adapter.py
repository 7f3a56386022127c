"""Dropout for Flax: nnx.Dropout's behavior, and call numbers that every transform carries."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization

import unidrop
from unidrop import Key
from unidrop.adapters.flax import Dropout, DropoutCalls, assign_seeds

KEY = Key(42).fold_in("encoder/0")
X = np.linspace(-2, 2, 48, dtype="float32").reshape(6, 8)


def wanted(call, x=X, key=KEY, rate=0.5, **options):
    with unidrop.force_path("portable"):
        return unidrop.dropout(np.asarray(x), rate, key.fold_in(call), **options)


def assert_bits(actual, expected):
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def made(**options):
    return Dropout(0.5, **{"seed": KEY, **options})


# --- As nnx.Dropout -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nnx.Dropout, Dropout])
def test_returns_input_in_evaluation_of_any_kind(kind):
    module = kind(0.5, rngs=nnx.Rngs(0))
    assert module(X, deterministic=True) is X
    module.eval()
    assert module(X) is X
    assert (module(X, deterministic=False) == 0).any()
    module.train()
    assert (module(X) == 0).any()
    module.set_attributes(deterministic=True)
    assert module(X) is X
    assert nnx.view(module, deterministic=True)(X) is X
    assert kind(0.5, deterministic=True)(X) is X
    assert kind(0.0)(X) is X


@pytest.mark.parametrize("kind", [nnx.Dropout, Dropout])
def test_draws_key_of_stream_at_each_training_call(kind):
    module = kind(0.5, rngs=nnx.Rngs(dropout=1))
    first, second = module(X), module(X)
    assert (np.asarray(first) != np.asarray(second)).any()
    assert int(module.rngs.count[...]) == 2
    again = kind(0.5, rngs=nnx.Rngs(dropout=1))
    assert_bits(again(X), np.asarray(first))


@pytest.mark.parametrize("kind", [nnx.Dropout, Dropout])
@pytest.mark.parametrize(
    "rngs", [nnx.Rngs(dropout=3), nnx.Rngs(dropout=3).dropout, jax.random.key(3)], ids=type
)
def test_accepts_rngs_of_call(kind, rngs):
    y = kind(0.5)(jnp.ones((64, 64)), rngs=rngs)
    assert 0.4 < np.mean(np.asarray(y) == 0) < 0.6


@pytest.mark.parametrize("kind", [nnx.Dropout, Dropout])
def test_draws_from_named_stream_of_call(kind):
    module = kind(0.5, rng_collection="noise")
    alone = module(X, rngs=nnx.Rngs(noise=1))
    assert_bits(module(X, rngs=nnx.Rngs(dropout=2, noise=1)), np.asarray(alone))


def test_accepts_variable():
    y = made()(nnx.Variable(jnp.asarray(X)))
    assert isinstance(y, jax.Array)
    assert_bits(y, wanted(0))


@pytest.mark.parametrize("kind", [nnx.Dropout, Dropout])
def test_shares_decisions_along_broadcast_dims(kind):
    y = np.asarray(kind(0.5, broadcast_dims=(1,), rngs=nnx.Rngs(0))(jnp.ones((64, 8))))
    assert (y == y[:, :1]).all()
    assert len(np.unique(y)) == 2


@pytest.mark.parametrize("kind", [nnx.Dropout, Dropout])
def test_gives_zeros_and_zero_gradient_at_rate_1(kind):
    module = kind(1.0, rngs=nnx.Rngs(0))
    assert not np.asarray(module(X)).any()
    assert not np.asarray(jax.grad(lambda x: kind(1.0, rngs=nnx.Rngs(0))(x).sum())(X)).any()


def test_refuses_masked_arrays_in_evaluation():
    for module in (made(deterministic=True), Dropout(0.0)):
        with pytest.raises(TypeError, match="inputs must not be a masked array"):
            module(np.ma.array(X))


@pytest.mark.parametrize("kind", [nnx.Dropout, Dropout])
def test_rejects_missing_rngs_and_deterministic(kind):
    with pytest.raises(ValueError, match="rngs"):
        kind(0.5)(X)
    with pytest.raises(ValueError, match="deterministic"):
        kind(0.5, deterministic=None)(X)
    with pytest.raises(TypeError, match="rngs"):
        kind(0.5, rngs=3)
    with pytest.raises(TypeError, match="rngs"):
        kind(0.5)(X, rngs="key")


def test_is_nnx_dropout_that_shows_seed_and_calls():
    assert isinstance(made(), nnx.Dropout)
    shown = repr(made())
    assert "rate=0.5" in shown
    assert "seed=Key(0x916" not in shown
    assert f"seed={KEY}" in shown
    assert "calls=DropoutCalls" in shown


def test_exports_symbolic_shapes_without_dropout_only():
    like = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), 8), "float32")
    module = Dropout(0.5, seed=KEY, deterministic=True)
    jax.export.export(jax.jit(module))(like)
    with pytest.raises(TypeError, match=r"^inputs must have a shape of integers, got \(batch, 8\)"):
        jax.export.export(jax.jit(lambda x: module(x, deterministic=False)))(like)
    assert module.calls.get_value() == 0


@pytest.mark.parametrize("rate", [True, "0.5", np.float32(0.5)], ids=repr)
def test_rejects_non_python_rate(rate):
    with pytest.raises(TypeError, match="rate must be a Python int or float"):
        Dropout(rate)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_rejects_seed_outside_64_bits(seed):
    with pytest.raises(ValueError, match="seed must be"):
        Dropout(0.5, seed=seed)


# --- Call numbers ---------------------------------------------------------------------------------


def test_counts_training_calls_alone():
    module = made()
    for call in range(3):
        assert int(module.calls) == call
        assert_bits(module(X), wanted(call))
        module(X, deterministic=True)
        module(X, rngs=Key(1))
    with pytest.raises(TypeError, match="inputs must be of a floating-point dtype"):
        module(jnp.ones(3, jnp.int32))
    assert int(module.calls) == 3
    idle = Dropout(0.0, seed=1)
    idle(X)
    assert int(idle.calls) == 0


def test_rolls_back_interrupted_call(monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    module = made()
    with monkeypatch.context() as patch:
        patch.setattr("unidrop.adapters.flax._drop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module(X)
    assert int(module.calls) == 0
    assert_bits(module(X), wanted(0))


def test_uses_key_given_to_call():
    assert_bits(made()(X, rngs=Key(1).fold_in(5)), wanted(5, key=Key(1)))


@pytest.mark.parametrize("value", [7, np.int64(7), jnp.int32(7), np.uint32(7)], ids=type)
def test_accepts_call_number(value):
    module = made()
    module.calls = value
    assert isinstance(module.calls, DropoutCalls)
    assert_bits(module(X), wanted(7))
    assert int(module.calls) == 8


def test_accepts_traced_step_as_call_number():
    @nnx.jit
    def run(module, step):
        module.calls = step
        return module(X)

    module = made()
    assert_bits(run(module, 11), wanted(11))
    assert int(module.calls) == 12


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1, ValueError),
        (2**32, ValueError),
        (1.5, TypeError),
        ("1", TypeError),
        (jnp.zeros(2, jnp.uint32), ValueError),
        (jnp.float32(1), TypeError),
    ],
)
def test_rejects_bad_call_number_and_keeps_old(value, error):
    module = made()
    with pytest.raises(error, match="calls"):
        module.calls = value
    assert int(module.calls) == 0


@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_restarts_call_number_after_2_to_the_32(transform):
    run = transform(lambda module, x: module(x))
    module = made()
    module.calls = 2**32 - 1
    assert_bits(run(module, X), wanted(2**32 - 1))
    assert int(module.calls) == 0
    assert_bits(run(module, X), wanted(0))


def test_explains_that_calls_need_a_seed():
    module = Dropout(0.5, rngs=nnx.Rngs(0))
    taught = "made without a seed, .* make it with seed=, an int or a unidrop.Key"
    with pytest.raises(AttributeError, match=taught):
        module.calls = 3
    with pytest.raises(AttributeError, match=taught):
        _ = module.calls
    assert not hasattr(module, "calls")
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        _ = module.other


def test_carries_calls_through_nnx_jit_and_traces_once():
    traces = []

    @nnx.jit
    def run(module, x):
        traces.append(1)
        return module(x)

    module = made()
    for call in range(100):
        assert_bits(run(module, X), wanted(call))
    assert int(module.calls) == 100
    assert len(traces) == 1


@pytest.mark.parametrize("transform", [lambda f: f, nnx.remat], ids=["plain", "remat"])
@pytest.mark.parametrize("outer", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_counts_gradient_once_and_uses_its_mask(transform, outer):
    run = transform(lambda module, x: module(x))
    gradient = outer(nnx.grad(lambda module, x: (run(module, x) * X).sum(), argnums=1))
    module = made()
    for call in range(3):
        assert_bits(gradient(module, jnp.ones_like(X)), wanted(call))
        assert int(module.calls) == call + 1


def test_counts_both_calls_in_remat_once():
    block = nnx.remat(lambda module, x: module(module(x)))
    module = made()
    y, gradient = nnx.value_and_grad(lambda m, x: block(m, x).sum(), argnums=1)(module, X)
    assert_bits(gradient, wanted(0, wanted(1, np.ones_like(X))))
    assert int(module.calls) == 2
    np.testing.assert_allclose(y, wanted(1, wanted(0)).sum(), rtol=1e-5)


def test_carries_calls_through_nnx_scan():
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(module, x):
        return module, module(x)

    module, ys = run(made(), jnp.asarray(np.stack([X] * 4)))
    for call, y in enumerate(ys):
        assert_bits(y, wanted(call))
    assert int(module.calls) == 4


def test_gives_layers_made_in_vmap_keys_and_calls():
    layers = nnx.vmap(lambda i: Dropout(0.5, seed=Key(7).fold_in(i)))(jnp.arange(3))
    ys = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, X)
    for i, y in enumerate(ys):
        assert_bits(y, wanted(0, key=Key(7).fold_in(i)))
    assert np.asarray(layers.calls[...]).tolist() == [1, 1, 1]


def test_continues_after_split_and_merge():
    module = made()
    module(X)
    merged = nnx.merge(*nnx.split(module))
    assert_bits(merged(X), wanted(1))


def test_resumes_from_state_of_call_number_alone():
    module = made()
    for _ in range(3):
        module(X)
    state = nnx.to_pure_dict(nnx.state(module))
    assert set(state) == {"calls"}
    assert set(nnx.to_pure_dict(nnx.state(made(rngs=nnx.Rngs(0))))) == {"calls"}
    saved = serialization.to_bytes(state)
    resumed = made()
    own = nnx.state(resumed, DropoutCalls)
    nnx.replace_by_pure_dict(own, serialization.from_bytes(nnx.to_pure_dict(own), saved))
    nnx.update(resumed, own)
    assert_bits(resumed(X), wanted(3))


def test_keeps_calls_out_of_parameters():
    module = made()
    assert not jax.tree.leaves(nnx.state(module, nnx.Param))
    assert jax.tree.leaves(nnx.state(module, DropoutCalls))


# --- State that is saved --------------------------------------------------------------------------


def test_continues_stream_of_nnx_dropout_and_back():
    theirs = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=1))
    theirs(X)
    ours, straight = (Dropout(0.5, rngs=nnx.Rngs(dropout=1)) for _ in range(2))
    straight(X)
    nnx.update(ours, nnx.state(theirs))
    assert_bits(ours(X), np.asarray(straight(X)))
    theirs(X)
    back = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=1))
    nnx.update(back, nnx.state(ours))
    assert_bits(back(X), np.asarray(theirs(X)))


def test_rejects_state_of_stream_with_seed():
    with pytest.raises(ValueError, match="count"):
        nnx.update(made(), nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0))))


def test_keeps_calls_if_state_has_none():
    module = made()
    module.calls = 5
    own = nnx.state(module)
    nnx.replace_by_pure_dict(own, {})
    nnx.update(module, own)
    assert_bits(module(X), wanted(5))


def test_saves_key_as_its_named_words():
    saved = serialization.to_state_dict(Key(5 << 32 | 7))
    assert {name: int(word) for name, word in saved.items()} == {"lo": 7, "hi": 5}


@pytest.mark.parametrize("key", [Key(2**64 - 3), jax.tree.map(jnp.asarray, KEY)], ids=type)
def test_saves_and_loads_key(key):
    state = {"key": key, "step": 3}
    loaded = serialization.from_bytes(state, serialization.to_bytes(state))["key"]
    assert [int(word) for word in loaded.words] == [int(word) for word in key.words]


# --- Seeds of a model -----------------------------------------------------------------------------


class Block(nnx.Module):
    """One layer of a model, and a layer that is not seeded."""

    def __init__(self, seed=None):
        self.dropout, self.rate_0 = Dropout(0.5, seed=seed), Dropout(0.0, seed=seed)

    def __call__(self, x):
        return self.dropout(self.rate_0(x))


class Model(nnx.Module):
    """A stack of blocks."""

    def __init__(self, seed=None, count=2):
        self.layers = nnx.List([Block(seed) for _ in range(count)])
        self.same = self.layers[0].dropout

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Stack(nnx.Module):
    """A stack of three blocks that one scan runs."""

    def __init__(self, seed=None):
        self.blocks = nnx.vmap(lambda i: Block(seed))(jnp.arange(3))

    def __call__(self, x):
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.blocks)


def test_assigns_seeds_by_path():
    model = Model(seed=1)
    model.layers[1].dropout.calls = 7
    assert assign_seeds(model, 42) is model
    for i, layer in enumerate(model.layers):
        assert layer.dropout.seed == Key(42).fold_in(f"layers.{i}.dropout")
        assert layer.rate_0.seed == Key(42).fold_in(f"layers.{i}.rate_0")
    assert [int(layer.dropout.calls) for layer in model.layers] == [0, 7]


def test_assigns_seed_to_unseeded_module_and_from_key():
    model = assign_seeds(nnx.Sequential(lambda x: x, Dropout(0.5, rngs=nnx.Rngs(0))), KEY)
    assert_bits(model(jnp.asarray(X)), wanted(0, key=KEY.fold_in("layers.1")))
    assert int(model.layers[1].calls) == 1


def test_uses_new_seeds_in_compiled_step():
    step = nnx.jit(lambda model, x: model(x))
    model = assign_seeds(Model(count=1), 1)
    step(model, X)
    assign_seeds(model, 2)
    assert_bits(step(model, X), wanted(1, key=Key(2).fold_in("layers.0.dropout")))


@pytest.mark.parametrize("options", [{"seed": 1}, {"rngs": nnx.Rngs(0)}], ids=["seed", "rngs"])
def test_assigns_seeds_to_modules_made_in_vmap(options):
    if "rngs" in options:
        make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Dropout(0.5, rngs=rngs)))
        layers = make(options["rngs"])
    else:
        layers = nnx.vmap(lambda i: Dropout(0.5, **options))(jnp.arange(3))
    assign_seeds(layers, 42)
    for call in range(2):
        ys = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, X)
        for i, y in enumerate(ys):
            assert_bits(y, wanted(call, key=Key(42).fold_in("").fold_in(i)))


@pytest.mark.parametrize(
    ("model", "seed", "error", "message"),
    [
        (nnx.Sequential(), 42, ValueError, "model must have a module of unidrop"),
        (nnx.Dropout(0.5), 42, ValueError, "model must have a module of unidrop"),
        (Dropout(0.5, seed=KEY), "42", TypeError, "seed must be"),
        (Dropout(0.5, seed=KEY), -1, ValueError, "seed must be"),
        ([Dropout(0.5)], 42, TypeError, "model must be an nnx.Module, got list"),
    ],
)
def test_refuses_to_assign_seeds(model, seed, error, message):
    with pytest.raises(error, match=message):
        assign_seeds(model, seed)
    assert getattr(model, "seed", KEY) == KEY


# --- Modules with one seed ------------------------------------------------------------------------

TWINS = r"'layers.0.dropout' and 'layers.1.dropout' have one seed.*assign_seeds"


@pytest.mark.parametrize("outer", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_warns_once_of_modules_with_one_seed(outer):
    model, run = Model(seed=KEY), outer(lambda model, x: model(x))
    with pytest.warns(UserWarning, match=TWINS) as caught:
        run(model, X)
    assert len(caught) == 1
    run(model, X)
    assert int(model.same.calls) == 2


def test_warns_of_cloned_modules():
    half = Model(seed=KEY, count=1)
    model = nnx.Sequential(half, nnx.clone(half))
    with pytest.warns(UserWarning, match=r"'layers.0.layers.0.dropout' and 'layers.1.layers.0."):
        model(jnp.asarray(X))


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 7), ("calls", 5), ("rate", 0.0), ("deterministic", True)]
)
def test_warns_only_of_equal_masks(name, value):
    model = Model(seed=KEY)
    setattr(model.layers[1].dropout, name, value)
    model(X)


def test_compares_no_call_numbers_in_compiled_function():
    model = Model(seed=KEY)
    model.layers[1].dropout.calls = 1000
    with pytest.warns(UserWarning, match="one seed, and perhaps one call number, so they may drop"):
        nnx.jit(lambda model, x: model(x))(model, X)


def test_warns_of_neither_evaluation_nor_other_models():
    twins = Model(seed=KEY)
    twins.eval()
    twins(X)
    half = Model(seed=KEY, count=1)
    for model in (half, nnx.clone(half), assign_seeds(Model(seed=KEY), 42)):
        model(X)


def test_warns_of_module_with_changed_seed():
    model = assign_seeds(Model(), 42)
    model(X)
    model.layers[1].dropout.seed = model.same.seed
    with pytest.warns(UserWarning, match=TWINS):
        model(X)


def test_warns_once_of_one_seed_made_in_vmap():
    model = Stack(seed=KEY)
    with pytest.warns(UserWarning, match=r"the 3 modules 'blocks.dropout' have one seed") as caught:
        model(jnp.asarray(X))
    assert len(caught) == 1
    model(jnp.asarray(X))
    assign_seeds(model, 42)(jnp.asarray(X))
    site = Key(42).fold_in("blocks.dropout")
    expected = X
    for i in range(3):
        expected = wanted(3, expected, key=site.fold_in(i))
    assert_bits(model(jnp.asarray(X)), expected)


def test_counts_nothing_if_warning_is_an_error():
    model = Model(seed=KEY)
    with pytest.raises(UserWarning, match="one seed"):  # pytest makes warnings errors
        model(X)
    assert int(model.same.calls) == 0


class Big:
    """An object that its owner wants to free."""


def test_keeps_no_variables_of_callers_alive():
    big = Big()
    reference = weakref.ref(big)
    made()(X)
    del big
    gc.collect()
    assert reference() is None


def test_leaks_no_tracer_that_jax_finds():
    with jax.checking_leaks():
        nnx.jit(lambda model, x: model(x))(assign_seeds(Model(), 42), jnp.asarray(X))
