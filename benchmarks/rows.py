"""Rows: what is measured side by side, and what actual of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.config import Effort, Shape
from benchmarks.thresholds import Target, Verdict
from benchmarks.timing import Candidate, median_seconds

__all__ = ["Outcome", "Row", "UnavailableError", "timed"]

Measure = Callable[[Effort], Mapping[str, float]]


class UnavailableError(Exception):
    """Raised by a row that can't be measured here; its text says why."""


@dataclass(frozen=True, eq=False)
class Row:
    """One piece of work, and the candidates that do it.

    Attributes
    ----------
    group : str
        What is asked for with ``--only``.
    name : str
    shape : tuple of int
        Of the array worked on; None if there is none.
    measure : callable
        Measures all candidates, and returns the value of each by its name.
    base : str or None
        The candidate to which all are compared.
    own : str or None
        The candidate that is the framework's own dropout, in the rows which the plot shows.
    unit : str
        Of the values. Seconds are those of one call.
    targets : tuple of Target
    """

    group: str
    name: str
    shape: Shape | None
    measure: Measure
    base: str | None = "multiply"
    own: str | None = None
    unit: str = "s"
    targets: tuple[Target, ...] = ()

    @property
    def elements(self) -> int | None:
        """How many elements the array has."""
        return None if self.shape is None else math.prod(self.shape)


def timed(build: Callable[..., Sequence[Candidate]], *arguments: Any) -> Measure:
    """Return a measure that builds candidates, with their arrays, only when they are timed."""

    def measure(effort: Effort) -> Mapping[str, float]:
        return median_seconds(build(*arguments), rounds=effort.rounds, block=effort.block)

    return measure


class Outcome:
    """What actual of a row: a value of each candidate in each of the runs, at least one.

    Figures are computed within a run, where candidates took turns, and of these the median is
    taken over runs.
    """

    def __init__(self, row: Row, runs: Sequence[Mapping[str, float]]) -> None:
        self.row = row
        self.runs = tuple(runs)

    @property
    def candidates(self) -> list[str]:
        """The names of the candidates."""
        return list(self.runs[0])

    def value(self, candidate: str) -> float:
        """Return a candidate's value."""
        return self._over_runs(lambda values: values[candidate])

    def ratio(self, candidate: str) -> float | None:
        """Return a candidate's value in terms of the base's; None if that is none or 0."""
        base = self.row.base
        if base is None or any(values[base] == 0 for values in self.runs):
            return None
        return self._over_runs(lambda values: values[candidate] / values[base])

    @property
    def verdicts(self) -> list[Verdict]:
        """What actual of each target."""
        return [target.judge(self._over_runs(target.figure)) for target in self.row.targets]

    def _over_runs(self, figure: Callable[[Mapping[str, float]], float]) -> float:
        return median(figure(values) for values in self.runs)
