"""JAX on the CPU, eager and compiled, compared with a multiply and with `jax.random.bernoulli`.

The compiled functions take the step as an argument, because XLA would fold a constant key away.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax import numpy as jnp

import unidrop
from benchmarks.config import LARGE, MIDDLE, SMALL, Config, Shape
from benchmarks.fixtures import KEEP, SCALE, P, key, uniform
from benchmarks.rows import Row, timed
from benchmarks.thresholds import faster
from benchmarks.timing import Candidate
from unidrop.adapters.jax import dropout

__all__ = ["rows"]

_OWN = "bernoulli + where"


def rows(config: Config) -> Iterator[Row]:
    """Yield the sweep over sizes, and the compiled functions."""
    for shape in config.shapes:
        yield Row("jax", "forward", shape, timed(_forward, shape), own=_OWN)
    for name, transform in (
        ("jit forward", _forward_only),
        ("jit forward + backward", _forward_backward),
    ):
        for shape in (shape for shape in (SMALL, MIDDLE, LARGE) if shape in config.shapes):
            targets = () if shape == SMALL else (faster(3, "unidrop", _OWN),)
            yield Row("jax", name, shape, timed(_compiled, shape, transform), targets=targets)


def _array(shape: Shape) -> Any:
    return jax.device_put(uniform(shape), jax.devices("cpu")[0])


def _by_unidrop(x: Any, step: Any) -> Any:
    return dropout(x, P, key(step))


def _by_multiply(x: Any, step: Any) -> Any:
    return x * SCALE


def _by_bernoulli(x: Any, step: Any) -> Any:
    keep = jax.random.bernoulli(jax.random.fold_in(jax.random.key(42), step), KEEP, x.shape)
    return jnp.where(keep, x * SCALE, 0)


def _forward(shape: Shape) -> Sequence[Candidate]:
    x = _array(shape)
    # JAX returns before the result is ready.
    return (
        Candidate("unidrop", lambda step: unidrop.dropout(x, P, key(step)).block_until_ready()),
        Candidate("multiply", lambda step: _by_multiply(x, step).block_until_ready()),
        Candidate(_OWN, lambda step: _by_bernoulli(x, step).block_until_ready()),
    )


def _forward_only(drop: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, step, upstream: drop(x, step)


def _forward_backward(drop: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Any, step: Any, upstream: Any) -> Any:
        y, pullback = jax.vjp(lambda v: drop(v, step), x)
        return y, pullback(upstream)

    return call


def _compiled(
    shape: Shape, transform: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Sequence[Candidate]:
    x = _array(shape)
    upstream = jnp.ones_like(x)
    functions = {"unidrop": _by_unidrop, "multiply": _by_multiply, _OWN: _by_bernoulli}

    def candidate(name: str) -> Candidate:
        run = jax.jit(transform(functions[name]))
        return Candidate(name, lambda step: jax.block_until_ready(run(x, step, upstream)))

    return [candidate(name) for name in functions]
