"""The outcomes of a run, arranged by contract and column for all formats."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from unidrop.conformance.backend import BackendNotRun
from unidrop.conformance.contracts import CONTRACTS
from unidrop.conformance.contracts.dependence import roots
from unidrop.conformance.isolation import Outcome
from unidrop.conformance.runner import NotApplicable, Result

__all__ = ["Column", "Exclusion", "MatrixCell", "Report", "RootFailures", "Row", "get_evidence"]

# The attributes of a failed result that reports show, and their labels.
_EVIDENCE = {
    "expected": "expected",
    "actual": "actual",
    "cause": "cause",
    "diff": "analyze",
    "reproduce": "rerun",
}

#: A backend and one of its modes, by their names.
Column = tuple[str, str]


def get_evidence(result: Result) -> Iterator[tuple[str, str]]:
    """Yield what explains a failed result, as pairs of a label and a text."""
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
        """Number of results that failed."""
        return sum(result.status == "failed" for result in self.results)

    @property
    def symbol(self) -> str:
        """The text of the cell in a table: how many passed, or failed of how many.

        Examples
        --------
        >>> MatrixCell(reasons=["it only runs eagerly"]).symbol
        '-'
        """
        if not self.results:
            return "-" if self.reasons else ""
        if self.failed:
            return f"✗ {self.failed} of {len(self.results)}"
        return f"✓ {len(self.results)}" if len(self.results) > 1 else "✓"

    @property
    def status(self) -> str:
        """``passed``, ``failed``, ``missing``, or empty if the contract is about other modes."""
        if self.failed:
            return "failed"
        if self.results:
            return "passed"
        return "missing" if self.reasons else ""


class Report:
    """The outcomes of a run, sorted by the backend's name."""

    def __init__(self, outcomes: Iterable[Outcome] = ()) -> None:
        self.outcomes = sorted(outcomes, key=_get_backend_name)
        self._cells: dict[Column, dict[str, MatrixCell]] = defaultdict(
            lambda: defaultdict(MatrixCell)
        )
        for outcome in self.outcomes:
            if isinstance(outcome, Result):
                self._cell(outcome).results.append(outcome)
            elif isinstance(outcome, NotApplicable):
                self._cell(outcome).reasons.append(outcome.reason)

    def _cell(self, outcome: Result | NotApplicable) -> MatrixCell:
        return self._cells[outcome.backend, outcome.mode][outcome.contract]

    @property
    def results(self) -> list[Result]:
        """The results of all cells that were run."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, Result)]

    @property
    def missing(self) -> list[NotApplicable]:
        """The contracts that do not apply, each with the reason."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, NotApplicable)]

    @property
    def unavailable(self) -> list[BackendNotRun]:
        """The backends that were skipped or are broken."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, BackendNotRun)]

    @property
    def failures(self) -> list[Result]:
        """The failed results, of each backend first those that depend on no other."""
        failed = [result for result in self.results if result.status == "failed"]
        return sorted(
            failed, key=lambda r: (r.backend, r.contract not in self._roots(r.backend, r.mode))
        )

    def _roots(self, *column: str) -> list[str]:
        """Return the failed contracts of a column that depend on no other failed one."""
        backend, mode = column
        cells = self._cells[backend, mode]
        return roots([name for name in self.contracts if name in cells and cells[name].failed])

    def root_failures(self) -> list["RootFailures"]:
        """Return which failures to look at first; modes with the same ones are together."""
        modes: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
        for backend, mode in self.columns:
            first = self._roots(backend, mode)
            failed = [name for name, cell in self._cells[backend, mode].items() if cell.failed]
            if len(first) < len(failed):
                modes[backend, tuple(first)].append(mode)
        return [RootFailures(b, tuple(where), first) for (b, first), where in modes.items()]

    @property
    def is_good(self) -> bool:
        """Whether any contract was run, all of them hold, and no backend is broken."""
        broken = any(not backend.is_missing for backend in self.unavailable)
        return bool(self.results) and not self.failures and not broken

    @property
    def summary(self) -> str:
        """The number of cells that passed and failed.

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
        return list(self._cells)

    @property
    def contracts(self) -> list[str]:
        """The contracts that have a cell, in order."""
        names = {name for cells in self._cells.values() for name in cells}
        return [name for name in CONTRACTS if name in names]

    def cell(self, contract: str, column: Column) -> MatrixCell:
        """Return the cell of a contract in a column."""
        return self._cells[column].get(contract, MatrixCell())

    def row(self, columns: Iterable[Column]) -> "Row":
        """Return the counts of some columns together."""
        cells = [self.cell(name, column) for column in columns for name in self.contracts]
        failed = sum(cell.failed for cell in cells)
        passed = sum(len(cell.results) for cell in cells) - failed
        return Row(passed, failed, sum(cell.status == "missing" for cell in cells))

    def exclusions(self) -> list["Exclusion"]:
        """Return which contracts do not apply and why; modes with the same ones are together."""
        contracts: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for missing in self.missing:
            where = missing.backend, missing.mode, missing.reason
            contracts[where].append(missing.contract)
        modes: dict[tuple[str, str, tuple[str, ...]], list[str]] = defaultdict(list)
        for (backend, mode, reason), names in contracts.items():
            modes[backend, reason, tuple(names)].append(mode)
        return [Exclusion(b, tuple(where), r, names) for (b, r, names), where in modes.items()]


def _get_backend_name(outcome: Outcome) -> str:
    return outcome.name if isinstance(outcome, BackendNotRun) else outcome.backend


@dataclass(frozen=True, slots=True)
class Row:
    """The number of results that passed and failed, and of contracts that do not apply."""

    passed: int
    failed: int
    missing: int


@dataclass(frozen=True, slots=True)
class RootFailures:
    """The failed contracts of a backend, in some modes, that explain all its other failures."""

    backend: str
    modes: tuple[str, ...]
    contracts: tuple[str, ...]

    def __str__(self) -> str:
        it = "it" if len(self.contracts) == 1 else "them"
        return (
            f"start with {', '.join(self.contracts)} in {self.backend} ({', '.join(self.modes)}): "
            f"the other failures there depend on {it}"
        )


@dataclass(frozen=True, slots=True)
class Exclusion:
    """The contracts that do not apply to a backend in some of its modes, for one reason."""

    backend: str
    modes: tuple[str, ...]
    reason: str
    contracts: tuple[str, ...]

    def __str__(self) -> str:
        is_all = len(self.contracts) == len(CONTRACTS)
        named = "all contracts" if is_all else ", ".join(self.contracts)
        return f"{self.backend} ({', '.join(self.modes)}): {self.reason}: {named}"
