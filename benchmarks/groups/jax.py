"""JAX on the CPU, eager and compiled, compared with a multiply and with `jax.random.bernoulli`.

The compiled functions take the step as an argument, because XLA would fold a constant key away.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax import numpy as jnp

from benchmarks.config import LARGE, Config, Shape
from benchmarks.fixtures import KEEP, SCALE, P, key, uniform
from benchmarks.rows import Row, timed
from benchmarks.thresholds import at_most, not_slower
from benchmarks.timing import Candidate
from unidrop.adapters.jax import dropout

__all__ = ["rows"]

_OWN = "bernoulli + where"


def rows(config: Config) -> Iterator[Row]:
    """Yield the sweep over sizes, eager and compiled."""
    for prefix, compiler in (("", _as_it_is), ("jit ", jax.jit)):
        for name, transform in (
            ("forward", _forward_only),
            ("forward + backward", _forward_backward),
        ):
            for shape in config.shapes:
                goal = not_slower(_OWN, "unidrop")
                if shape == LARGE and prefix:
                    goal += (at_most(1.3, "unidrop", "multiply"),)
                measure = timed(_candidates, shape, transform, compiler)
                yield Row("jax", f"{prefix}{name}", shape, measure, own=_OWN, targets=goal)


def _by_bernoulli(x: Any, step: Any) -> Any:
    keep = jax.random.bernoulli(jax.random.fold_in(jax.random.key(42), step), KEEP, x.shape)
    return jnp.where(keep, x * SCALE, 0)


_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "unidrop": lambda x, step: dropout(x, P, key(step)),
    "multiply": lambda x, step: x * SCALE,
    _OWN: _by_bernoulli,
}


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _forward_only(drop: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, step, upstream: drop(x, step)


def _forward_backward(drop: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Any, step: Any, upstream: Any) -> Any:
        y, pullback = jax.vjp(lambda v: drop(v, step), x)
        return y, pullback(upstream)

    return call


def _candidates(
    shape: Shape,
    transform: Callable[[Callable[..., Any]], Callable[..., Any]],
    compiler: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Sequence[Candidate]:
    x = jax.device_put(uniform(shape), jax.devices("cpu")[0])
    upstream = jnp.ones_like(x)

    def candidate(name: str) -> Candidate:
        run = compiler(transform(_FUNCTIONS[name]))
        # JAX returns before the result is ready.
        return Candidate(name, lambda step: jax.block_until_ready(run(x, step, upstream)))

    return [candidate(name) for name in _FUNCTIONS]
