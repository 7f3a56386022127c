"""Zoneout: units of a recurrent state keep their old values at random.

The member is a plan of two arrays: dropout of the new state without a scale, plus what the same
mask drops of the old one. Both are linear, so each gradient is the same selection of the upstream
gradient, recomputed from the key.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from unidrop.dtypes import compute_dtype, dtype_name
from unidrop.key import Key, check_key
from unidrop.library import get_library
from unidrop.output import select
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = [
    "ComplementPlan",
    "ZoneoutPlan",
    "expect_zoneout",
    "get_zoneout_gradients",
    "plan_zoneout",
    "run_zoneout",
    "zoneout",
]

_UNSCALED = Rate.from_p(0).with_scale(1.0)


@dataclass(frozen=True, slots=True)
class ComplementPlan(DropoutPlan):
    """A plan that returns what another one drops, without a scale, and +0 for kept elements."""

    has_kernels: ClassVar[bool] = False

    @classmethod
    def from_plan(cls, plan: DropoutPlan) -> Self:
        """Return a plan with the mask of another one."""
        return cls(plan.library, plan.window, plan.rate, plan.drops)

    def run(self, x: Any, key: Key, mask: Any = None, out: Any = None) -> Any:
        """Compute the output under a key; ``out`` is an array to write and return."""
        y = self.select(x, self.mask(x, key) if mask is None else mask)
        if out is None:
            return y
        self.library.buffers.copy_into(out, y)
        return out

    def select(self, x: Any, mask: Any) -> Any:
        """Return x for elements outside the mask, and +0 for the others."""
        return select(self.library, x, ~mask, _UNSCALED)


@dataclass(frozen=True, slots=True, eq=False)
class ZoneoutPlan(DropoutPlan):
    """A plan of a new state, whose dropped elements come from ``old``."""

    old: Any

    @property
    def gradient(self) -> DropoutPlan:
        """The plan of the gradient of the new state: dropout without a scale."""
        return DropoutPlan(self.library, self.window, self.rate.with_scale(1.0), self.drops)

    def apply(self, x: Any, key: Key, mask: Any = None) -> Any:
        """Return the output under a key, by differentiable operations of x's library."""
        # A selection of both arrays would need the mask for its gradient.
        old = ComplementPlan.from_plan(self).apply(self.old, key, mask)
        return self.gradient.apply(x, key, mask) + old

    def run(self, x: Any, key: Key, mask: Any = None, out: Any = None) -> Any:
        """Compute the output under a key; ``out`` is an array to write and return."""
        y = self.apply(x, key, mask)
        if out is None:
            return y
        self.library.buffers.copy_into(out, y)
        return out


def plan_zoneout(new: Any, rate: Rate, *, old: Any, name: str = "new", **options: Any) -> Any:
    """Return the plan of `zoneout` in training; ``options`` as in `DropoutPlan.from_args`."""
    plan = DropoutPlan.from_args(new, rate, name=name, **options)
    library = get_library(old, "old")
    library.arrays.check(old, "old")
    if library is not plan.library:
        raise TypeError(
            f"old must be an array of the same library as {name}, got {type(old).__name__}"
        )
    if dtype_name(new.dtype).startswith("complex"):
        raise TypeError(f"{name} must be of a real dtype for zoneout, got {new.dtype}")
    if old.dtype != new.dtype:
        raise TypeError(f"old must be of the dtype of {name}, {new.dtype}, got {old.dtype}")
    pairs = zip(old.shape, new.shape, strict=False)
    is_same = not any(n is not None and m is not None and bool(n != m) for n, m in pairs)
    if len(old.shape) != len(new.shape) or not is_same:
        shapes = f"{tuple(new.shape)}, got {tuple(old.shape)}"
        raise ValueError(f"old must be of the shape of {name}, {shapes}")
    return ZoneoutPlan(plan.library, plan.window, plan.rate, plan.drops, old)


def expect_zoneout(plan: ZoneoutPlan, new: Any) -> Any:
    """Return the expectation of `zoneout` in evaluation: ``p * old + (1 - p) * new``."""
    p, library = plan.rate.p, plan.library
    if p in (0, 1):
        return plan.old if p else new
    xp, kind = library.arrays.namespace(new), compute_dtype(new.dtype)
    dtype = getattr(xp, kind)
    nan = xp.full((), math.nan, dtype=dtype, device=library.arrays.device(new))

    def multiply(x: Any, factor: float) -> Any:
        x = xp.astype(x, dtype, copy=False)
        # Compilers fuse a product and a sum, which rounds once, but they do not look through a
        # selection. This one changes no value: the product of NaN is NaN.
        return xp.where(x == x, x * plan.rate.with_scale(factor).scale_in(kind), nan)

    return xp.astype(multiply(plan.old, p) + multiply(new, 1 - p), new.dtype, copy=False)


def get_zoneout_gradients(plan: ZoneoutPlan, upstream: Any, key: Key | None) -> tuple[Any, Any]:
    """Return the gradients of the new state and of the old one; in evaluation without a key."""
    if key is not None:
        return plan.gradient.run(upstream, key), ComplementPlan.from_plan(plan).run(upstream, key)

    def multiply(factor: float) -> Any:
        rate = Rate.from_p(0).with_scale(factor) if factor else Rate.from_p(1)
        return select(plan.library, upstream, plan.ones(upstream), rate)

    return multiply(1 - plan.rate.p), multiply(plan.rate.p)


def run_zoneout(
    new: Any, rate: Rate, key: Any, return_mask: bool, *, training: bool, **options: Any
) -> Any:
    """Run `zoneout` in training or evaluation; ``key`` may be anything if nothing drops."""
    plan = plan_zoneout(new, rate, training=training, **options)
    if training:
        return plan.call(new, key, return_mask)
    expected = expect_zoneout(plan, new)
    return (expected, plan.ones(new)) if return_mask else expected


def zoneout(
    new: Any,
    old: Any,
    p: float,
    key: Key,
    *,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Keep the old value of each unit of a recurrent state with probability p.

    Parameters
    ----------
    new, old : array
        The state after and before a step, of one shape and dtype; float16, bfloat16, float32 or
        float64, and libraries as in `dropout`.
    p : int or float
        The probability of keeping an old value, in [0, 1].
    key : Key
        The name of the mask, which is the one of `dropout`. Fold in the timestep.
    training : bool, default True
        If False, the expectation ``p * old + (1 - p) * new`` is returned.
    global_shape, start, return_mask
        As in `dropout`.

    Returns
    -------
    y : array
        New elements where the mask keeps, and old ones elsewhere, without scaling. A -0 becomes +0.
        If p is 0, new itself.
    mask : array of bool
        Only with ``return_mask``: True for new elements.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; TypeError if the arrays are complex or differ in their dtypes, ValueError if
        they differ in their shapes.

    Notes
    -----
    D. Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", ICLR
    2017.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key
    >>> from unidrop.family import zoneout
    >>> zoneout(numpy.ones(6), numpy.zeros(6), 0.5, Key(42))
    array([1., 0., 0., 0., 0., 1.])
    >>> zoneout(numpy.ones(2), numpy.zeros(2), 0.25, Key(42), training=False)
    array([0.75, 0.75])
    """
    check_key(key)
    options: dict[str, Any] = {"global_shape": global_shape, "start": start}
    options |= {"old": old, "training": training}
    return run_zoneout(new, Rate.from_p(p), key, return_mask, **options)
