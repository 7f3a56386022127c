"""How the matrix is shown: a table in the terminal, and JSON."""

import json
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unidrop.conformance.backend import UnavailableBackend
from unidrop.conformance.contracts import CONTRACTS
from unidrop.conformance.runner import Missing, Result
from unidrop.mask import STREAM_VERSION

__all__ = ["Report"]

Outcome = Result | Missing | UnavailableBackend


class Report:
    """The outcomes of a run, in the order in which they came."""

    def __init__(self, outcomes: Iterable[Outcome] = ()) -> None:
        self.outcomes = list(outcomes)

    @property
    def results(self) -> list[Result]:
        """The cells that were run."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, Result)]

    @property
    def failures(self) -> list[Result]:
        """The cells that failed."""
        return [result for result in self.results if result.status == "failed"]

    @property
    def unavailable(self) -> list[UnavailableBackend]:
        """The backends that could not be loaded."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, UnavailableBackend)]

    @property
    def is_good(self) -> bool:
        """Whether contracts were run, all of them hold, and no backend is broken."""
        broken = any(not backend.is_missing for backend in self.unavailable)
        return bool(self.results) and not self.failures and not broken

    def print(self, console: Console) -> None:
        """Print the table, what is missing and why, each failure, and a closing line."""
        console.print(self._table())
        for reason, abilities in self._missing().items():
            console.print(Text(f"- {reason}: {', '.join(abilities)}", style="dim"), soft_wrap=True)
        for backend in self.unavailable:
            word, style = ("not here", "yellow") if backend.is_missing else ("broken", "bold red")
            line = f"! {backend.name} is {word}: {type(backend.error).__name__}: {backend.error}"
            console.print(Text(line, style=style), soft_wrap=True)
        for result in self.failures:
            _print_failure(console, result)
        style = "bold green" if self.is_good else "bold red"
        console.print(Text(self.summary(), style=style), soft_wrap=True)

    def summary(self) -> str:
        """Return the closing line.

        Examples
        --------
        >>> Report().summary()
        '0 passed, 0 failed'
        """
        statuses = Counter(result.status for result in self.results)
        return f"{statuses['passed']} passed, {statuses['failed']} failed"

    def to_json(self) -> str:
        """Return everything as JSON: one object a cell, and what is missing."""
        return json.dumps(
            {
                "stream": STREAM_VERSION,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "cells": [_as_dict(result) for result in self.results],
                "missing": [
                    {
                        "contract": outcome.contract.name,
                        "backend": outcome.backend.name,
                        "reason": outcome.reason,
                    }
                    for outcome in self.outcomes
                    if isinstance(outcome, Missing)
                ],
                "unavailable": [
                    {"backend": backend.name, "error": repr(backend.error)}
                    for backend in self.unavailable
                ],
            },
            indent=1,
        )

    def _table(self) -> Table:
        columns = dict.fromkeys((r.cell.backend.name, r.cell.mode) for r in self.results)
        cells: Mapping[tuple[str, str, str], list[Result]] = defaultdict(list)
        for result in self.results:
            cell = result.cell
            cells[cell.contract.name, cell.backend.name, cell.mode].append(result)
        missing = {
            (outcome.contract.name, outcome.backend.name)
            for outcome in self.outcomes
            if isinstance(outcome, Missing)
        }
        table = Table(title=f"unidrop conformance, stream {STREAM_VERSION}", title_justify="left")
        table.add_column("contract", no_wrap=True)
        for backend, mode in columns:
            table.add_column(f"{backend}\n{mode}", justify="center", overflow="fold")
        shown = {name for name, _, _ in cells} | {name for name, _ in missing}
        for name in CONTRACTS:
            if name in shown:
                table.add_row(
                    name,
                    *(
                        _mark(cells[name, backend, mode], (name, backend) in missing)
                        for backend, mode in columns
                    ),
                )
        return table

    def _missing(self) -> Mapping[str, Sequence[str]]:
        reasons: dict[str, list[str]] = defaultdict(list)
        for outcome in self.outcomes:
            if isinstance(outcome, Missing):
                reasons[f"{outcome.backend.name}: {outcome.reason}"].append(outcome.contract.name)
        return reasons


def _mark(results: Sequence[Result], missing: bool) -> Text:
    """Return a cell's text: how many passed of how many dtypes and devices."""
    if not results:
        return Text("-" if missing else "", style="dim")
    failed = sum(result.status == "failed" for result in results)
    if failed:
        return Text(f"✗ {failed} of {len(results)}", style="bold red")
    return Text(f"✓ {len(results)}" if len(results) > 1 else "✓", style="green")


def _print_failure(console: Console, result: Result) -> None:
    console.print()
    console.print(Text(f"✗ {result.cell}", style="bold red"), soft_wrap=True)
    console.print(Text(f"  promise   {result.cell.contract.promise}"), soft_wrap=True)
    console.print(Text(f"  expected  {result.expected}"), soft_wrap=True)
    console.print(Text(f"  came      {result.came}"), soft_wrap=True)
    console.print(Text(f"  again     {result.reproduce}"), soft_wrap=True)


def _as_dict(result: Result) -> dict[str, Any]:
    cell = result.cell
    described = {
        "contract": cell.contract.name,
        "backend": cell.backend.name,
        "device": cell.device,
        "dtype": cell.dtype,
        "mode": cell.mode,
        "status": result.status,
        "seconds": round(result.seconds, 4),
    }
    if result.status == "failed":
        described |= {
            "expected": result.expected,
            "came": result.came,
            "details": result.details,
            "reproduce": result.reproduce,
        }
    return described
