"""Keys in JAX: of `jax.random`, as trees, traced, folded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax_by_the_core import KEY, RATE, assert_bits, step_function, values, wanted

import unidrop
from unidrop import Key
from unidrop.adapters.jax import dropout


def test_accepts_jax_key_as_its_64_bits():
    data = np.array([0x89ABCDEF, 0x01234567], np.uint32)
    expected = wanted(values((50,)), Key(0x89ABCDEF01234567))
    for key in (data, jnp.asarray(data), jax.random.wrap_key_data(jnp.asarray(data))):
        assert_bits(dropout(values((50,)), RATE, key), expected)
        assert_bits(jax.jit(lambda x, k: dropout(x, RATE, k))(values((50,)), key), expected)


@pytest.mark.parametrize("name", ["rbg", "unsafe_rbg"])
def test_rejects_jax_key_of_another_generator(name):
    with pytest.raises(ValueError, match=name):
        dropout(jnp.ones(3), RATE, jax.random.key(0, impl=name))
    with pytest.raises(ValueError, match="rbg"):
        dropout(jnp.ones(3), RATE, jax.random.PRNGKey(0, impl=name))


@pytest.mark.parametrize(
    "keys",
    [
        lambda: jax.random.split(jax.random.key(0), 3),
        lambda: jax.random.split(jax.random.PRNGKey(0), 3),
        lambda: jax.vmap(Key(0).fold_in)(jnp.arange(3)),
    ],
    ids=["typed", "raw", "Key"],
)
def test_rejects_batch_of_keys_and_advises_vmap(keys):
    with pytest.raises(ValueError, match=r"a batch of them, of shape \(3,\): apply jax\.vmap"):
        dropout(jnp.ones(3), RATE, keys())


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "function",
    [
        lambda k: unidrop.dropout(jnp.ones(3), RATE, k),
        lambda k: unidrop.keep_mask((3,), RATE, k, xp=jnp),
    ],
    ids=["dropout", "keep_mask"],
)
def test_rejects_batch_of_keys_in_core(transform, function):
    keys = jax.vmap(Key(0).fold_in)(jnp.arange(3))
    with pytest.raises(ValueError, match=r"a batch of them, of shape \(3,\): map the function"):
        transform(function)(keys)


@pytest.mark.parametrize("key", [42, None, jnp.ones(2), "key", np.uint32(3)], ids=repr)
def test_rejects_non_key(key):
    with pytest.raises(TypeError, match=r"key must be a unidrop\.Key"):
        dropout(jnp.ones(3), RATE, key)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63 + 5, 2**64 - 1])
def test_passes_through_tree_as_itself(seed):
    key = Key(seed)
    leaves, tree = jax.tree.flatten(key)
    assert [leaf.dtype for leaf in leaves] == [np.uint32, np.uint32]
    assert jax.tree.unflatten(tree, leaves) == key
    lo, hi = jax.jit(lambda k: k.words)(key)
    assert int(hi) << 32 | int(lo) == seed


@pytest.mark.parametrize(
    "leaf",
    [None, object(), 0, jax.ShapeDtypeStruct((), "uint32"), "leaf", jnp.zeros(3)],
    ids=["None", "object", "axis", "shape", "text", "array"],
)
def test_holds_any_leaf_for_a_word(leaf):
    held = jax.tree.map(lambda _: leaf, KEY)
    assert isinstance(held, Key)
    assert held.words == (leaf, leaf)
    assert held == held
    assert isinstance(hash(held), int)
    assert repr(held)
    assert jax.tree.leaves(held, is_leaf=lambda v: v is None) == [leaf, leaf]


def test_accepts_axes_in_place_of_words():
    keys = jax.vmap(Key(1).fold_in)(jnp.arange(3))
    axes = jax.tree.map(lambda _: 0, keys)
    y = jax.vmap(lambda k, x: dropout(x, RATE, k), in_axes=(axes, None))(keys, jnp.ones(9))
    for i in range(3):
        assert_bits(y[i], wanted(np.ones(9, "float32"), Key(1).fold_in(i)))


def test_is_carried_by_scan_with_x64_and_without():
    def turn(key, _):
        key = key.fold_in(1)
        return key, key.words

    expected = KEY
    for _ in range(3):
        expected = expected.fold_in(1)
    for x64 in (False, True):
        with jax.enable_x64(x64):
            lo, hi = lax.scan(turn, KEY, None, length=3)[0].words
        assert int(hi) << 32 | int(lo) == int(expected)


@pytest.mark.parametrize("step", [np.int32(7), np.uint32(2**32 - 1), np.int32(-1), 7, np.uint8(7)])
def test_zero_extends_step_of_any_dtype(step):
    x = values((33,))
    number = int(step) % 2**32
    assert_bits(jax.jit(step_function)(x, step), wanted(x, KEY.fold_in(number)))


@pytest.mark.parametrize("step", [np.int64(2**40 + 3), np.int64(-1), np.uint64(2**64 - 2)], ids=str)
def test_accepts_traced_step_of_64_bits(step):
    x = values((33,))
    with jax.enable_x64(True):
        y = jax.jit(step_function)(x, step)
    assert_bits(y, wanted(x, KEY.fold_in(int(step) % 2**64)))


def test_accepts_numpy_step_inside_trace():
    x = values((33,))
    y = jax.jit(lambda x: step_function(x, np.int64(2**40)))(x)
    assert_bits(y, wanted(x, KEY.fold_in(2**40)))


def test_gives_no_gradient_of_step():
    x = values((33,))

    def function(x, step):
        return step_function(x, step).sum()

    gradient, none = jax.grad(function, argnums=(0, 1), allow_int=True)(x, 3)
    assert_bits(gradient, wanted(np.ones_like(x), KEY.fold_in(3)))
    assert none.dtype == jax.dtypes.float0


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_accepts_words_of_other_integer_types(transform):
    x, leaves = values((33,)), jax.tree.structure(KEY)
    drop = transform(lambda *words: dropout(x, RATE, jax.tree.unflatten(leaves, words)))
    for dtype in ("uint8", "int16", "int32"):
        assert_bits(drop(*np.array([5, 7], dtype)), wanted(x, Key.from_words(5, 7)))
    with pytest.raises(TypeError, match="key must be an integer"):
        drop(*np.float32([5, 7]))
