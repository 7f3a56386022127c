"""The Flax module in loops and branches: it counts each execution, or names the function."""

import jax
import numpy as np
import pytest
from flax import nnx
from flax.errors import TraceContextError
from jax import lax
from jax import numpy as jnp
from loops import KEY, X, chained, expected

from unidrop.adapters.flax import Dropout, DropoutCalls

ROWS = np.stack([X] * 3)


def call(module, x):
    return module(x)


CARRIED = {
    "cond": (lambda m, x: nnx.cond(x[0] > 0, call, lambda m, x: x, m, x), 1),
    "switch": (lambda m, x: nnx.switch(jnp.int32(x[0] > 0), [lambda m, x: x, call], m, x), 1),
    "remat": (lambda m, x: nnx.remat(call)(m, x), 1),
    "while_loop": (
        lambda m, x: nnx.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1], c[1](c[2])), (0, m, x)
        )[2],
        3,
    ),
    "fori_loop": (
        lambda m, x: nnx.fori_loop(0, 3, lambda i, c: (c[0], c[0](c[1])), (m, x))[1],
        3,
    ),
    "scan": (
        lambda m, x: nnx.scan(
            lambda c, _: ((c[0], nnx.remat(call)(*c)), None),
            in_axes=(nnx.Carry, 0),
            out_axes=(nnx.Carry, 0),
        )((m, x), jnp.arange(3))[0][1],
        3,
    ),
}


@pytest.mark.parametrize("name", CARRIED)
def test_counts_each_execution(name):
    function, count = CARRIED[name]
    module, step = Dropout(0.5, seed=KEY), nnx.jit(function)
    for first in (0, count):
        np.testing.assert_array_equal(step(module, X), chained(range(first, first + count)))
    assert int(module.calls) == 2 * count


def test_gives_gradient_by_masks_of_scan():
    module = Dropout(0.5, seed=KEY)
    loss = nnx.grad(lambda x, module: CARRIED["scan"][0](module, x).sum())
    np.testing.assert_array_equal(loss(jnp.asarray(X), module), chained([2, 1, 0], np.ones_like(X)))
    assert int(module.calls) == 3


def test_counts_no_call_of_branch_that_does_not_run():
    module = Dropout(0.5, seed=KEY)
    np.testing.assert_array_equal(CARRIED["cond"][0](module, -X), -X)
    assert int(module.calls) == 0


def scan(in_axes, body=call, **options):
    return nnx.scan(body, in_axes=(in_axes, 0), out_axes=0, **options)


CARRY_CALLS = nnx.StateAxes({DropoutCalls: nnx.Carry, ...: None})


@pytest.mark.parametrize(
    "loop",
    [
        scan(CARRY_CALLS),
        scan(None, graph_updates=False),
        scan(CARRY_CALLS, lambda m, x: nnx.remat(call)(m, x)),
    ],
    ids=["carried", "pure", "nested"],
)
def test_counts_iterations_of_scan_over_inputs(loop):
    module = Dropout(0.5, seed=KEY)
    np.testing.assert_array_equal(loop(module, ROWS), expected(range(3)))
    assert int(module.calls) == 3


NOT_CARRIED = {
    "broadcast": scan(None),
    "broadcast, nested": scan(None, lambda m, x: nnx.remat(call)(m, x)),
    "nnx.cond": lambda m, x: nnx.cond(True, lambda x: m(x), lambda x: x, x),
    "lax.cond": lambda m, x: lax.cond(True, lambda x: m(x), lambda x: x, x),
    "lax.while_loop": lambda m, x: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, m(c[1])), (0, x)
    ),
    "lax.scan": lambda m, x: lax.scan(lambda c, x: (c, m(x)), 0, x),
    "lax.map": lambda m, x: lax.map(lambda x: m(x), x),
    "jax.vmap": lambda m, x: jax.vmap(lambda x: m(x))(x),
    "jax.jit": lambda m, x: jax.jit(lambda x: m(x))(x),
}


@pytest.mark.parametrize("name", NOT_CARRIED)
def test_names_function_if_call_number_would_be_lost(name):
    module = Dropout(0.5, seed=KEY)
    with pytest.raises(TraceContextError, match="use the function with a key"):
        NOT_CARRIED[name](module, jnp.asarray(ROWS))
    np.testing.assert_array_equal(module(X), *expected([0]))


def test_accepts_broadcast_module_in_evaluation():
    teacher, student = Dropout(0.5, seed=KEY), Dropout(0.5, seed=KEY)
    teacher.eval()
    loop = nnx.scan(
        lambda student, teacher, x: student(teacher(x)), in_axes=(CARRY_CALLS, None, 0), out_axes=0
    )
    np.testing.assert_array_equal(loop(student, teacher, ROWS), expected(range(3)))


def test_shares_mask_and_number_of_module_that_vmap_broadcasts():
    module = Dropout(0.5, seed=KEY)
    rows = nnx.vmap(call, in_axes=(None, 0))
    for n in range(2):
        np.testing.assert_array_equal(rows(module, ROWS), expected([n, n, n]))
    assert int(module.calls) == 2
