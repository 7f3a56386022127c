"""DropHead: drop whole heads of attention.

The member is ordinary dropout with one decision for each head of each example.
"""

from collections.abc import Sequence
from typing import Any, SupportsFloat

from unidrop.arguments import checked_axis
from unidrop.key import Key, check_key
from unidrop.library import get_library
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.schedule import make_rate

__all__ = ["drop_head", "plan_drop_head"]


def plan_drop_head(x: Any, rate: Rate, *, axis: int, **options: Any) -> DropoutPlan:
    """Return the plan of `drop_head`; ``options`` are as in `DropoutPlan.from_args`."""
    get_library(x, options.get("name", "x"))  # raises TypeError if x is not an array
    own = 0, checked_axis(axis, x.shape)
    shared = tuple(i for i in range(len(x.shape)) if i not in own)
    return DropoutPlan.from_args(x, rate, broadcast_axes=shared, **options)


def drop_head(
    x: Any,
    p: SupportsFloat,
    key: Key,
    *,
    axis: int,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Drop whole heads of attention with probability p.

    Parameters
    ----------
    x : array
        The outputs of the heads, or their attention weights, with the batch as the first axis;
        dtypes and libraries as in `dropout`.
    p : int or float
        The probability of dropping a head of an example, in [0, 1].
    key : Key
        The name of the mask. The mask is the one of `dropout` with all axes shared but two.
    axis : int
        The axis of heads: 1 for ``(batch, heads, length, features)``, and -2 for ``(batch, length,
        heads, features)``. If 0, x has no batch.
    training, global_shape, start, return_mask
        As in `dropout`.

    Returns
    -------
    y, mask
        As in `dropout`; the mask has length 1 along all axes but the first and the one of heads.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; TypeError if axis is not an integer, ValueError if x has no such axis.

    Notes
    -----
    W. Zhou et al., "Scheduled DropHead: a regularization method for transformer models", Findings
    of EMNLP 2020. The paper scales by the number of heads over the number of kept ones. Here the
    scale is 1 / (1 - p), as in dropout: heads on different devices need not count each other, and
    an example that loses all heads is 0, not NaN.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key
    >>> from unidrop.family import drop_head
    >>> drop_head(numpy.ones((1, 6, 2, 1)), 0.5, Key(42), axis=1)[0, :, :, 0]
    array([[2., 2.],
           [0., 0.],
           [0., 0.],
           [0., 0.],
           [0., 0.],
           [2., 2.]])
    """
    check_key(key)
    window: dict[str, Any] = {"global_shape": global_shape, "start": start}
    plan = plan_drop_head(x, make_rate(p, x), axis=axis, training=training, **window)
    return plan.call(x, key, return_mask)
