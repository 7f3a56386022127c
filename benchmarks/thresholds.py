"""Targets: the bounds of a row, and the verdicts on them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Target", "Verdict", "at_most", "at_most_more", "below", "faster", "not_slower"]

Values = Mapping[str, float]


@dataclass(frozen=True)
class Target:
    """A bound on a figure that is computed from a row's values.

    Attributes
    ----------
    candidate : str
        Name of the candidate that must reach the target.
    text : str
        Text of the bound, for reports.
    figure : callable
        Computes the figure from the value of each candidate.
    bound : float
    is_floor : bool
        If True, the figure must be at least the bound. Otherwise it must be at most the bound.
    """

    candidate: str
    text: str
    figure: Callable[[Values], float]
    bound: float
    is_floor: bool = False

    def judge(self, figure: float) -> "Verdict":
        """Return the verdict on a figure."""
        reached = figure >= self.bound if self.is_floor else figure <= self.bound
        return Verdict(self, figure, reached)


@dataclass(frozen=True)
class Verdict:
    """The verdict on a target: the figure, and whether it reaches the bound."""

    target: Target
    figure: float
    reached: bool

    def __str__(self) -> str:
        word = "reached" if self.reached else "not reached"
        return f"{self.target.text}: {self.figure:.3g}, {word}"


def at_most(factor: float, candidate: str, reference: str) -> Target:
    """Limit a candidate's time to a multiple of the reference's time.

    Examples
    --------
    >>> print(at_most(1.5, "unidrop", "multiply").judge(1.25))
    ≤ 1.5 x multiply: 1.25, reached
    """
    return Target(
        candidate,
        f"≤ {factor:.3g} x {reference}",
        lambda values: values[candidate] / values[reference],
        factor,
    )


def not_slower(reference: str, *candidates: str) -> tuple[Target, ...]:
    """Limit the time of each candidate to the reference's time."""
    return tuple(at_most(1, candidate, reference) for candidate in candidates)


def faster(factor: float, candidate: str, reference: str) -> Target:
    """Require a candidate to be faster than a reference, by at least a factor.

    Examples
    --------
    >>> target = faster(8, "unidrop", "naive")
    >>> print(target.judge(target.figure({"unidrop": 0.5, "naive": 2.0})))
    ≥ 8 x faster than naive: 4, not reached
    """
    return Target(
        candidate,
        f"≥ {factor:g} x faster than {reference}",
        lambda values: values[reference] / values[candidate],
        factor,
        is_floor=True,
    )


def at_most_more(bound: float, candidate: str, reference: str, text: str) -> Target:
    """Limit the difference between a candidate's value and the reference's value."""
    return Target(candidate, text, lambda values: values[candidate] - values[reference], bound)


def below(bound: float, candidate: str, text: str) -> Target:
    """Limit a candidate's value."""
    return Target(candidate, text, lambda values: values[candidate], bound)
