"""Attention for Flax: a function for ``attention_fn``, and a module whose calls have numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx, serialization

import unidrop
from unidrop import Key
from unidrop.adapters.flax import (
    Dropout,
    DropoutCalls,
    MultiHeadAttention,
    assign_seeds,
    dot_product_attention,
)
from unidrop.conformance.attention import attention

KEY, RATE = Key(42).fold_in("encoder/0"), 0.3
DROPS = {"dropout_rate": RATE, "dropout_rng": KEY}
_RANDOM = np.random.default_rng(0)


def values(*shape):
    return _RANDOM.standard_normal(shape).astype("float32")


X = values(2, 5, 8)


@pytest.fixture(autouse=True, scope="module")
def less_optimization():
    """Let XLA optimize less, because that needs most of the time of these tests."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * max(1, abs(expected).max()))


# --- The function ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("broadcast", [True, False])
def test_shares_mask_as_flax_defines(batch, broadcast):
    query, key = values(*batch, 5, 2, 7) / 8, values(*batch, 7, 2, 7) / 8
    value = np.broadcast_to(np.eye(7, dtype="float32")[:, None], key.shape)
    options = {"broadcast_dropout": broadcast, **DROPS}
    y = np.asarray(dot_product_attention(query, key, value, **options))
    shape = (5, 7) if broadcast else (*batch, 2, 5, 7)
    with unidrop.force_path("portable"):
        expected = unidrop.keep_mask(shape, RATE, KEY)
    assert (y.swapaxes(-2, -3) != 0).tolist() == np.broadcast_to(
        expected, (*batch, 2, 5, 7)
    ).tolist()


def test_equals_materialized_attention():
    query, key, value = values(2, 3, 5, 4, 8), values(2, 3, 7, 2, 8), values(2, 3, 7, 2, 6)
    mask, bias = _RANDOM.random((3, 1, 5, 7)) < 0.5, values(5, 7)
    mask[..., 0] = True
    upstream = values(2, 3, 5, 4, 6)

    @jax.jit
    def run(*arrays):
        f = lambda *x: dot_product_attention(  # noqa: E731
            *x, bias, mask.astype("float32"), broadcast_dropout=False, **DROPS
        )
        y, vjp = jax.vjp(f, *arrays)
        return y, *vjp(upstream)

    turned = (x.swapaxes(-2, -3) for x in (query, key, value))
    y, pullback = attention(*turned, RATE, KEY, bias=np.where(mask, bias, -np.inf))
    expected = y, *pullback(upstream.swapaxes(-2, -3))
    for a, e in zip(run(query, key, value), expected, strict=True):
        assert_close(a, e.swapaxes(-2, -3))


@pytest.mark.slow
def test_is_function_of_flax_if_nothing_drops():
    arrays = values(2, 5, 2, 8), values(2, 7, 2, 8), values(2, 7, 2, 8)
    for options in ({"dropout_rate": RATE, "deterministic": True}, {}):
        expected = nnx.dot_product_attention(*arrays, **options)
        assert (dot_product_attention(*arrays, **options) == expected).all()
    empty = dot_product_attention(arrays[0], *(x[:, :0] for x in arrays[1:]), **DROPS)
    assert (empty == 0).all()


def test_accepts_other_heads_of_values_and_dtype():
    query, key, value = values(5, 4, 8), values(7, 4, 8), values(7, 2, 8)
    y = dot_product_attention(query, key, value, dtype=jnp.bfloat16, **DROPS)
    assert y.dtype == jnp.bfloat16
    wide = dot_product_attention(query, key, value.repeat(2, axis=1), **DROPS)
    np.testing.assert_allclose(y.astype("float32"), wide, atol=0.05)


BAD = {
    "lengths": {"value": values(2, 6, 2, 8)},
    "heads": {"query": values(2, 5, 3, 8)},
    "features": {"query": values(2, 5, 2, 7)},
    "batch": {"query": values(1, 5, 2, 8)},
    "axes": {"query": values(5, 2, 8)},
    "mask": {"mask": np.ones((2, 2, 5, 6), bool)},
    "bias": {"bias": values(2, 3, 5, 7)},
}


@pytest.mark.parametrize("name", BAD)
def test_raises_error_of_flax(name):
    arrays = {"query": values(2, 5, 2, 8), "key": values(2, 7, 2, 8), "value": values(2, 7, 2, 8)}
    arguments = arrays | BAD[name] | {"dropout_rate": RATE}
    with pytest.raises(Exception) as its:  # noqa: PT011 # of any type
        nnx.dot_product_attention(**arguments, dropout_rng=jax.random.key(0))
    with pytest.raises(type(its.value)) as mine:
        dot_product_attention(**arguments, dropout_rng=KEY)
    assert str(mine.value) == str(its.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_rate": np.float32(0.3)}, TypeError, "dropout_rate must be a Python int or flo"),
        ({"dropout_rng": None}, TypeError, "dropout_rng must be a unidrop.Key"),
        ({"mask": np.ones((2, 2, 5, 5), bool)}, ValueError, "mask must have a shape that broadc"),
    ],
    ids=["rate", "key", "mask"],
)
def test_rejects_invalid_arguments(options, error, message):
    query = values(1, 5, 2, 8)
    with pytest.raises(error, match=message):
        dot_product_attention(query, query, query, **{**DROPS, **options})


@pytest.mark.slow
def test_serves_attention_of_linen():
    options = {"num_heads": 2, "dropout_rate": RATE, "broadcast_dropout": False}
    mine = linen.MultiHeadDotProductAttention(**options, attention_fn=dot_product_attention)
    plain = linen.MultiHeadDotProductAttention(**options)
    variables = mine.init(jax.random.key(0), X, deterministic=True)
    assert_close(
        mine.apply(variables, X, deterministic=True), plain.apply(variables, X, deterministic=True)
    )
    apply = jax.jit(
        lambda step: mine.apply(
            variables,
            X,
            dropout_rng=KEY.fold_in(step),
            deterministic=False,
            sow_weights=True,
            mutable=["intermediates"],
        )
    )
    y, sown = apply(3)
    (weights,) = sown["intermediates"]["attention_weights"]
    kept = unidrop.keep_mask((2, 2, 5, 5), RATE, KEY.fold_in(3)) / (1 - RATE)
    parameters = variables["params"]
    value = np.einsum("bsf,fhd->bshd", X, parameters["value"]["kernel"])
    mixed = np.einsum("bhts,bshd->bthd", weights * kept, value)
    assert_close(y, np.einsum("bthd,hdf->btf", mixed, parameters["out"]["kernel"]))


# --- The module -----------------------------------------------------------------------------------


def made(kind=MultiHeadAttention, **options):
    defaults = {"dropout_rate": RATE, "deterministic": False, "decode": False}
    if kind is MultiHeadAttention:
        defaults["seed"] = KEY
    return kind(2, 8, rngs=nnx.Rngs(0), **{**defaults, **options})


def words(key):
    return tuple(map(int, key.words))


def recorded(keys):
    """Return an attention function that records the keys of its calls."""

    def attend(query, key, value, *, dropout_rng, **options):
        keys.append(dropout_rng)
        return query

    return attend


@pytest.mark.slow
def test_gives_each_training_call_its_key():
    keys = []
    module = made(attention_fn=recorded(keys))
    for call in range(3):
        assert int(module.calls) == call
        module(X)
        module(X, deterministic=True)
        module(X, rngs=Key(7))
        module(X, rngs=nnx.Rngs(dropout=1))
        with pytest.raises(ValueError, match="Incompatible input dimension"):
            module(X[..., :3])
    assert [words(key) for key in keys[::4]] == [words(KEY.fold_in(call)) for call in range(3)]
    assert keys[1::4] == [None] * 3
    assert keys[2::4] == [Key(7)] * 3
    module.calls = 7
    module(X)
    assert words(keys[-1]) == words(KEY.fold_in(7))


def test_equals_function_under_key_of_call():
    module = made(broadcast_dropout=False)
    query, key, value = (f(X) for f in (module.query, module.key, module.value))
    for call in range(2):
        drops = {"dropout_rate": RATE, "dropout_rng": KEY.fold_in(call)}
        y = dot_product_attention(query, key, value, broadcast_dropout=False, **drops)
        assert_close(module(X), np.asarray(module.out(y)))


@pytest.mark.slow
def test_is_module_of_flax_in_evaluation():
    mine, its = made(seed=None), made(nnx.MultiHeadAttention)
    assert isinstance(mine, nnx.MultiHeadAttention)
    assert (mine(X, deterministic=True) == its(X, deterministic=True)).all()
    nnx.update(mine, nnx.state(its))
    assert jax.tree.structure(nnx.state(mine)) == jax.tree.structure(nnx.state(its))
    assert (mine(X) != mine(X)).any()
    assert int(mine.rngs.count[...]) == int(its.rngs.count[...]) + 2
    with pytest.raises(AttributeError, match="counts no calls"):
        mine.calls  # noqa: B018
    with pytest.raises(ValueError, match="deterministic"):
        made(deterministic=None)(X)


def test_counts_nothing_without_dropout():
    module = made(dropout_rate=0.0)
    module(X)
    assert int(module.calls) == 0


@pytest.mark.parametrize("rate", [True, np.float32(0.5)], ids=repr)
def test_rejects_non_python_rate(rate):
    with pytest.raises(TypeError, match="dropout_rate must be a Python int or float"):
        made(dropout_rate=rate)


def test_resumes_from_its_state():
    module, resumed = made(), made()
    module(X)
    saved = serialization.to_bytes(nnx.to_pure_dict(nnx.state(module)))
    state = nnx.state(resumed)
    nnx.replace_by_pure_dict(state, serialization.from_bytes(nnx.to_pure_dict(state), saved))
    nnx.update(resumed, state)
    assert int(resumed.calls) == 1
    assert (resumed(X) == module(X)).all()
    assert [type(v) for _, v in nnx.to_flat_state(nnx.state(module, DropoutCalls))] == [
        DropoutCalls
    ]


@pytest.mark.slow
def test_carries_calls_through_transformations():
    module, plain = made(), made()

    def loss(module, x):
        return (module(x) ** 2).sum()

    step = nnx.jit(nnx.grad(nnx.remat(loss)))
    for call in range(2):
        expected = nnx.grad(loss)(plain, X)
        for a, e in zip(jax.tree.leaves(step(module, X)), jax.tree.leaves(expected), strict=True):
            assert_close(a, np.asarray(e))
        assert int(module.calls) == call + 1


def test_gets_seed_by_its_name_in_a_model():
    model = nnx.List([Dropout(0.5), made(seed=None)])
    holder = nnx.Module()
    holder.layers = model
    assign_seeds(holder, 42)
    assert model[1].seed == Key(42).fold_in("layers.1")
    assert int(model[1].calls) == 0


def test_warns_of_modules_with_one_seed():
    class Model(nnx.Module):
        def __init__(self):
            self.first, self.second = made(attention_fn=recorded([])), Dropout(0.5, seed=KEY)

        def __call__(self, x):
            return self.second(self.first(x))

    with pytest.warns(UserWarning, match="'first' and 'second' have one seed") as caught:
        Model()(X)
    assert caught[0].filename == __file__
