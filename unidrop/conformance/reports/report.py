"""What a run of the matrix gave, arranged by contract and column for whoever shows it."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from unidrop.conformance.backend import BackendNotRun
from unidrop.conformance.contracts import CONTRACTS
from unidrop.conformance.contracts.dependence import roots
from unidrop.conformance.matrix import Outcome, get_backend_name
from unidrop.conformance.runner import NotApplicable, Result

__all__ = ["Beginning", "Column", "Lack", "MatrixCell", "Report", "evidence"]

# What is said of a result that failed: which of its attributes, and its label.
_EVIDENCE = {
    "expected": "expected",
    "actual": "actual",
    "cause": "cause",
    "diff": "look",
    "reproduce": "again",
}

#: A backend and one of its modes, by their names.
Column = tuple[str, str]


def evidence(result: Result) -> Iterator[tuple[str, str]]:
    """Yield what there is to say of a result that failed, each with its label."""
    for attribute, label in _EVIDENCE.items():
        text = getattr(result, attribute)
        if text:
            yield label, text


@dataclass(frozen=True, slots=True)
class MatrixCell:
    """A contract in a column: a result for each device and dtype, or why there is none."""

    results: list[Result] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """How many of the results failed."""
        return sum(result.status == "failed" for result in self.results)

    @property
    def mark(self) -> str:
        """What stands in a table: how many passed, or failed of how many.

        Examples
        --------
        >>> MatrixCell(reasons=["it only runs eagerly"]).mark
        '-'
        """
        if not self.results:
            return "-" if self.reasons else ""
        if self.failed:
            return f"✗ {self.failed} of {len(self.results)}"
        return f"✓ {len(self.results)}" if len(self.results) > 1 else "✓"

    @property
    def status(self) -> str:
        """``passed``, ``failed``, ``missing`` or, where a contract is about other modes, empty."""
        if self.failed:
            return "failed"
        if self.results:
            return "passed"
        return "missing" if self.reasons else ""


class Report:
    """The outcomes of a run, by the backend's name, and else in the order in which they actual."""

    def __init__(self, outcomes: Iterable[Outcome] = ()) -> None:
        self.outcomes = sorted(outcomes, key=get_backend_name)
        self._squares: dict[Column, dict[str, MatrixCell]] = defaultdict(
            lambda: defaultdict(MatrixCell)
        )
        for outcome in self.outcomes:
            if isinstance(outcome, Result):
                self._square(outcome).results.append(outcome)
            elif isinstance(outcome, NotApplicable):
                self._square(outcome).reasons.append(outcome.reason)

    def _square(self, outcome: Result | NotApplicable) -> MatrixCell:
        return self._squares[outcome.backend, outcome.mode][outcome.contract]

    @property
    def results(self) -> list[Result]:
        """The cells that were run."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, Result)]

    @property
    def missing(self) -> list[NotApplicable]:
        """The contracts that do not apply, each with the reason."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, NotApplicable)]

    @property
    def failures(self) -> list[Result]:
        """The cells that failed, of each backend first those that rest on no other."""
        failed = [result for result in self.results if result.status == "failed"]
        return sorted(
            failed, key=lambda r: (r.backend, r.contract not in self._roots(r.backend, r.mode))
        )

    def _roots(self, *column: str) -> list[str]:
        """Return the contracts that failed in a column, and rest on none that did."""
        backend, mode = column
        squares = self._squares[backend, mode]
        return roots([name for name in self.contracts if name in squares and squares[name].failed])

    def beginnings(self) -> list["Beginning"]:
        """Return where to begin where many contracts fail; modes that begin alike are together."""
        modes: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
        for backend, mode in self.columns:
            first = self._roots(backend, mode)
            failed = [
                name for name, square in self._squares[backend, mode].items() if square.failed
            ]
            if len(first) < len(failed):
                modes[backend, tuple(first)].append(mode)
        return [Beginning(b, tuple(where), first) for (b, first), where in modes.items()]

    @property
    def unavailable(self) -> list[BackendNotRun]:
        """The backends that could not be loaded, or have broken down."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, BackendNotRun)]

    @property
    def is_good(self) -> bool:
        """Whether contracts were run, all of them hold, and no backend is broken."""
        broken = any(not backend.is_missing for backend in self.unavailable)
        return bool(self.results) and not self.failures and not broken

    @property
    def summary(self) -> str:
        """How many cells passed and failed.

        Examples
        --------
        >>> Report().summary
        '0 passed, 0 failed'
        """
        statuses = Counter(result.status for result in self.results)
        return f"{statuses['passed']} passed, {statuses['failed']} failed"

    @property
    def columns(self) -> list[Column]:
        """The backends and their modes, in order."""
        return list(self._squares)

    @property
    def contracts(self) -> list[str]:
        """The contracts of which there is anything to show, in order."""
        shown = {name for squares in self._squares.values() for name in squares}
        return [name for name in CONTRACTS if name in shown]

    def square(self, contract: str, column: Column) -> MatrixCell:
        """Return what there is of a contract in a column."""
        return self._squares[column].get(contract, MatrixCell())

    def lacks(self) -> list["Lack"]:
        """Return what backends lack, modes that lack the same for the same reason together."""
        contracts: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for missing in self.missing:
            where = missing.backend, missing.mode, missing.reason
            contracts[where].append(missing.contract)
        modes: dict[tuple[str, str, tuple[str, ...]], list[str]] = defaultdict(list)
        for (backend, mode, reason), names in contracts.items():
            modes[backend, reason, tuple(names)].append(mode)
        return [Lack(b, tuple(where), r, names) for (b, r, names), where in modes.items()]


@dataclass(frozen=True, slots=True)
class Beginning:
    """The contracts of a backend, in some of its modes, on which all others that failed rest."""

    backend: str
    modes: tuple[str, ...]
    contracts: tuple[str, ...]

    def __str__(self) -> str:
        it = "it" if len(self.contracts) == 1 else "them"
        return (
            f"begin with {', '.join(self.contracts)} in {self.backend} ({', '.join(self.modes)}): "
            f"the others that do not hold there rest on {it}"
        )


@dataclass(frozen=True, slots=True)
class Lack:
    """Which contracts do not apply to a backend in some of its modes, and why."""

    backend: str
    modes: tuple[str, ...]
    reason: str
    contracts: tuple[str, ...]

    def __str__(self) -> str:
        is_all = len(self.contracts) == len(CONTRACTS)
        named = "all contracts" if is_all else ", ".join(self.contracts)
        return f"{self.backend} ({', '.join(self.modes)}): {self.reason}: {named}"
