"""The family of dropout: members with ordinary masks, and other formulas of the output.

A member is a plan. Its mask is the mask of `dropout` along the axes that the member shares, and its
output is ordinary dropout with another scale, between two sums of constants. So the gradient of a
member is ordinary dropout of the upstream gradient, recomputed from the key.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, SupportsFloat

from unidrop.arguments import checked_axis
from unidrop.drop_block import drop_block
from unidrop.drop_head import drop_head
from unidrop.dtypes import compute_dtype, dtype_name
from unidrop.embedding import embedding_dropout
from unidrop.gaussian import gaussian_dropout, gaussian_noise
from unidrop.key import Key, check_key
from unidrop.layer_drop import layer_drop
from unidrop.library import get_library
from unidrop.permutation import patch_dropout, permutation
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.schedule import make_rate
from unidrop.word_dropout import word_dropout
from unidrop.zoneout import zoneout

__all__ = [
    "AffinePlan",
    "Mode",
    "alpha_dropout",
    "check_mode",
    "drop_block",
    "drop_head",
    "drop_key",
    "drop_path",
    "embedding_dropout",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "gaussian_noise",
    "layer_drop",
    "locked_dropout",
    "patch_dropout",
    "permutation",
    "plan_alpha_dropout",
    "plan_drop_key",
    "plan_drop_path",
    "plan_feature_alpha_dropout",
    "plan_locked_dropout",
    "word_dropout",
    "zoneout",
]

#: What shares one decision in `drop_path`: a row is an element of the first axis.
Mode = Literal["row", "batch"]

# The negative of SELU's limit at minus infinity, from the paper's alpha and lambda.
_SELU_LIMIT: Final = 1.6732632423543772848170429916717 * 1.0507009873554804934193349852946


@dataclass(frozen=True, slots=True)
class AffinePlan(DropoutPlan):
    """A plan whose kept elements are ``(x + shift) * scale``, and whose others are ``fill``.

    The sums are in the compute dtype. A formula ``scale * x + b`` would not do: compilers fuse its
    product and its sum in some elements.
    """

    shift: float
    fill: float

    @classmethod
    def from_plan(cls, plan: DropoutPlan, scale: float, shift: float, fill: float) -> Self:
        """Return a plan with the mask of another one."""
        rate = plan.rate.with_scale(scale)
        return cls(plan.library, plan.window, rate, plan.drops, shift, fill)

    @property
    def gradient(self) -> DropoutPlan:
        """The plan of the gradient: ordinary dropout with the scale of this plan."""
        return DropoutPlan(self.library, self.window, self.rate, self.drops)

    def apply(self, x: Any, key: Key, mask: Any = None) -> Any:
        """Return the output under a key, by differentiable operations of x's library."""
        xp = self.library.arrays.namespace(x)
        device = self.library.arrays.device(x)
        dtype = getattr(xp, compute_dtype(x.dtype))
        mask = self.mask(x, key) if mask is None else mask
        zero, shift, fill = (
            xp.full((), value, dtype=dtype, device=device) for value in (0.0, self.shift, self.fill)
        )
        y = self.gradient.apply(xp.astype(x, dtype, copy=False) + shift, key, mask)
        # A sum, because the gradient of `where` would need the mask.
        return xp.astype(y + xp.where(mask, zero, fill), x.dtype, copy=False)

    def run(self, x: Any, key: Key, mask: Any = None, out: Any = None) -> Any:
        """Compute the output under a key; ``out`` is an array to write and return."""
        y = self.apply(x, key, mask)
        if out is None:
            return y
        self.library.buffers.copy_into(out, y)
        return out


def check_mode(mode: Any) -> None:
    """Raise ValueError unless mode is one of `drop_path`."""
    if mode not in ("row", "batch"):
        raise ValueError(f"mode must be 'row' or 'batch', got {mode!r}")


def plan_drop_path(
    x: Any, rate: Rate, *, mode: Mode = "row", scale_by_keep: bool = True, **options: Any
) -> DropoutPlan:
    """Return the plan of `drop_path`; ``options`` are as in `DropoutPlan.from_args`."""
    check_mode(mode)
    name = options.get("name", "x")
    get_library(x, name)  # raises TypeError if x is not an array
    first = 1 if mode == "row" else 0
    if len(x.shape) < first:
        raise ValueError(f"{name} must have an axis of rows for drop_path, got shape ()")
    rate = rate if scale_by_keep else rate.with_scale(1.0)
    axes = tuple(range(first, len(x.shape)))
    return DropoutPlan.from_args(x, rate, broadcast_axes=axes, **options)


def plan_alpha_dropout(x: Any, rate: Rate, **options: Any) -> DropoutPlan:
    """Return the plan of `alpha_dropout`; ``options`` are as in `DropoutPlan.from_args`."""
    plan = _plan_real("alpha dropout", x, rate, **options)
    p = rate.p
    if p in (0, 1):  # the limit of the formula at 1 is 0
        return plan
    scale = 1 / math.sqrt((1 - p) * (1 + p * _SELU_LIMIT**2))
    return AffinePlan.from_plan(
        plan, scale, shift=_SELU_LIMIT * p, fill=-_SELU_LIMIT * (1 - p) * scale
    )


def plan_feature_alpha_dropout(x: Any, rate: Rate, **options: Any) -> DropoutPlan:
    """Return the plan of `feature_alpha_dropout`; ``options`` as in `plan_alpha_dropout`."""
    name = options.get("name", "x")
    get_library(x, name)
    if len(x.shape) < 2:
        raise ValueError(
            f"{name} must have axes of rows and channels for feature alpha dropout, got shape "
            f"{tuple(x.shape)}"
        )
    axes = tuple(range(2, len(x.shape)))
    return plan_alpha_dropout(x, rate, broadcast_axes=axes, **options)


def plan_drop_key(x: Any, rate: Rate, **options: Any) -> DropoutPlan:
    """Return the plan of `drop_key`; ``options`` are as in `DropoutPlan.from_args`."""
    plan = _plan_real("drop_key", x, rate, **options)
    _ = rate.p  # raises for an array: the sum with 0 would change -0 at a rate of 0
    return AffinePlan.from_plan(plan, scale=1.0, shift=0.0, fill=-math.inf)


def plan_locked_dropout(x: Any, rate: Rate, *, axis: int, **options: Any) -> DropoutPlan:
    """Return the plan of `locked_dropout`; ``options`` are as in `DropoutPlan.from_args`."""
    get_library(x, options.get("name", "x"))
    axes = (checked_axis(axis, x.shape),)
    return DropoutPlan.from_args(x, rate, broadcast_axes=axes, **options)


def _plan_real(member: str, x: Any, rate: Rate, **options: Any) -> DropoutPlan:
    """Return the plan of `dropout`; raises TypeError if x is complex."""
    plan = DropoutPlan.from_args(x, rate, **options)
    if dtype_name(x.dtype).startswith("complex"):
        name = options.get("name", "x")
        raise TypeError(f"{name} must be of a real dtype for {member}, got {x.dtype}")
    return plan


def drop_path(
    x: Any,
    p: SupportsFloat,
    key: Key,
    *,
    mode: Mode = "row",
    scale_by_keep: bool = True,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Drop whole examples of a residual branch with probability p: stochastic depth.

    Parameters
    ----------
    x : array
        The output of a branch, of shape ``(N, ...)``; dtypes and libraries as in `dropout`.
    p : int, float or 0-d array
        The probability of dropping an example, in [0, 1]; an array as in `dropout`.
    key : Key
        The name of the mask. The mask is the one of `dropout` with ``broadcast_axes``.
    mode : {"row", "batch"}, default "row"
        "row" decides for each element of the first axis, and "batch" once for all.
    scale_by_keep : bool, default True
        If False, kept examples are unchanged; otherwise they are scaled by 1 / (1 - p).
    training, global_shape, start, return_mask
        As in `dropout`.

    Returns
    -------
    y : array
        Of x's shape and dtype; dropped examples are +0, even where x is NaN or infinite.
    mask : array of bool
        Only with ``return_mask``: of shape ``(N, 1, ..., 1)``, or of ones with "batch".

    Raises
    ------
    TypeError, ValueError
        As `dropout`; ValueError if mode is another one, or x has no axis of rows.

    Notes
    -----
    G. Huang et al., "Deep networks with stochastic depth", ECCV 2016.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key
    >>> from unidrop.family import drop_path
    >>> drop_path(numpy.ones((4, 2)), 0.5, Key(42))
    array([[2., 2.],
           [0., 0.],
           [0., 0.],
           [0., 0.]])
    """
    check_key(key)
    plan = plan_drop_path(
        x,
        make_rate(p, x),
        mode=mode,
        scale_by_keep=scale_by_keep,
        training=training,
        global_shape=global_shape,
        start=start,
    )
    return plan.call(x, key, return_mask)


def alpha_dropout(
    x: Any,
    p: float,
    key: Key,
    *,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Set elements to the negative limit of SELU with probability p; keep mean 0 and variance 1.

    Parameters
    ----------
    x : array
        Outputs of SELU; float16, bfloat16, float32 or float64; libraries as in `dropout`.
    p : int or float
        The probability of dropping an element, in [0, 1].
    key : Key
        The name of the mask. The mask is the one of `dropout`.
    training, broadcast_axes, global_shape, start, return_mask
        As in `dropout`.

    Returns
    -------
    y : array
        Of x's shape and dtype. With c = 1.758..., the product of SELU's two constants, kept
        elements are ``(x + c * p) * a``, and dropped ones ``-c * (1 - p) * a``, where
        ``a = 1 / sqrt((1 - p) * (1 + p * c**2))``. All are 0 if p is 1.
    mask : array of bool
        Only with ``return_mask``: True for kept elements.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; TypeError if x is complex.

    Notes
    -----
    G. Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key
    >>> from unidrop.family import alpha_dropout
    >>> alpha_dropout(numpy.zeros(3), 0.5, Key(42)).round(4)
    array([ 0.7792, -0.7792, -0.7792])
    """
    check_key(key)
    plan = plan_alpha_dropout(
        x,
        Rate.from_p(p),
        training=training,
        broadcast_axes=broadcast_axes,
        global_shape=global_shape,
        start=start,
    )
    return plan.call(x, key, return_mask)


def feature_alpha_dropout(
    x: Any,
    p: float,
    key: Key,
    *,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Apply `alpha_dropout` to whole channels of an array of shape ``(N, C, ...)``.

    Arguments, results and errors are as there; ValueError if x has fewer than two axes.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key
    >>> from unidrop.family import feature_alpha_dropout
    >>> feature_alpha_dropout(numpy.zeros((1, 2, 2)), 0.5, Key(42)).round(4)
    array([[[ 0.7792,  0.7792],
            [-0.7792, -0.7792]]])
    """
    check_key(key)
    plan = plan_feature_alpha_dropout(
        x, Rate.from_p(p), training=training, global_shape=global_shape, start=start
    )
    return plan.call(x, key, return_mask)


def drop_key(
    x: Any,
    p: float,
    key: Key,
    *,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Set scores of attention to minus infinity with probability p, before the softmax.

    Parameters
    ----------
    x : array
        The scores, such as of shape ``(batch, heads, queries, keys)``; float16, bfloat16, float32
        or float64; libraries as in `dropout`.
    p : int or float
        The probability of dropping a score, in [0, 1].
    key : Key
        The name of the mask. The mask is the one of `dropout`.
    training, broadcast_axes, global_shape, start, return_mask
        As in `dropout`.

    Returns
    -------
    y : array
        Of x's shape and dtype. Kept scores are unchanged, and dropped ones are minus infinity.
        After the softmax, dropped keys have the weight 0, and the weights of a query add up to 1.
    mask : array of bool
        Only with ``return_mask``: True for kept scores.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; TypeError if x is complex.

    Notes
    -----
    A query that loses its n keys, with probability ``p**n``, has no finite score. The softmax then
    returns NaN in most libraries.

    B. Li et al., "DropKey for vision transformer", CVPR 2023.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key
    >>> from unidrop.family import drop_key
    >>> drop_key(numpy.ones(6), 0.5, Key(42))
    array([  1., -inf, -inf, -inf, -inf,   1.])
    """
    check_key(key)
    plan = plan_drop_key(
        x,
        Rate.from_p(p),
        training=training,
        broadcast_axes=broadcast_axes,
        global_shape=global_shape,
        start=start,
    )
    return plan.call(x, key, return_mask)


def locked_dropout(
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
    """Apply dropout with one mask for all timesteps of a sequence: variational dropout.

    Parameters
    ----------
    x : array
        The sequences; dtypes and libraries as in `dropout`.
    p : int, float or 0-d array
        The probability of dropping a feature of a sequence, in [0, 1]; an array as in `dropout`.
    key : Key
        The name of the mask. The mask is the one of `dropout` with ``broadcast_axes=(axis,)``.
    axis : int
        The axis of time: 0 for ``(time, batch, features)``, and 1 for ``(batch, time, features)``.
    training, global_shape, start, return_mask
        As in `dropout`.

    Returns
    -------
    y, mask
        As in `dropout`; the mask has length 1 along the axis.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; TypeError if axis is not an integer, ValueError if x has no such axis.

    Notes
    -----
    Y. Gal, Z. Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", NeurIPS 2016; S. Merity et al., "Regularizing and optimizing LSTM language models",
    ICLR 2018.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key
    >>> from unidrop.family import locked_dropout
    >>> locked_dropout(numpy.ones((3, 1, 6)), 0.5, Key(42), axis=0)[:, 0]
    array([[2., 0., 0., 0., 0., 2.],
           [2., 0., 0., 0., 0., 2.],
           [2., 0., 0., 0., 0., 2.]])
    """
    check_key(key)
    plan = plan_locked_dropout(
        x, make_rate(p, x), axis=axis, training=training, global_shape=global_shape, start=start
    )
    return plan.call(x, key, return_mask)
