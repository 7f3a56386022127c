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


def test_a_key_of_jax_is_the_key_of_its_64_bits():
    data = np.array([0x89ABCDEF, 0x01234567], np.uint32)
    expected = wanted(values((50,)), Key(0x89ABCDEF01234567))
    for key in (data, jnp.asarray(data), jax.random.wrap_key_data(jnp.asarray(data))):
        assert_bits(dropout(values((50,)), RATE, key), expected)
        assert_bits(jax.jit(lambda x, k: dropout(x, RATE, k))(values((50,)), key), expected)


@pytest.mark.parametrize("name", ["rbg", "unsafe_rbg"])
def test_a_key_of_another_generator_raises_and_names_it(name):
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
def test_a_batch_of_keys_raises_and_says_what_to_do(keys):
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
def test_the_core_refuses_a_batch_of_keys_and_says_what_to_do(transform, function):
    keys = jax.vmap(Key(0).fold_in)(jnp.arange(3))
    with pytest.raises(ValueError, match=r"a batch of them, of shape \(3,\): map the function"):
        transform(function)(keys)


@pytest.mark.parametrize("key", [42, None, jnp.ones(2), "key", np.uint32(3)], ids=repr)
def test_what_is_no_key_raises(key):
    with pytest.raises(TypeError, match=r"key must be a unidrop\.Key"):
        dropout(jnp.ones(3), RATE, key)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63 + 5, 2**64 - 1])
def test_a_key_goes_through_a_tree_as_itself(seed):
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
def test_a_key_holds_whatever_a_tree_puts_for_a_word(leaf):
    held = jax.tree.map(lambda _: leaf, KEY)
    assert isinstance(held, Key)
    assert held.words == (leaf, leaf)
    assert held == held
    assert isinstance(hash(held), int)
    assert repr(held)
    assert jax.tree.leaves(held, is_leaf=lambda v: v is None) == [leaf, leaf]


def test_axes_may_stand_for_words():
    keys = jax.vmap(Key(1).fold_in)(jnp.arange(3))
    axes = jax.tree.map(lambda _: 0, keys)
    y = jax.vmap(lambda k, x: dropout(x, RATE, k), in_axes=(axes, None))(keys, jnp.ones(9))
    for i in range(3):
        assert_bits(y[i], wanted(np.ones(9, "float32"), Key(1).fold_in(i)))


def test_a_key_is_carried_by_a_scan_in_both_worlds():
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
def test_a_step_is_zero_extended_whatever_its_dtype(step):
    x = values((33,))
    number = int(step) % 2**32
    assert_bits(jax.jit(step_function)(x, step), wanted(x, KEY.fold_in(number)))


@pytest.mark.parametrize("step", [np.int64(2**40 + 3), np.int64(-1), np.uint64(2**64 - 2)], ids=str)
def test_a_traced_step_has_64_bits_where_there_are_those(step):
    x = values((33,))
    with jax.enable_x64(True):
        y = jax.jit(step_function)(x, step)
    assert_bits(y, wanted(x, KEY.fold_in(int(step) % 2**64)))


def test_a_numpy_step_inside_a_trace_is_its_number():
    x = values((33,))
    y = jax.jit(lambda x: step_function(x, np.int64(2**40)))(x)
    assert_bits(y, wanted(x, KEY.fold_in(2**40)))


def test_a_step_that_is_differentiated_too_has_no_gradient():
    x = values((33,))

    def function(x, step):
        return step_function(x, step).sum()

    gradient, none = jax.grad(function, argnums=(0, 1), allow_int=True)(x, 3)
    assert_bits(gradient, wanted(np.ones_like(x), KEY.fold_in(3)))
    assert none.dtype == jax.dtypes.float0
