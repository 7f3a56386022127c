"""``unidrop conformance``: the matrix, with a bar for each backend that runs."""

import os
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

# What a run can be written as, and by whom.
_FORMATS: dict[str, Callable[[Report], str]] = {
    "html": to_html,
    "json": to_json,
    "junit": to_junit,
    "markdown": to_markdown,
}


def _format_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each format, which names a file."""
    for name in reversed(list(_FORMATS)):
        path = click.Path(dir_okay=False, path_type=Path)
        command = click.option(f"--{name}", type=path, metavar="FILE", help=f"Write {name} here.")(
            command
        )
    return command


@click.command()
@click.option("--backend", "backends", multiple=True, help="Only this backend; may be repeated.")
@click.option("--contract", "contracts", multiple=True, help="Only this contract; repeatable.")
@_format_options
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Processes that run at a time; the number of CPUs if not.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600,
    show_default=True,
    help="Seconds after which a contract has failed, and its backend is given up.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=SEED,
    show_default=True,
    help="Of whatever the golden vectors do not fix.",
)
@click.option("--traceback", "tracebacks", is_flag=True, help="Print where what failed was raised.")
@click.option("--list", "listing", is_flag=True, help="List the contracts and backends, run none.")
def conformance(
    backends: tuple[str, ...],
    contracts: tuple[str, ...],
    jobs: int | None,
    timeout: float,
    tracebacks: bool,
    listing: bool,
    seed: int,
    **files: Path | None,
) -> None:
    """Run the conformance matrix over every installed backend, each in a process of its own.

    Exits with 1 if a contract does not hold, a backend is broken or nothing was run, and with 2 on
    bad arguments.
    """
    # What TensorFlow logs of its build would stand in the middle of the table.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # A log has no width of its own; the table needs about this much.
    console = Console(width=None if sys.stdout.isatty() else 200)
    for name, path in files.items():
        if path is not None and not path.parent.is_dir():
            raise click.BadParameter(f"{path.parent} is no folder", param_hint=f"--{name}")
    _check_names("--contract", contracts, list(CONTRACTS))
    _check_names("--backend", backends, backend_names())
    if listing:
        _list(console, backends)
        return
    options = {"jobs": jobs or cpu_count(), "timeout": timeout, "seed": seed}
    report = Report(_run(console, backends, contracts, options))
    print_report(report, console, tracebacks=tracebacks)
    for name, path in files.items():
        if path is not None:
            try:
                path.write_text(_FORMATS[name](report).rstrip() + "\n", encoding="utf-8")
            except OSError as error:
                raise click.ClickException(f"--{name} could not be written: {error}") from None
            click.echo(f"wrote {path}")
    # A backend that was asked for is not just passed over.
    if not report.is_good or (backends and report.unavailable):
        sys.exit(1)


def _check_names(option: str, names: tuple[str, ...], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint=option)


def _run(
    console: Console,
    backends: tuple[str, ...],
    contracts: tuple[str, ...],
    options: Mapping[str, Any],
) -> Iterator[Outcome]:
    """Yield outcomes, with a bar for all backends that have begun."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def begun(backend: str, count: int) -> None:
            tasks[backend] = bar.add_task(backend, total=count)

        progress = Progress(begun, lambda backend: bar.advance(tasks[backend]))
        yield from run_matrix(backends, contracts, progress=progress, **options)


def _list(console: Console, backends: tuple[str, ...]) -> None:
    for contract in CONTRACTS.values():
        needs = f" [dim](needs {', '.join(contract.needs)})[/]" if contract.needs else ""
        console.print(f"[bold]{contract.name}[/]  {contract.promise}{needs}", soft_wrap=True)
    console.print()
    console.print(f"[bold]backends[/]  {', '.join(backend_names(backends))}", soft_wrap=True)
