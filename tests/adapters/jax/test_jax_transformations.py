"""JAX's transformations of dropout: gradients, batches, loops, donated arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax_by_the_core import KEY, RATE, assert_bits, step_function, values, wanted

from unidrop.adapters.jax import dropout


def squares(x, step):
    return (step_function(x, step) ** 2).sum() / 2


def twice(x, step):
    """The gradient of `squares`: the scale and the mask, applied twice."""
    key = KEY.fold_in(step)
    return wanted(wanted(x, key), key)


GRADIENTS = {
    "grad": jax.grad(squares),
    "value_and_grad": lambda x, s: jax.value_and_grad(squares)(x, s)[1],
    "jit of grad": jax.jit(jax.grad(squares)),
    "grad of jit": jax.grad(jax.jit(squares)),
    "grad of checkpoint": jax.grad(jax.checkpoint(squares)),
    "grad of checkpoint with a policy": jax.grad(
        jax.checkpoint(squares, policy=jax.checkpoint_policies.dots_saveable)
    ),
    "checkpoint of checkpoint": jax.grad(jax.checkpoint(jax.checkpoint(squares))),
    "linearize": lambda x, s: jax.linear_transpose(jax.linearize(lambda v: squares(v, s), x)[1], x)(
        np.float32(1)
    )[0],
    "jacfwd": lambda x, s: jax.jacfwd(squares)(x, s),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gives_gradients_by_mask_of_key(name):
    x = values((23,))
    np.testing.assert_allclose(GRADIENTS[name](x, 3), twice(x, 3), rtol=1e-6)


def test_drops_tangent_in_forward_mode():
    x, t = values((33,)), values((33,))[::-1].copy()
    y, tangent = jax.jvp(lambda v: step_function(v, 2), (x,), (t,))
    assert_bits(y, wanted(x, KEY.fold_in(2)))
    assert_bits(tangent, wanted(t, KEY.fold_in(2)))


@pytest.mark.slow
def test_gives_diagonal_hessian_of_squared_scale():
    hessian = jax.hessian(lambda v: squares(v, 4))(jnp.asarray(values((9,))))
    np.testing.assert_allclose(hessian, np.diag(twice(np.ones(9, "float32"), 4)), rtol=1e-6)


@pytest.mark.parametrize("size", [9, 20001])
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 0)], ids=str)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_gives_each_call_of_vmap_its_mask(size, axes, transform):
    xs, steps = values((3, size)), np.arange(3, dtype=np.int32)
    x = {0: xs, 1: xs.T, None: xs[0]}[axes[0]]
    step = steps if axes[1] == 0 else steps[1]
    ys = transform(jax.vmap(step_function, in_axes=axes))(x, step)
    for i in range(3):
        row, number = xs[0 if axes[0] is None else i], int(1 if axes[1] is None else i)
        assert_bits(ys[i], wanted(row, KEY.fold_in(number)))


def test_gives_each_call_of_nested_vmap_its_mask():
    xs, steps = values((2, 3, 17)), jnp.arange(6).reshape(2, 3)
    ys = jax.vmap(jax.vmap(step_function))(xs, steps)
    gradients = jax.jit(jax.grad(lambda x: jax.vmap(jax.vmap(squares))(x, steps).sum()))(xs)
    for i, j in np.ndindex(2, 3):
        assert_bits(ys[i, j], wanted(xs[i, j], KEY.fold_in(3 * i + j)))
        np.testing.assert_allclose(gradients[i, j], twice(xs[i, j], 3 * i + j), rtol=1e-6)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("mapped", ["outer", "inner"])
def test_varies_key_along_its_mapped_axis_alone(mapped, transform):
    xs, steps = values((2, 2, 17)), jnp.arange(2)
    outer, inner = (0, None) if mapped == "outer" else (None, 0)
    f = jax.vmap(jax.vmap(step_function, in_axes=(0, inner)), in_axes=(0, outer))
    ys = transform(f)(xs, steps)
    for i, j in np.ndindex(2, 2):
        assert_bits(ys[i, j], wanted(xs[i, j], KEY.fold_in(i if mapped == "outer" else j)))


def test_gives_each_mapped_start_its_window():
    x, whole = values((4, 13)), (12, 13)
    f = jax.vmap(lambda row: dropout(x, RATE, KEY, global_shape=whole, start=(row, 0)))
    for i, y in enumerate(f(jnp.arange(3) * 4)):
        assert_bits(y, wanted(x, global_shape=whole, start=(4 * i, 0)))


LOOPS = {
    "scan": lambda x: lax.scan(lambda x, s: (step_function(x, s), None), x, jnp.arange(4))[0],
    "fori_loop": lambda x: lax.fori_loop(0, 4, lambda s, x: step_function(x, s), x),
    "while_loop": lambda x: lax.while_loop(
        lambda c: c[0] < 4, lambda c: (c[0] + 1, step_function(c[1], c[0])), (0, x)
    )[1],
    "scan of checkpoint": lambda x: lax.scan(
        jax.checkpoint(lambda x, s: (step_function(x, s), None)), x, jnp.arange(4)
    )[0],
}


@pytest.mark.parametrize("name", LOOPS)
def test_gives_each_turn_of_loop_mask_of_its_step(name):
    x = expected = values((64,)) + np.float32(3)
    for step in range(4):
        expected = wanted(expected, KEY.fold_in(step))
    assert_bits(jax.jit(LOOPS[name])(x), expected)


@pytest.mark.parametrize("name", ["scan", "scan of checkpoint"])
def test_gives_gradient_of_loop_by_all_its_masks(name):
    x = values((16,))
    expected = np.ones(16, "float32")
    for step in reversed(range(4)):
        expected = wanted(expected, KEY.fold_in(step))
    assert_bits(jax.grad(lambda x: LOOPS[name](x).sum())(x), expected)


def test_accepts_donated_array():
    x = values((64,))
    y = jax.jit(step_function, donate_argnums=0)(jnp.array(x), 3)
    assert_bits(y, wanted(x, KEY.fold_in(3)))


def test_evaluates_shape_without_computing():
    shape = jax.eval_shape(step_function, jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), 1)
    assert (shape.shape, shape.dtype) == ((3, 4), jnp.bfloat16)
