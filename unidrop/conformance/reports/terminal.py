"""The matrix in a terminal: tables, reasons and failures."""

from collections.abc import Iterator, Sequence
from textwrap import indent

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unidrop.conformance.contracts import CONTRACTS
from unidrop.conformance.reports.report import Column, Report, evidence
from unidrop.conformance.runner import Result
from unidrop.mask import STREAM_VERSION

__all__ = ["print_report"]

# The widest mark of a cell, and what stands beside each column: two spaces and a rule.
_MARK = len("✗ 10 of 10")
_PADDING = 3

_STYLES = {"passed": "green", "failed": "bold red", "missing": "dim", "": ""}


def print_report(report: Report, console: Console, *, tracebacks: bool = False) -> None:
    """Print the tables, what is missing and why, each failure, and at last where to begin."""
    console.print(Text(f"unidrop conformance, stream {STREAM_VERSION}"), soft_wrap=True)
    for table in _tables(report, console.width):
        console.print(table)
    for lack in report.lacks():
        console.print(Text(f"- {lack}", style="dim"), soft_wrap=True)
    for backend in report.unavailable:
        word, style = ("not here", "yellow") if backend.is_missing else ("broken", "bold red")
        line = f"! {backend.name} is {word}: {backend.error}"
        console.print(Text(line, style=style), soft_wrap=True)
        if tracebacks:
            _print_traceback(console, backend.details)
    for result in report.failures:
        _print_failure(console, result)
        if tracebacks:
            _print_traceback(console, result.details)
    if not report.results:
        what = "no chosen backend that is here has what the chosen contracts need"
        console.print(f"nothing was run: {what}")
    style = "bold green" if report.is_good else "bold red"
    for line in (*map(str, report.beginnings()), report.summary):
        console.print(Text(line, style=style), soft_wrap=True)


def _tables(report: Report, width: int) -> Iterator[Table]:
    """Yield tables of as many columns as fit beside each other, all with the same rows."""
    for group in _beside_each_other(report, width):
        table = Table()
        table.add_column("contract", no_wrap=True)
        for backend, mode in group:
            table.add_column(f"{backend}\n{mode}", justify="center", no_wrap=True)
        for name in report.contracts:
            squares = (report.square(name, column) for column in group)
            table.add_row(name, *(Text(s.mark, style=_STYLES[s.status]) for s in squares))
        yield table


def _beside_each_other(report: Report, width: int) -> Iterator[Sequence[Column]]:
    """Yield groups of columns that fit into a width beside the contracts' names."""
    first = max(map(len, report.contracts), default=0) + _PADDING + 1
    group: list[Column] = []
    used = first
    for column in report.columns:
        needed = max(*map(len, column), _MARK) + _PADDING
        if group and used + needed > width:
            yield group
            group, used = [], first
        group.append(column)
        used += needed
    if group:
        yield group


def _print_failure(console: Console, result: Result) -> None:
    console.print()
    console.print(Text(f"✗ {result}", style="bold red"), soft_wrap=True)
    console.print(Text(f"  promise   {CONTRACTS[result.contract].promise}"), soft_wrap=True)
    for label, text in evidence(result):
        console.print(Text(f"  {label:9} {text}"), soft_wrap=True)


def _print_traceback(console: Console, details: str) -> None:
    console.print(Text(indent(details.rstrip(), "    ")), soft_wrap=True)
