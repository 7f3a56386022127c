"""JAX, eager on the CPU: against a multiply, and `jax.random.bernoulli` with `where`."""

from collections.abc import Iterator, Sequence

import jax
from jax import numpy as jnp

import unidrop
from benchmarks.effort import Effort, Shape
from benchmarks.rows import Row, timed
from benchmarks.timing import Candidate
from benchmarks.work import KEEP, SCALE, P, key, uniform

__all__ = ["rows"]

_OWN = "bernoulli + where"


def rows(effort: Effort) -> Iterator[Row]:
    """Yield the sweep over sizes."""
    for shape in effort.shapes:
        yield Row("jax", "forward", shape, timed(_forward, shape), own=_OWN)


def _forward(shape: Shape) -> Sequence[Candidate]:
    x = jax.device_put(uniform(shape), jax.devices("cpu")[0])
    seed = jax.random.key(42)

    def own(step: int) -> None:
        keep = jax.random.bernoulli(jax.random.fold_in(seed, step), KEEP, shape)
        jnp.where(keep, x * SCALE, 0).block_until_ready()

    # JAX returns before it has computed.
    return (
        Candidate("unidrop", lambda step: unidrop.dropout(x, P, key(step)).block_until_ready()),
        Candidate("multiply", lambda step: (x * SCALE).block_until_ready()),
        Candidate(_OWN, own),
    )
