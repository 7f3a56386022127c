"""Dropout in the branches and loops of `jax.lax`; `test_jax_transformations.py` has more loops."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import unidrop
from unidrop import Key
from unidrop.adapters.jax import dropout

KEY = Key(42).fold_in("encoder/0")
X = np.arange(1, 25, dtype="float32")


def drop(x, i):
    return dropout(x, 0.5, KEY.fold_in(i))


def expected(*numbers, x=X):
    with unidrop.force_path("portable"):
        return np.stack([unidrop.dropout(x, 0.5, KEY.fold_in(n)) for n in numbers])


def carry_key(x):
    """Fold 0 into a key that the loop carries, in each iteration."""
    key = jax.tree.map(jnp.asarray, KEY)
    return lax.scan(lambda key, x: (key.fold_in(0), dropout(x, 0.5, key)), key, x)[1]


# Each has the numbers of the rows of its output, or None for a row that it returns unchanged.
CASES = {
    "cond": (lambda x: lax.cond(x[0, 0] > 0, lambda x: drop(x, 3), lambda x: x, x[0])[None], [3]),
    "other branch": (
        lambda x: lax.cond(x[0, 0] < 0, lambda x: drop(x, 3), lambda x: x, x[0])[None],
        [None],
    ),
    "switch": (
        lambda x: jnp.stack(
            [
                lax.switch(i, [lambda x, i=i: drop(x, i), lambda x: x, lambda x: drop(x, 7)], x[0])
                for i in jnp.arange(3)
            ]
        ),
        [0, None, 7],
    ),
    "map": (lambda x: lax.map(lambda a: drop(*a), (x, jnp.arange(3))), [0, 1, 2]),
    "map of batches": (
        lambda x: lax.map(lambda a: drop(*a), (x, jnp.arange(3)), batch_size=2),
        [0, 1, 2],
    ),
    "reverse scan": (
        lambda x: lax.scan(lambda i, x: (i + 1, drop(x, i)), 4, x, reverse=True, unroll=2)[1],
        [6, 5, 4],
    ),
    "vmap of cond": (
        lambda x: jax.vmap(lambda x, i: lax.cond(i > 0, drop, lambda x, i: x, x, i))(
            x, jnp.arange(3)
        ),
        [None, 1, 2],
    ),
}


SLOW = ("switch", "map of batches")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES]
)
def test_runs_function_with_key_and_its_gradient(name):
    function, numbers = CASES[name]

    def pick(x):
        return np.concatenate([x[None] if n is None else expected(n, x=x) for n in numbers])

    rows = jnp.stack([X] * 3)
    np.testing.assert_array_equal(jax.jit(function)(rows), pick(X))
    gradient = jax.jit(jax.grad(lambda x: function(x).sum()))(rows)
    ones = pick(np.ones_like(X))
    if name == "switch":  # of the same row
        ones = ones.sum(axis=0)[None]
    np.testing.assert_array_equal(gradient[: len(ones)], ones)


def test_carries_key_in_scan():
    keys = [KEY, KEY.fold_in(0), KEY.fold_in(0).fold_in(0)]
    for y, key in zip(jax.jit(carry_key)(jnp.stack([X] * 3)), keys, strict=True):
        np.testing.assert_array_equal(y, unidrop.dropout(X, 0.5, key))


def test_runs_in_associative_scan():
    add = jax.vmap(lambda x, y: x + drop(y, 3))
    (dropped,) = expected(3)
    y = jax.jit(lambda x: lax.associative_scan(add, x))(jnp.stack([X] * 3))
    np.testing.assert_array_equal(y, [X, X + dropped, X + dropped + dropped])
