"""LayerDrop for NumPy."""

from typing import Any

from numpy.typing import NDArray

import unidrop.layer_drop as core
from unidrop.adapters.numpy.functional import Rng, check_source, draw_key
from unidrop.key import Key
from unidrop.rate import Rate

__all__ = ["layer_drop"]


def layer_drop(
    num_layers: int,
    p: float = 0.5,
    *,
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
) -> NDArray[Any]:
    """Return which layers of a stack run, if each is skipped with probability p.

    `unidrop.family.layer_drop` describes the result. key and rng are as in `dropout`.

    Examples
    --------
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import layer_drop
    >>> layer_drop(6, 0.5, key=Key(42))
    array([ True, False, False, False, False,  True])
    """
    generator = check_source(key, rng)
    if key is None:
        is_random = training and Rate.from_p(p).p > 0
        key = draw_key(generator) if is_random else Key(0)
    kept: NDArray[Any] = core.layer_drop(num_layers, p, key, training=training)
    return kept
