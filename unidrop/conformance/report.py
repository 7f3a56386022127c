"""How the matrix is shown: tables in the terminal, and JSON."""

import json
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from textwrap import indent
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unidrop.conformance.backend import UnavailableBackend
from unidrop.conformance.contracts import CONTRACTS
from unidrop.conformance.matrix import Outcome, backend_of
from unidrop.conformance.runner import Missing, Result
from unidrop.mask import STREAM_VERSION

__all__ = ["Report"]

_Column = tuple[str, str]

# What there is to say of what failed alone.
_OF_FAILURES = ("expected", "came", "details")

# The widest mark of a cell, and what stands beside each column: two spaces and a rule.
_MARK = len("✗ 10 of 10")
_PADDING = 3


class Report:
    """The outcomes of a run, by the backend's name, and else in the order in which they came."""

    def __init__(self, outcomes: Iterable[Outcome] = ()) -> None:
        self.outcomes = sorted(outcomes, key=backend_of)

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

    def print(self, console: Console, *, tracebacks: bool = False) -> None:
        """Print the tables, what is missing and why, each failure, and a closing line."""
        for table in self._tables(console.width):
            console.print(table)
        for reason, contracts in self._missing().items():
            named = "all contracts" if len(contracts) == len(CONTRACTS) else ", ".join(contracts)
            console.print(Text(f"- {reason}: {named}", style="dim"), soft_wrap=True)
        for backend in self.unavailable:
            word, style = ("not here", "yellow") if backend.is_missing else ("broken", "bold red")
            line = f"! {backend.name} is {word}: {backend.error}"
            console.print(Text(line, style=style), soft_wrap=True)
            if tracebacks:
                _print_traceback(console, backend.details)
        for result in self.failures:
            _print_failure(console, result)
            if tracebacks:
                _print_traceback(console, result.details)
        if not self.results:
            console.print("nothing was run: no chosen backend has what the chosen contracts need")
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
                    asdict(outcome) for outcome in self.outcomes if isinstance(outcome, Missing)
                ],
                "unavailable": [
                    {"backend": backend.name, "error": backend.error, "details": backend.details}
                    for backend in self.unavailable
                ],
            },
            indent=1,
        )

    def _tables(self, width: int) -> Iterator[Table]:
        """Yield tables of as many columns as fit beside each other, all with the same rows."""
        cells: dict[_Column, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
        missing: dict[_Column, set[str]] = defaultdict(set)
        columns: dict[_Column, None] = {}
        for outcome in self.outcomes:
            if isinstance(outcome, Result):
                column = outcome.backend, outcome.mode
                cells[column][outcome.contract].append(outcome)
            elif isinstance(outcome, Missing):
                column = outcome.backend, outcome.mode
                missing[column].add(outcome.contract)
            else:
                continue
            columns[column] = None
        shown = {name for found in (*cells.values(), *missing.values()) for name in found}
        names = [name for name in CONTRACTS if name in shown]
        title = f"unidrop conformance, stream {STREAM_VERSION}"
        for group in _beside_each_other(list(columns), names, width):
            table = Table(title=title, title_justify="left")
            title = ""
            table.add_column("contract", no_wrap=True)
            for backend, mode in group:
                table.add_column(f"{backend}\n{mode}", justify="center", no_wrap=True)
            for name in names:
                marks = (_mark(cells[c][name], name in missing[c]) for c in group)
                table.add_row(name, *marks)
            yield table

    def _missing(self) -> Mapping[str, Sequence[str]]:
        """Return the contracts for which each reason stands, by the line that says so."""
        modes: dict[tuple[str, str, tuple[str, ...]], list[str]] = defaultdict(list)
        for (backend, mode, reason), contracts in self._lacking().items():
            modes[backend, reason, tuple(contracts)].append(mode)
        return {
            f"{backend} ({', '.join(where)}): {reason}": contracts
            for (backend, reason, contracts), where in modes.items()
        }

    def _lacking(self) -> Mapping[tuple[str, str, str], Sequence[str]]:
        lacking: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for outcome in self.outcomes:
            if isinstance(outcome, Missing):
                where = outcome.backend, outcome.mode, outcome.reason
                lacking[where].append(outcome.contract)
        return lacking


def _beside_each_other(
    columns: Sequence[_Column], names: Sequence[str], width: int
) -> Iterator[list[_Column]]:
    """Yield groups of columns that fit into a width beside the contracts' names."""
    first = max(map(len, names), default=0) + _PADDING + 1
    group: list[_Column] = []
    used = first
    for column in columns:
        needed = max(*map(len, column), _MARK) + _PADDING
        if group and used + needed > width:
            yield group
            group, used = [], first
        group.append(column)
        used += needed
    if group:
        yield group


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
    console.print(Text(f"✗ {result}", style="bold red"), soft_wrap=True)
    console.print(Text(f"  promise   {CONTRACTS[result.contract].promise}"), soft_wrap=True)
    console.print(Text(f"  expected  {result.expected}"), soft_wrap=True)
    console.print(Text(f"  came      {result.came}"), soft_wrap=True)
    console.print(Text(f"  again     {result.reproduce}"), soft_wrap=True)


def _print_traceback(console: Console, details: str) -> None:
    console.print(Text(indent(details.rstrip(), "    ")), soft_wrap=True)


def _as_dict(result: Result) -> dict[str, Any]:
    described = asdict(result) | {"seconds": round(result.seconds, 4)}
    if result.status == "failed":
        return described | {"reproduce": result.reproduce}
    return {name: value for name, value in described.items() if name not in _OF_FAILURES}
