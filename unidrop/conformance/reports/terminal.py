"""The matrix in a terminal: a line for each backend, and every failure in full."""

from collections.abc import Iterator, Sequence
from textwrap import indent

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unidrop.conformance.contracts import CONTRACTS
from unidrop.conformance.reports.report import Column, Report, get_evidence
from unidrop.conformance.runner import Result
from unidrop.mask import STREAM_VERSION

__all__ = ["print_report"]

# The widest symbol of a cell, and the padding of a column: two spaces and a rule.
_SYMBOL = len("✗ 10 of 10")
_PADDING = 3

_STYLES = {"passed": "green", "failed": "bold red", "missing": "dim", "": ""}


def print_report(
    report: Report,
    console: Console,
    *,
    table: bool = False,
    reasons: bool = False,
    tracebacks: bool = False,
) -> None:
    """Print a line for each backend, each failure, and where to look next.

    Parameters
    ----------
    report : Report
    console : Console
    table, reasons, tracebacks : bool, default False
        If True, also print every contract in every mode, why contracts do not apply, and the
        tracebacks of failures.
    """

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    line(f"unidrop conformance, stream {STREAM_VERSION}")
    if report.columns:
        console.print(_summary(report))
    if table:
        for part in _tables(report, console.width):
            console.print(part)
    if reasons:
        for exclusion in report.exclusions():
            line(f"- {exclusion}", "dim")
    for backend in report.unavailable:
        if backend.is_missing:
            line(f"{backend.name}: skipped ({backend.error})", "yellow")
        else:
            line(f"✗ {backend.name}: broken ({backend.error})", "bold red")
        if tracebacks:
            line(indent(backend.details.rstrip(), "    "))
    for result in report.failures:
        _print_failure(console, result)
        if tracebacks and result.details:
            line(indent(result.details.rstrip(), "    "))
    if report.failures:
        line("")
    skipped = [backend for backend in report.unavailable if backend.is_missing]
    if skipped and len(skipped) == len(report.outcomes):
        line("nothing was run: every chosen backend was skipped")
        line(report.summary, "bold red")
        return
    if not report.results:
        line("nothing was run: no chosen contract applies to a chosen backend that is installed")
    style = "bold green" if report.is_good else "bold red"
    for text in (*map(str, report.root_failures()), report.summary):
        line(text, style)
    options = {
        "--table": (table, "every contract in every mode"),
        "--reasons": (reasons or not report.missing, "why contracts do not apply"),
        "--traceback": (tracebacks or report.is_good, "where errors were raised"),
    }
    hints = [f"{name} ({what})" for name, (is_off, what) in options.items() if not is_off]
    if hints:
        line(f"more: {', '.join(hints)}", "dim")


def _summary(report: Report) -> Table:
    """Return the table with a line for each backend."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("backend", "modes", "passed", "failed", "not applicable"):
        table.add_column(name, justify="left" if name == "backend" else "right", no_wrap=True)
    for backend in dict.fromkeys(backend for backend, _ in report.columns):
        columns = [column for column in report.columns if column[0] == backend]
        modes = {result.mode for result in report.results if result.backend == backend}
        row = report.row(columns)
        counts = (len(modes), row.passed, row.failed, row.missing)
        style = _STYLES["failed" if row.failed else "passed" if row.passed else "missing"]
        table.add_row(Text(backend), *map(str, counts), style=style)
    return table


def _tables(report: Report, width: int) -> Iterator[Table]:
    """Yield tables that fit into a width, all with the same rows."""
    for group in _column_groups(report, width):
        table = Table()
        table.add_column("contract", no_wrap=True)
        for backend, mode in group:
            table.add_column(f"{backend}\n{mode}", justify="center", no_wrap=True)
        for name in report.contracts:
            cells = (report.cell(name, column) for column in group)
            table.add_row(name, *(Text(c.symbol, style=_STYLES[c.status]) for c in cells))
        yield table


def _column_groups(report: Report, width: int) -> Iterator[Sequence[Column]]:
    """Yield groups of columns that fit into a width beside the contracts' names."""
    first = max(map(len, report.contracts), default=0) + _PADDING + 1
    group: list[Column] = []
    used = first
    for column in report.columns:
        needed = max(*map(len, column), _SYMBOL) + _PADDING
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
    for label, text in (("promise", CONTRACTS[result.contract].promise), *get_evidence(result)):
        console.print(Text(f"  {label:10} {text}"), soft_wrap=True)
