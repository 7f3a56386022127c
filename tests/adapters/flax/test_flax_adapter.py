"""Dropout for Flax: nnx.Dropout's behaviours, and call numbers that every transform carries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization

import unidrop
from unidrop import Key
from unidrop.adapters.flax import Dropout, DropoutCalls

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
def test_evaluation_is_the_identity_however_it_is_asked_for(kind):
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
def test_a_stream_gives_a_key_at_each_training_call(kind):
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
def test_a_call_takes_its_own_rngs(kind, rngs):
    y = kind(0.5)(jnp.ones((64, 64)), rngs=rngs)
    assert 0.4 < np.mean(np.asarray(y) == 0) < 0.6


@pytest.mark.parametrize("kind", [nnx.Dropout, Dropout])
def test_a_stream_of_the_name_asked_for_is_taken_from_a_calls_rngs(kind):
    module = kind(0.5, rng_collection="noise")
    alone = module(X, rngs=nnx.Rngs(noise=1))
    assert_bits(module(X, rngs=nnx.Rngs(dropout=2, noise=1)), np.asarray(alone))


def test_a_variable_is_taken_as_its_value():
    y = made()(nnx.Variable(jnp.asarray(X)))
    assert isinstance(y, jax.Array)
    assert_bits(y, wanted(0))


@pytest.mark.parametrize("kind", [nnx.Dropout, Dropout])
def test_dimensions_that_are_broadcast_share_a_decision(kind):
    y = np.asarray(kind(0.5, broadcast_dims=(1,), rngs=nnx.Rngs(0))(jnp.ones((64, 8))))
    assert (y == y[:, :1]).all()
    assert len(np.unique(y)) == 2


@pytest.mark.parametrize("kind", [nnx.Dropout, Dropout])
def test_rate_1_gives_zeros_and_a_gradient_of_zeros(kind):
    module = kind(1.0, rngs=nnx.Rngs(0))
    assert not np.asarray(module(X)).any()
    assert not np.asarray(jax.grad(lambda x: kind(1.0, rngs=nnx.Rngs(0))(x).sum())(X)).any()


@pytest.mark.parametrize("kind", [nnx.Dropout, Dropout])
def test_what_is_missing_raises_value_error(kind):
    with pytest.raises(ValueError, match="rngs"):
        kind(0.5)(X)
    with pytest.raises(ValueError, match="deterministic"):
        kind(0.5, deterministic=None)(X)
    with pytest.raises(TypeError, match="rngs"):
        kind(0.5, rngs=3)
    with pytest.raises(TypeError, match="rngs"):
        kind(0.5)(X, rngs="key")


def test_it_is_an_nnx_dropout_and_shows_its_seed_and_calls():
    assert isinstance(made(), nnx.Dropout)
    shown = repr(made())
    assert "rate=0.5" in shown
    assert "seed=Key(0x916" not in shown
    assert f"seed={KEY}" in shown
    assert "calls=DropoutCalls" in shown


@pytest.mark.parametrize("rate", [True, "0.5", np.float32(0.5)], ids=repr)
def test_a_rate_that_is_no_python_number_raises(rate):
    with pytest.raises(TypeError, match="rate must be a Python int or float"):
        Dropout(rate)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_raises(seed):
    with pytest.raises(ValueError, match="seed must be"):
        Dropout(0.5, seed=seed)


# --- Call numbers ---------------------------------------------------------------------------------


def test_training_calls_are_counted_and_others_are_not():
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


def test_a_call_that_is_interrupted_is_not_counted(monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    module = made()
    with monkeypatch.context() as patch:
        patch.setattr("unidrop.adapters.flax.dropout", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module(X)
    assert int(module.calls) == 0
    assert_bits(module(X), wanted(0))


def test_a_key_given_to_a_call_is_the_one_used():
    assert_bits(made()(X, rngs=Key(1).fold_in(5)), wanted(5, key=Key(1)))


@pytest.mark.parametrize("value", [7, np.int64(7), jnp.int32(7), np.uint32(7)], ids=type)
def test_calls_may_be_set(value):
    module = made()
    module.calls = value
    assert isinstance(module.calls, DropoutCalls)
    assert_bits(module(X), wanted(7))
    assert int(module.calls) == 8


def test_calls_may_be_set_from_a_traced_step():
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
def test_calls_that_are_no_number_raise_and_leave_it(value, error):
    module = made()
    with pytest.raises(error, match="calls"):
        module.calls = value
    assert int(module.calls) == 0


@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_after_2_to_the_32_calls_the_number_begins_again(transform):
    run = transform(lambda module, x: module(x))
    module = made()
    module.calls = 2**32 - 1
    assert_bits(run(module, X), wanted(2**32 - 1))
    assert int(module.calls) == 0
    assert_bits(run(module, X), wanted(0))


def test_a_module_without_a_seed_has_no_calls_and_says_what_to_do():
    module = Dropout(0.5, rngs=nnx.Rngs(0))
    taught = "made without a seed, .* make it with seed=, an int or a unidrop.Key"
    with pytest.raises(AttributeError, match=taught):
        module.calls = 3
    with pytest.raises(AttributeError, match=taught):
        _ = module.calls
    assert not hasattr(module, "calls")
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        _ = module.other


def test_nnx_jit_carries_the_calls_and_traces_once():
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
def test_a_gradient_counts_one_call_and_is_by_its_mask(transform, outer):
    run = transform(lambda module, x: module(x))
    gradient = outer(nnx.grad(lambda module, x: (run(module, x) * X).sum(), argnums=1))
    module = made()
    for call in range(3):
        assert_bits(gradient(module, jnp.ones_like(X)), wanted(call))
        assert int(module.calls) == call + 1


def test_a_module_used_twice_in_a_rematerialised_block_counts_both_calls_once():
    block = nnx.remat(lambda module, x: module(module(x)))
    module = made()
    y, gradient = nnx.value_and_grad(lambda m, x: block(m, x).sum(), argnums=1)(module, X)
    assert_bits(gradient, wanted(0, wanted(1, np.ones_like(X))))
    assert int(module.calls) == 2
    np.testing.assert_allclose(y, wanted(1, wanted(0)).sum(), rtol=1e-5)


def test_nnx_scan_carries_the_calls():
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(module, x):
        return module, module(x)

    module, ys = run(made(), jnp.asarray(np.stack([X] * 4)))
    for call, y in enumerate(ys):
        assert_bits(y, wanted(call))
    assert int(module.calls) == 4


def test_layers_made_under_vmap_have_keys_and_calls_of_their_own():
    layers = nnx.vmap(lambda i: Dropout(0.5, seed=Key(7).fold_in(i)))(jnp.arange(3))
    ys = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, X)
    for i, y in enumerate(ys):
        assert_bits(y, wanted(0, key=Key(7).fold_in(i)))
    assert np.asarray(layers.calls[...]).tolist() == [1, 1, 1]


def test_split_and_merged_it_continues():
    module = made()
    module(X)
    merged = nnx.merge(*nnx.split(module))
    assert_bits(merged(X), wanted(1))


def test_the_state_holds_the_call_number_alone_and_resumes():
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


def test_an_optimizer_of_parameters_leaves_the_calls_alone():
    module = made()
    assert not jax.tree.leaves(nnx.state(module, nnx.Param))
    assert jax.tree.leaves(nnx.state(module, DropoutCalls))


# --- State that is saved --------------------------------------------------------------------------


def test_a_stream_of_nnx_dropout_continues_in_ours_and_back():
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


def test_a_stream_does_not_fit_a_module_with_a_seed():
    with pytest.raises(ValueError, match="count"):
        nnx.update(made(), nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0))))


def test_a_state_without_calls_leaves_the_number():
    module = made()
    module.calls = 5
    own = nnx.state(module)
    nnx.replace_by_pure_dict(own, {})
    nnx.update(module, own)
    assert_bits(module(X), wanted(5))


def test_a_key_is_saved_as_its_words_by_name():
    saved = serialization.to_state_dict(Key(5 << 32 | 7))
    assert {name: int(word) for name, word in saved.items()} == {"lo": 7, "hi": 5}


@pytest.mark.parametrize("key", [Key(2**64 - 3), jax.tree.map(jnp.asarray, KEY)], ids=type)
def test_a_key_is_saved_and_loaded_by_flax(key):
    state = {"key": key, "step": 3}
    loaded = serialization.from_bytes(state, serialization.to_bytes(state))["key"]
    assert [int(word) for word in loaded.words] == [int(word) for word in key.words]
