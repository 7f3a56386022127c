"""Gaussian dropout and Gaussian noise: normal deviates that multiply an array, or are added to it.

The members are plans. The factors of Gaussian dropout are a pure function of a key, so the gradient
is the upstream gradient times the same factors, and nothing is stored for it. The gradient of added
noise is the upstream gradient itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy

from unidrop.dtypes import compute_dtype, dtype_name
from unidrop.key import Key, check_key
from unidrop.normal import make_normal
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = [
    "NOISE_RATE",
    "NoisePlan",
    "NormalPlan",
    "check_stddev",
    "gaussian_dropout",
    "gaussian_noise",
    "plan_gaussian_dropout",
    "plan_gaussian_noise",
]

#: Noise has no decisions. This is its rate where a function needs one.
NOISE_RATE = 0.5

_RATE = Rate.from_p(NOISE_RATE)

# In single precision, a larger unit of deviates could be infinite.
_MOST = 2.0**127

# Several libraries flush the unit of smaller deviates, which is subnormal, to zero.
_LEAST = 2.0**-100


@dataclass(frozen=True, slots=True)
class NormalPlan(DropoutPlan):
    """A plan that multiplies each element by ``mean`` plus a normal deviate of the key."""

    mean: float
    stddev: float

    has_kernels: ClassVar[bool] = False

    @classmethod
    def from_plan(cls, plan: DropoutPlan, mean: float, stddev: float) -> Self:
        """Return a plan with the window of another one."""
        return cls(plan.library, plan.window, _RATE, plan.drops, mean, stddev)

    def run_portable(self, x: Any, key: Key) -> Any:
        """Compute the products of an array that is not empty."""
        xp = self.library.arrays.namespace(x)
        dtype = getattr(xp, compute_dtype(x.dtype))
        factor = make_normal(self.library, x, key, self.window, self.stddev, dtype)
        if self.mean:
            factor = factor + self.mean
        with numpy.errstate(over="ignore", invalid="ignore"):
            y = xp.astype(xp.astype(x, dtype, copy=False) * factor, x.dtype, copy=False)
        return self.library.arrays.match_strides(y, x)

    def run(self, x: Any, key: Key, mask: Any = None, out: Any = None) -> Any:
        """Compute the output under a key; ``out`` is an array to write and return."""
        y = x if 0 in x.shape else self.run_portable(x, key)
        if out is None:
            return y
        self.library.buffers.copy_into(out, y)
        return out


@dataclass(frozen=True, slots=True)
class NoisePlan(DropoutPlan):
    """A plan that adds a normal deviate of the key to each element."""

    stddev: float

    def apply(self, x: Any, key: Key, mask: Any = None) -> Any:
        """Return the sums, by differentiable operations of x's library."""
        xp = self.library.arrays.namespace(x)
        wide = xp.astype(x, getattr(xp, compute_dtype(x.dtype)), copy=False)
        # An operator of the library, because a compiler traces it as one.
        noise = NormalPlan.from_plan(self, 0.0, self.stddev)
        ones = xp.zeros_like(wide) + 1.0
        return xp.astype(wide + noise.apply(ones, key), x.dtype, copy=False)

    def run(self, x: Any, key: Key, mask: Any = None, out: Any = None) -> Any:
        """Compute the output under a key; ``out`` is an array to write and return."""
        y = self.apply(x, key)
        if out is None:
            return y
        self.library.buffers.copy_into(out, y)
        return out


def check_stddev(stddev: Any) -> float:
    """Return a standard deviation as a float.

    Raises
    ------
    TypeError
        If stddev is not a Python number.
    ValueError
        If stddev is negative, NaN, 2^127 and more, or above 0 and below 2^-100.
    """
    if isinstance(stddev, bool) or not isinstance(stddev, int | float):
        raise TypeError(
            f"stddev must be a Python int or float, got {stddev!r} of type {type(stddev).__name__}"
        )
    if not 0 <= stddev < _MOST:
        raise ValueError(f"stddev must be at least 0 and below 2**127, got {stddev}")
    if 0 < stddev < _LEAST:
        raise ValueError(f"stddev must be 0 or at least 2**-100, got {stddev}")
    return float(stddev)


def plan_gaussian_dropout(x: Any, rate: Rate, **options: Any) -> DropoutPlan:
    """Return the plan of `gaussian_dropout`; ``options`` are as in `DropoutPlan.from_args`."""
    plan = _plan_real(x, rate, "Gaussian dropout", **options)
    if rate.p == 1:
        raise ValueError("the rate of Gaussian dropout must be below 1, got 1")
    return NormalPlan.from_plan(plan, 1.0, math.sqrt(rate.p / (1 - rate.p))) if plan.drops else plan


def plan_gaussian_noise(
    x: Any, rate: Rate, *, stddev: float, training: bool = True, **options: Any
) -> DropoutPlan:
    """Return the plan of `gaussian_noise`; ``options`` are as in `DropoutPlan.from_args`.

    The rate is not used, but makes this function one of the members'.
    """
    stddev = check_stddev(stddev)
    training = bool(training) and stddev > 0
    plan = _plan_real(x, _RATE, "Gaussian noise", training=training, **options)
    return NoisePlan(plan.library, plan.window, plan.rate, plan.drops, stddev)


def _plan_real(x: Any, rate: Rate, member: str, **options: Any) -> DropoutPlan:
    """Return a plan; raises TypeError for complex numbers too."""
    plan = DropoutPlan.from_args(x, rate, **options)
    if dtype_name(x.dtype).startswith("complex"):
        name = options.get("name", "x")
        raise TypeError(f"{name} must be of a real dtype for {member}, got {x.dtype}")
    return plan


def gaussian_dropout(
    x: Any,
    p: float,
    key: Key,
    *,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
) -> Any:
    """Multiply each element by a normal number of mean 1 and variance p / (1 - p).

    Parameters
    ----------
    x : array
        float16, bfloat16, float32 or float64; libraries as in `dropout`.
    p : int or float
        The rate of the dropout of the same variance, in [0, 1).
    key : Key
        The name of the factors. Use each key once.
    training, broadcast_axes, global_shape, start
        As in `dropout`. Elements along ``broadcast_axes`` share one factor.

    Returns
    -------
    array
        Of x's shape and dtype.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; TypeError if x is complex, and ValueError if p is 1.

    Notes
    -----
    N. Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
    JMLR 15 (2014), section 10.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key
    >>> from unidrop.family import gaussian_dropout
    >>> gaussian_dropout(numpy.ones(3), 0.5, Key(42)).round(4)
    array([1.3708, 1.0438, 0.4998])
    """
    check_key(key)
    options: dict[str, Any] = {"broadcast_axes": broadcast_axes, "start": start}
    options |= {"global_shape": global_shape, "training": training}
    return plan_gaussian_dropout(x, Rate.from_p(p), **options).call(x, key, False)


def gaussian_noise(
    x: Any,
    stddev: float,
    key: Key,
    *,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
) -> Any:
    """Add a normal number of mean 0 and standard deviation stddev to each element.

    Parameters
    ----------
    stddev : int or float
        The standard deviation, 0 or in [2^-100, 2^127).
    x, key, training, broadcast_axes, global_shape, start
        As in `gaussian_dropout`.

    Returns
    -------
    array
        Of x's shape and dtype.

    Raises
    ------
    TypeError, ValueError
        As `gaussian_dropout`, and if stddev is not a Python number in its interval.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key
    >>> from unidrop.family import gaussian_noise
    >>> gaussian_noise(numpy.zeros(3), 1.0, Key(42)).round(4)
    array([ 0.3708,  0.0438, -0.5002])
    """
    check_key(key)
    options: dict[str, Any] = {"broadcast_axes": broadcast_axes, "start": start}
    options |= {"global_shape": global_shape, "training": training}
    return plan_gaussian_noise(x, _RATE, stddev=stddev, **options).call(x, key, False)
