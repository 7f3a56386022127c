"""``unidrop conformance`` runs the matrix and shows a progress bar for each running backend."""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from unidrop.conformance import CONTRACTS, SEED, Outcome, Progress, backend_names, run_matrix
from unidrop.conformance.reports import (
    Report,
    print_report,
    to_html,
    to_json,
    to_junit,
    to_markdown,
)
from unidrop.threads import cpu_count

__all__ = ["conformance"]

# The formats of a report, by the names of their options.
_FORMATS: dict[str, Callable[[Report], str]] = {
    "html": to_html,
    "json": to_json,
    "junit": to_junit,
    "markdown": to_markdown,
}


def _format_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each format, which takes the name of a file."""
    for name in reversed(_FORMATS):
        path = click.Path(dir_okay=False, path_type=Path)
        help_text = f"Write the report as {name} to this file."
        command = click.option(f"--{name}", type=path, metavar="FILE", help=help_text)(command)
    return command


@click.command()
@click.option("--backend", "backends", multiple=True, help="Run only this backend; repeatable.")
@click.option("--contract", "contracts", multiple=True, help="Run only this contract; repeatable.")
@click.option("--table", is_flag=True, help="Print every contract in every mode.")
@click.option("--reasons", is_flag=True, help="Print why contracts do not apply.")
@click.option("--traceback", "tracebacks", is_flag=True, help="Print tracebacks of failures.")
@_format_options
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Number of backends to run at a time; defaults to the number of CPUs.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600,
    show_default=True,
    help="Seconds after which a contract fails and its backend is stopped.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=SEED,
    show_default=True,
    help="Seed for checks without golden vectors.",
)
@click.option("--list", "listing", is_flag=True, help="List contracts and backends, and run none.")
def conformance(
    backends: tuple[str, ...],
    contracts: tuple[str, ...],
    jobs: int | None,
    timeout: float,
    table: bool,
    reasons: bool,
    tracebacks: bool,
    listing: bool,
    seed: int,
    **files: Path | None,
) -> None:
    """Run the conformance matrix over the installed backends.

    Each backend runs in its own process. Exits with 1 if a contract fails, a backend is broken or
    nothing was run, and with 2 on bad arguments.
    """
    # Only a terminal has a width.
    console = Console(width=None if sys.stdout.isatty() else 200)
    for name, path in files.items():
        if path is not None and not path.parent.is_dir():
            raise click.BadParameter(f"{path.parent} is not a folder", param_hint=f"--{name}")
    _check_names("--contract", contracts, list(CONTRACTS))
    _check_names("--backend", backends, backend_names())
    if listing:
        _list(console, backends)
        return
    options = {"jobs": jobs or cpu_count(), "timeout": timeout, "seed": seed}
    report = Report(_run(console, backends, contracts, options))
    print_report(report, console, table=table, reasons=reasons, tracebacks=tracebacks)
    for name, path in files.items():
        if path is not None:
            try:
                path.write_text(_FORMATS[name](report).rstrip() + "\n", encoding="utf-8")
            except OSError as error:
                raise click.ClickException(f"--{name} could not be written: {error}") from None
            click.echo(f"wrote {path}")
    # A backend that the user names must not be skipped.
    if not report.is_good or (backends and report.unavailable):
        sys.exit(1)


def _check_names(option: str, names: tuple[str, ...], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise click.BadParameter(
                f"must be one of {', '.join(known)}, got {name!r}", param_hint=option
            )


def _run(
    console: Console,
    backends: tuple[str, ...],
    contracts: tuple[str, ...],
    options: Mapping[str, Any],
) -> Iterator[Outcome]:
    """Yield outcomes, with a progress bar for each backend that has begun."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def begun(backend: str, count: int) -> None:
            tasks[backend] = bars.add_task(backend, total=count)

        progress = Progress(begun, lambda backend: bars.advance(tasks[backend]))
        yield from run_matrix(backends, contracts, progress=progress, **options)


def _list(console: Console, backends: tuple[str, ...]) -> None:
    for contract in CONTRACTS.values():
        needs = f" [dim](needs {', '.join(contract.needs)})[/]" if contract.needs else ""
        console.print(f"[bold]{contract.name}[/]  {contract.promise}{needs}", soft_wrap=True)
    console.print()
    console.print(f"[bold]backends[/]  {', '.join(backend_names(backends))}", soft_wrap=True)
