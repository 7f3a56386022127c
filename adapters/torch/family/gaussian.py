"""Members with normal numbers: Gaussian dropout and Gaussian noise."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unidrop.adapters.torch.family.member import Member, run_member
from unidrop.adapters.torch.fx import call_override
from unidrop.gaussian import NOISE_RATE, check_stddev, plan_gaussian_dropout, plan_gaussian_noise
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = ["GaussianDropout", "GaussianNoise", "gaussian_dropout", "gaussian_noise"]


def gaussian_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
) -> Any:
    """Multiply each element by a normal number of mean 1 and variance p / (1 - p).

    Parameters and errors are as in `dropout`; complex inputs raise TypeError, and a p of 1 raises
    ValueError. `unidrop.family.gaussian_dropout` has the formula. The backward pass recomputes the
    factors from the key.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import gaussian_dropout
    >>> gaussian_dropout(torch.ones(3), 0.5, key=Key(42))
    tensor([1.3708, 1.0438, 0.4998])
    """
    options: dict[str, Any] = {"key": key, "global_shape": global_shape, "start": start}
    if not isinstance(input, Tensor):
        return call_override(gaussian_dropout, input, p, training, inplace, **options)
    options["return_mask"] = False
    return run_member(plan_gaussian_dropout, input, Rate.from_p(p), training, inplace, **options)


def gaussian_noise(
    input: Tensor,
    stddev: float,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
) -> Any:
    """Add a normal number of mean 0 and standard deviation stddev to each element.

    The other parameters and the errors are as in `gaussian_dropout`.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import gaussian_noise
    >>> gaussian_noise(torch.zeros(3), 0.1, key=Key(42))
    tensor([ 0.0371,  0.0044, -0.0500])
    """
    options: dict[str, Any] = {"key": key, "global_shape": global_shape, "start": start}
    if not isinstance(input, Tensor):
        return call_override(gaussian_noise, input, stddev, training, inplace, **options)
    options |= {"return_mask": False, "stddev": stddev}
    rate = Rate.from_p(NOISE_RATE)
    return run_member(plan_gaussian_noise, input, rate, training, inplace, **options)


class GaussianDropout(Member):
    """In training, multiply the input by normal numbers of mean 1 and variance p / (1 - p).

    Parameters, attributes and errors are as in `Dropout`. The backward pass recomputes the factors
    from the key. `unidrop.family.gaussian_dropout` has the formula.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import GaussianDropout
    >>> GaussianDropout(0.5, seed=42)(torch.ones(3))
    tensor([1.7105, 0.7370, 1.3253])
    """

    def _plan(self, input: Tensor) -> DropoutPlan:
        rate = Rate.from_p(self.p)
        return plan_gaussian_dropout(input, rate, training=self.training, name="input")


class GaussianNoise(Member):
    """In training, add normal numbers of mean 0 and standard deviation stddev to the input.

    Parameters
    ----------
    stddev : int or float
        The standard deviation, at least 0. A schedule may set the attribute.
    inplace, seed
        As in `Dropout`.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`, and if stddev is not a Python number, 0 or in [2^-100, 2^127).

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import GaussianNoise
    >>> GaussianNoise(0.1, seed=42)(torch.zeros(3))
    tensor([ 0.0710, -0.0263,  0.0325])
    """

    def __init__(
        self, stddev: float, inplace: bool = False, *, seed: int | Key | None = None
    ) -> None:
        super().__init__(0.0, inplace, seed=seed)
        self.stddev = stddev

    @property
    def stddev(self) -> float:
        """The standard deviation."""
        return self.p

    @stddev.setter
    def stddev(self, value: float) -> None:
        self.p = check_stddev(value)

    def _plan(self, input: Tensor) -> DropoutPlan:
        options: dict[str, Any] = {"stddev": self.p, "training": self.training, "name": "input"}
        return plan_gaussian_noise(input, Rate.from_p(NOISE_RATE), **options)

    def extra_repr(self) -> str:
        """Return the standard deviation, and the seed if there is one."""
        text = f"stddev={self.stddev}, inplace={self.inplace}"
        return text if self.seed is None else f"{text}, seed={self.seed}"
