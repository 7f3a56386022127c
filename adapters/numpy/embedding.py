"""Embedding dropout for NumPy, and its backward pass."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unidrop.adapters.numpy.family import _run_backward
from unidrop.adapters.numpy.functional import Rng, as_array, check_source, draw_key
from unidrop.embedding import check_indices, drop_rows, plan_embedding_dropout
from unidrop.key import Key
from unidrop.rate import Rate

__all__ = ["embedding_dropout", "embedding_dropout_backward"]


def embedding_dropout(
    weight: ArrayLike,
    indices: ArrayLike,
    p: float = 0.5,
    *,
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Look up embeddings of words, and drop words everywhere with probability p.

    `unidrop.family.embedding_dropout` has the details. key and rng are as in `dropout`; an index
    out of range raises IndexError.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import embedding_dropout
    >>> embedding_dropout(np.ones((6, 1)), [0, 1, 1, 5, 0], 0.5, key=Key(42))[:, 0]
    array([2., 0., 0., 2., 2.])
    """
    weight, indices = as_array(weight, "weight"), np.asarray(indices)
    check_indices(indices)
    options: dict[str, Any] = {"training": training, "global_shape": global_shape, "start": start}
    plan = plan_embedding_dropout(weight, Rate.from_p(p), **options)
    generator = check_source(key, rng)
    flat = indices.ravel()
    rows = weight.take(flat, 0)  # raises before a key is drawn
    mask = plan.ones(weight)
    if plan.drops:
        mask = plan.mask(weight, draw_key(generator) if key is None else key)
        rows = drop_rows(plan, rows, mask, flat)
    rows = rows.reshape(*indices.shape, -1)
    return (rows, mask) if return_mask else rows


def embedding_dropout_backward(
    grad: ArrayLike,
    indices: ArrayLike,
    num_embeddings: int,
    p: float = 0.5,
    *,
    key: Key | None = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `embedding_dropout`, of the shape of the matrix.

    Parameters
    ----------
    grad : array_like
        The upstream gradient, of the output's shape.
    indices : array_like of int
        As in the forward call.
    num_embeddings : int
        The number of words of the matrix.
    p, key, training, global_shape, start
        As in the forward call.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import embedding_dropout_backward
    >>> grad = np.ones((5, 1))
    >>> embedding_dropout_backward(grad, [0, 1, 1, 5, 0], 6, 0.5, key=Key(42))[:, 0]
    array([4., 0., 0., 0., 0., 2.])
    """
    grad, indices = as_array(grad, "grad"), np.asarray(indices)
    check_indices(indices)
    if grad.shape[:-1] != indices.shape:
        raise ValueError(
            f"grad must be of the shape of the indices {indices.shape} with an axis of features, "
            f"got {grad.shape}"
        )
    total = np.zeros((num_embeddings, grad.shape[-1]), grad.dtype)
    np.add.at(total, indices, grad)
    options: dict[str, Any] = {"training": training, "global_shape": global_shape, "start": start}
    return _run_backward(plan_embedding_dropout, total, p, key, total, **options)
