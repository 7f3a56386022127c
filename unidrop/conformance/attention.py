"""Attention with dropout, with all weights in memory and in float64: the definition.

Section 18 of the specification, docs/spec.md, describes it. Every implementation must equal it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidrop import Key, keep_mask

__all__ = ["attention"]

_Array = NDArray[np.float64]


def attention(
    query: Any,
    key: Any,
    value: Any,
    p: float,
    dropout_key: Key,
    *,
    bias: Any = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[_Array, Callable[[Any], tuple[_Array, _Array, _Array]]]:
    """Return the output, and a function from its gradient to the gradients of all three arrays.

    Arrays have the shape (..., heads, length, features). Heads of keys and values may serve groups
    of query heads. ``bias`` is added to the scores, and is -inf for pairs that do not attend. The
    probabilities of a query without keys are 0.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (query, key, value))
    groups = q.shape[-3] // k.shape[-3] if k.ndim > 2 else 1
    k, v = (x.repeat(groups, axis=-3) if groups > 1 else x for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * q @ k.swapaxes(-1, -2) + bias
    if is_causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=np.bool), scores, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), np.finfo(np.float64).min)
    weights = np.exp(scores - top)
    weights /= np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    kept = keep_mask(scores.shape, p, dropout_key) / (1 - p)

    def pullback(upstream: Any) -> tuple[_Array, _Array, _Array]:
        u = np.asarray(upstream, dtype=np.float64)
        weighted = weights * (u @ v.swapaxes(-1, -2)) * kept
        of_scores = scale * (weighted - weights * weighted.sum(-1, keepdims=True))
        of_key, of_value = of_scores.swapaxes(-1, -2) @ q, (weights * kept).swapaxes(-1, -2) @ u
        if groups > 1:
            of_key, of_value = (
                x.reshape(*x.shape[:-3], -1, groups, *x.shape[-2:]).sum(-3)
                for x in (of_key, of_value)
            )
        return of_scores @ k, of_key, of_value

    return (weights * kept) @ v, pullback
