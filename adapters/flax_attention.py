"""Attention for Flax, nnx and Linen: a function for the argument ``attention_fn`` of their modules.

Flax documentation: flax.nnx.dot_product_attention, flax.linen.dot_product_attention (0.12).
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from flax import linen, nnx
from flax.nnx.nn.dtypes import promote_dtype as promote_all
from jax import numpy as jnp

from unidrop.adapters.jax.attention import attend, check_arrays
from unidrop.adapters.jax.functional import as_key
from unidrop.key import Key
from unidrop.rate import checked_probability

__all__ = ["dot_product_attention"]


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Key | jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: nnx.Module | linen.Module | None = None,
    promote_dtype: Callable[..., Any] = promote_all,
    is_causal: bool = False,
) -> jax.Array:
    """Return dot-product attention with dropout of the probabilities.

    `flax.nnx.dot_product_attention` with a key, for ``attention_fn`` of the attention modules of
    Flax nnx and Linen. No array holds all probabilities: both passes compute them block by block,
    and recompute the mask.

    Parameters
    ----------
    query : jax.Array
        Of shape (batch..., query length, heads, features).
    key, value : jax.Array
        Of shape (batch..., key length, heads, features). Heads of keys may each serve a group of
        successive heads of queries.
    bias : jax.Array, optional
        Added to the scores; broadcasts to (batch..., heads, query length, key length).
    mask : jax.Array, optional
        True for pairs that attend; broadcasts as ``bias`` does.
    broadcast_dropout : bool, default True
        If True, all batch elements and heads share the mask ``keep_mask((query length, key length),
        dropout_rate, dropout_rng)``, as in Flax. If False, the mask has the shape
        (batch..., heads, query length, key length).
    dropout_rng : unidrop.Key or jax.Array, optional
        The key of the mask: a `Key` or a Threefry key of `jax.random`. Use each key once.
    dropout_rate : int or float, default 0.0
        The probability of dropping a probability, in [0, 1].
    deterministic : bool, default False
        If True, nothing is dropped: the call is `flax.nnx.dot_product_attention` itself.
    dtype, precision, promote_dtype
        As in Flax. Sums have at least the precision of float32.
    module : nnx.Module or linen.Module, optional
        The module that sows the attention weights, before dropout. They are an array of all
        probabilities.
    is_causal : bool, default False
        If True, a query attends to no later position.

    Returns
    -------
    jax.Array
        Of shape (batch..., query length, heads, features of values).

    Raises
    ------
    TypeError
        If dropout_rate is not a Python number, or dropout_rng is not a key.
    ValueError
        If shapes do not match, as in Flax, or dropout_rate is outside [0, 1].

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key, keep_mask
    >>> from unidrop.adapters.flax import dot_product_attention
    >>> q = k = jax.numpy.ones((1, 4, 2, 4))  # (batch, position, head, feature)
    >>> v = jax.numpy.broadcast_to(jax.numpy.eye(4)[:, None], q.shape)
    >>> y = dot_product_attention(q, k, v, dropout_rate=0.5, dropout_rng=Key(42))
    >>> mask = keep_mask((4, 4), 0.5, Key(42), xp=jax.numpy)  # all heads share it
    >>> bool(((y != 0) == mask[:, None]).all())
    True
    """
    rate = checked_probability(dropout_rate, "dropout_rate")
    sower = _LinenSower(module) if isinstance(module, linen.Module) else module
    options = {"dtype": dtype, "precision": precision, "promote_dtype": promote_dtype}
    options |= {"is_causal": is_causal, "deterministic": True}
    if deterministic or rate == 0 or 0 in (query.size, key.size):
        own: jax.Array = nnx.dot_product_attention(
            query, key, value, bias, mask, dropout_rate=rate, module=sower, **options
        )
        return own
    _check(*map(_as_struct, (query, key, value, bias, mask)), **options)
    if sower is not None:
        nnx.dot_product_attention(
            query, key, value, bias, mask, dropout_rate=rate, module=sower, **options
        )
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    check_arrays(query, key, value)
    *batch, length, heads, _ = query.shape
    shape = (*batch, heads, length, key.shape[-3])
    if key.shape[-2] != value.shape[-2]:
        key, value = (jnp.repeat(x, heads // x.shape[-2], axis=-2) for x in (key, value))
    query, key, value = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    output, _ = attend(
        query,
        key,
        value,
        None if bias is None else _fold_batch(bias, shape, "bias"),
        None if mask is None else _fold_batch(mask, shape, "mask") != 0,
        rate,
        as_key(dropout_rng, "dropout_rng"),
        is_causal=is_causal,
        broadcast_dims=(0, 1) if broadcast_dropout else (),
        precision=precision,
    )
    return output.reshape(*batch, length, heads, value.shape[-1])


class _LinenSower:
    """Sows into a Linen module, under the interface of nnx."""

    def __init__(self, module: linen.Module) -> None:
        self.module = module

    def sow(self, _: Any, name: str, value: Any) -> None:
        self.module.sow("intermediates", name, value)


@lru_cache(maxsize=1024)
def _check(query: Any, key: Any, value: Any, bias: Any, mask: Any, **options: Any) -> None:
    """Raise what `flax.nnx.dot_product_attention` raises for such operands."""
    # At a rate of 0, it is another function.
    own = partial(nnx.dot_product_attention, dropout_rate=0.5, **options)
    jax.eval_shape(own, query, key, value, bias, mask)


def _as_struct(x: Any) -> Any:
    return None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)


def _fold_batch(x: Any, shape: tuple[int, ...], name: str) -> Any:
    """Return a bias or a mask with one axis for the batch, of length 1 if the batch shares it."""
    if x.ndim > len(shape) or np.broadcast_shapes(x.shape, shape) != shape:
        raise ValueError(f"{name} must have a shape that broadcasts to {shape}, got {x.shape}")
    x = x.reshape((1,) * (len(shape) - x.ndim) + x.shape)
    *batch, heads, length, count = x.shape
    if max(batch, default=1) > 1:
        x = jnp.broadcast_to(x, (*shape[:-3], heads, length, count))
    return x.reshape(-1, heads, length, count)
