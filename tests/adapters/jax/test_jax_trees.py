"""A key in trees: JAX, Equinox, Flax and Orbax take it apart, fill it and put it together."""

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import unidrop
from unidrop import Key
from unidrop.adapters.jax import dropout

KEY = Key(2**63 + 5)


def get_kind(value):
    return type(value).__name__


TREE = {"key": KEY, "x": jnp.ones(3)}


def test_has_the_same_leaves_each_time():
    first, second = jax.tree.leaves(KEY), jax.tree.leaves(Key(int(KEY)))
    assert [(leaf.dtype, leaf.shape) for leaf in first] == [(np.uint32, ())] * 2
    assert all(a is b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "value", [True, None, 1.5, "text", object(), (), jnp.ones(3)], ids=get_kind
)
def test_holds_any_object(value):
    key = jax.tree.map(lambda _: value, KEY)
    assert isinstance(key, Key)
    assert repr(key)
    leaves = jax.tree.leaves(key, is_leaf=lambda leaf: leaf is value)
    assert [leaf is value for leaf in leaves] == [True, True]


@pytest.mark.parametrize("value", [True, False, -1, 2**40])
def test_returns_objects_like_words(value):
    leaves = jax.tree.leaves(jax.tree.map(lambda _: value, KEY))
    assert leaves == [value, value]
    assert [type(leaf) for leaf in leaves] == [type(value)] * 2


@pytest.mark.parametrize("value", [True, None, 1.5, 7], ids=repr)
def test_drops_nothing_by_objects_like_words(value):
    key = jax.tree.map(lambda _: value, KEY)
    with pytest.raises((TypeError, ValueError), match="key"):
        dropout(jnp.ones(3), 0.5, key)
    assert key != KEY


def test_rebuilds_key_of_its_leaves():
    leaves, structure = jax.tree.flatten(KEY)
    assert jax.tree.unflatten(structure, leaves) == KEY


def test_is_partitioned_and_combined():
    for flag in (True, False):
        parts = eqx.partition(TREE, jax.tree.map(lambda _, flag=flag: flag, TREE))
        assert eqx.combine(*parts)["key"] == KEY


def test_is_replaced_in_tree():
    assert eqx.tree_at(lambda tree: tree["key"], TREE, Key(4))["key"] == Key(4)


def test_leaves_transformed_functions():
    numbers, keys = eqx.filter_vmap(lambda i: (i, KEY.fold_in(i)))(jnp.arange(3))
    words = np.stack([np.asarray(word) for word in keys.words])
    for i in numbers:
        assert Key.from_words(*map(int, words[:, i])) == KEY.fold_in(int(i))
    words = eqx.filter_jit(lambda tree: tree)(TREE)["key"].words
    assert tuple(map(int, words)) == KEY.words


def test_is_serialized_by_flax():
    data = flax.serialization.to_bytes(TREE)
    restored = flax.serialization.from_bytes({"key": Key(0), "x": jnp.zeros(3)}, data)
    assert restored["key"] == KEY


def test_is_saved_by_orbax(tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"key": KEY})
        restored = checkpointer.restore(tmp_path / "checkpoint", item={"key": Key(0)})
    assert isinstance(restored["key"], Key)
    assert [int(word) for word in restored["key"].words] == list(KEY.words)


def test_refuses_batch_of_keys_in_core():
    keys = jax.vmap(KEY.fold_in)(jnp.arange(3))
    with pytest.raises(ValueError, match=r"key must be one key, got a batch .* shape \(3,"):
        unidrop.dropout(jnp.ones(3), 0.5, keys)
