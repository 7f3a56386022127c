"""Lower programs for the CPU as for other platforms, so that a machine without a GPU runs them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from jax.interpreters import mlir

from unidrop.adapters.jax import primitive


@contextmanager
def lower_as_off_the_cpu() -> Iterator[None]:
    """Lower dropout in programs for the CPU, which must be new, as for other platforms."""
    _register(is_for_cpu=False)
    try:
        yield
    finally:
        _register(is_for_cpu=True)


def _register(is_for_cpu: bool) -> None:
    rule = partial(primitive._lower, is_for_cpu=is_for_cpu)
    mlir.register_lowering(primitive._drop_p, rule, platform="cpu")
