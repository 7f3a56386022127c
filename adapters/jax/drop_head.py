"""DropHead for JAX."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from unidrop.adapters.jax.functional import run
from unidrop.drop_head import plan_drop_head
from unidrop.key import Key

__all__ = ["drop_head"]


def drop_head(
    x: ArrayLike,
    rate: float | jax.Array,
    key: Key | jax.Array | None = None,
    *,
    axis: int = -2,
    deterministic: bool = False,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Drop whole heads of attention, which are the elements along an axis.

    The default axis is the one of the outputs of `jax.nn.dot_product_attention`, of shape
    ``(batch, length, heads, features)``. `unidrop.family.drop_head` has the details. The other
    parameters, returns and errors are as in `dropout`; ValueError if x has no such axis.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.jax import drop_head
    >>> drop_head(jax.numpy.ones((1, 2, 6, 1)), 0.5, Key(42))[0, :, :, 0]
    Array([[2., 0., 0., 0., 0., 2.],
           [2., 0., 0., 0., 0., 2.]], dtype=float32)
    """
    options: dict[str, Any] = {"axis": axis, "global_shape": global_shape, "start": start}
    options["has_schedule"] = True
    return run(plan_drop_head, x, rate, key, deterministic, return_mask, **options)
