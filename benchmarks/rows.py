"""Rows: candidates that run side by side, and the outcome of their measurement."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.config import Config, Shape
from benchmarks.thresholds import Target, Verdict
from benchmarks.timing import Candidate, median_seconds

__all__ = ["Outcome", "Row", "UnavailableError", "timed"]

Measure = Callable[[Config], Mapping[str, float]]


class UnavailableError(Exception):
    """Raised by a row that this machine cannot measure. The message is the reason."""


@dataclass(frozen=True, eq=False)
class Row:
    """One task, and the candidates that do it.

    Attributes
    ----------
    group : str
        Name of the group, for ``--only``.
    name : str
    shape : tuple of int
        Shape of the input array. None if there is no array.
    measure : callable
        Measures all candidates, and returns their values by name.
    base : str or None
        Name of the candidate for comparison.
    own : str or None
        Name of the framework's own dropout. The plot and the table of ratios show only rows with
        one.
    unit : str
        Unit of the values. A time is the time of one call.
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
        """The number of elements of the array."""
        return None if self.shape is None else math.prod(self.shape)


def timed(
    build: Callable[..., Sequence[Candidate]],
    *arguments: Any,
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Measure:
    """Return a measure that builds candidates, with their arrays, just before it times them.

    ``within`` returns the context of the whole measurement.
    """

    def measure(config: Config) -> Mapping[str, float]:
        with within():
            return median_seconds(build(*arguments), rounds=config.rounds, block=config.block)

    return measure


class Outcome:
    """The outcome of a row: the values of its candidates in at least one run.

    A figure is computed within each run, because candidates took turns there. The result is the
    median over runs.
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
        """Return a candidate's value relative to the base. None if there is no base, or it is 0."""
        base = self.row.base
        if base is None or any(values[base] == 0 for values in self.runs):
            return None
        return self.quotient(candidate, base)

    def quotient(self, candidate: str, reference: str) -> float:
        """Return a candidate's value relative to a reference, which must not be 0."""
        return self._over_runs(lambda values: values[candidate] / values[reference])

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdict on each target."""
        return [target.judge(self._over_runs(target.figure)) for target in self.row.targets]

    def _over_runs(self, figure: Callable[[Mapping[str, float]], float]) -> float:
        return median(figure(values) for values in self.runs)
