"""LayerDrop for JAX."""

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp

from unidrop.adapters.jax.functional import as_key
from unidrop.key import Key
from unidrop.mask import keep_mask
from unidrop.rate import Rate

__all__ = ["layer_drop"]

# More layers than any stack has; it keeps a traced index inside the window.
_MOST = 1 << 31


def layer_drop(
    fun: Callable[[Any], Any],
    x: Any,
    rate: float,
    key: Key | jax.Array | None = None,
    *,
    index: Any,
    deterministic: bool = False,
) -> Any:
    """Return ``fun(x)``, or x itself with probability rate: skip a layer of a stack.

    Parameters
    ----------
    fun : callable
        A layer: a function from arrays to arrays of the same shapes and dtypes.
    x : tree of jax.Array
        The inputs of the layer.
    rate : int or float
        The probability of skipping the layer, in [0, 1].
    key : unidrop.Key or jax.Array
        As in `dropout`: one key for all layers of a stack. May be None if nothing is skipped.
    index : int or 0-d integer array
        The number of the layer in its stack. Its decision is element ``index`` of
        `unidrop.family.layer_drop`. May be traced, as in `jax.lax.scan` over layers.
    deterministic : bool, default False
        If True, the layer runs.

    Returns
    -------
    tree of jax.Array
        The outputs of `jax.lax.cond`, which does not run a skipped layer. Under `jax.vmap` over
        keys, all layers run, and outputs of skipped ones are replaced.

    Raises
    ------
    TypeError
        As `dropout`, and if the layer returns other shapes or dtypes.
    ValueError
        As `dropout`, and if index is negative.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.jax import layer_drop
    >>> x = jax.numpy.zeros(())
    >>> for i in range(6):
    ...     x = layer_drop(lambda x: 10 * x + 1, x, 0.5, Key(42), index=i)
    >>> float(x)
    11.0
    """
    one_rate = Rate.from_p(rate, "rate")
    if deterministic or one_rate.p == 0:
        return fun(x)
    window: dict[str, Any] = {"global_shape": (_MOST,), "start": (index,)}
    keep = keep_mask((1,), one_rate.p, as_key(key), xp=jnp, **window)
    return jax.lax.cond(keep[0], fun, lambda x: x, x)
