"""Word dropout for JAX."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike

from unidrop.adapters.jax.functional import run
from unidrop.adapters.numpy.arrays import check_plain
from unidrop.key import Key
from unidrop.word_dropout import plan_word_dropout

__all__ = ["as_tokens", "word_dropout"]


def word_dropout(
    x: ArrayLike,
    rate: float,
    key: Key | jax.Array | None = None,
    *,
    unk_id: int,
    special_ids: Sequence[int] = (),
    deterministic: bool = False,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Replace tokens by the one for unknown words with probability rate.

    `unidrop.family.word_dropout` describes x, the tokens and the results. The other parameters are
    as in `dropout`.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.jax import word_dropout
    >>> tokens = jax.numpy.array([5, 6, 7, 8, 0, 0])
    >>> word_dropout(tokens, 0.5, Key(42), unk_id=1, special_ids=(0,))
    Array([5, 1, 1, 1, 0, 0], dtype=int32)
    """
    options: dict[str, Any] = {"unk_id": unk_id, "special_ids": special_ids}
    options |= {"global_shape": global_shape, "start": start}
    tokens = as_tokens(x, "x")
    return run(plan_word_dropout, tokens, rate, key, deterministic, return_mask, **options)


def as_tokens(x: Any, name: str) -> jax.Array:
    """Return tokens as an array of JAX, whatever their dtype is."""
    check_plain(type(x), name)
    return jnp.asarray(x)
