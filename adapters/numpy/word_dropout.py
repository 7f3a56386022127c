"""Word dropout for NumPy."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike, NDArray

from unidrop.adapters.numpy.family import _run
from unidrop.adapters.numpy.functional import Rng
from unidrop.key import Key
from unidrop.word_dropout import plan_word_dropout

__all__ = ["word_dropout"]


def word_dropout(
    x: ArrayLike,
    p: float = 0.5,
    *,
    unk_id: int,
    special_ids: Sequence[int] = (),
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    out: NDArray[Any] | None = None,
) -> Any:
    """Replace tokens by the one for unknown words with probability p.

    `unidrop.family.word_dropout` describes x, the tokens and the results. The other parameters are
    as in `dropout`.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import word_dropout
    >>> word_dropout(np.array([5, 6, 7, 8, 0, 0]), 0.5, unk_id=1, special_ids=(0,), key=Key(42))
    array([5, 1, 1, 1, 0, 0])
    """
    options: dict[str, Any] = {"unk_id": unk_id, "special_ids": special_ids, "training": training}
    options |= {"global_shape": global_shape, "start": start}
    return _run(plan_word_dropout, x, p, key, rng, return_mask, out, **options)
