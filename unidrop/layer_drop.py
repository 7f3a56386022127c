"""LayerDrop: skip whole layers of a stack, by one decision for each layer."""

from typing import Any

from unidrop.arguments import checked_integer
from unidrop.key import Key
from unidrop.mask import keep_mask

__all__ = ["layer_drop"]


def layer_drop(
    num_layers: int,
    p: float,
    key: Key,
    *,
    xp: Any = None,
    device: Any = None,
    training: bool = True,
) -> Any:
    """Return which layers of a stack run, if each is skipped with probability p.

    Parameters
    ----------
    num_layers : int
        The number of layers.
    p : int or float
        The probability of skipping a layer, in [0, 1].
    key : Key
        The name of the decisions. Devices that share layers must have one key, so fold no rank in.
    xp, device
        As in `keep_mask`.
    training : bool, default True
        If False, all layers run.

    Returns
    -------
    array of bool
        Of shape ``(num_layers,)``: the mask of `dropout` for an array of this shape, True for
        layers that run. Nothing is scaled.

    Raises
    ------
    TypeError, ValueError
        As `keep_mask`, and if num_layers is not an integer, or is negative.

    Notes
    -----
    A. Fan, E. Grave, A. Joulin, "Reducing transformer depth on demand with structured dropout",
    ICLR 2020.

    Examples
    --------
    >>> from unidrop import Key
    >>> from unidrop.family import layer_drop
    >>> layer_drop(6, 0.5, Key(42))
    array([ True, False, False, False, False,  True])
    """
    count = checked_integer(num_layers, "num_layers", bits=31)
    return keep_mask((count,), p, key, xp=xp, device=device, training=training)
