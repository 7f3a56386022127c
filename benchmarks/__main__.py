"""The command line: ``python -m benchmarks``, run from the root of the clone."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import runner
from benchmarks.config import DEFAULT, QUICK, Effort, full
from benchmarks.machine import facts
from benchmarks.plot import plot
from benchmarks.report import Report
from benchmarks.rows import Outcome, Row

__all__ = ["main"]

_File = click.Path(dir_okay=False, path_type=Path)

# CPUs are compared, so no framework may choose another device; and Keras has to be told.
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Few rounds and small arrays: to try it out.")
@click.option("--full", "is_full", is_flag=True, help="Up to 10^8 elements, in 3 GB of memory.")
@click.option("--rounds", type=click.IntRange(1), help="How often each candidate is timed.")
@click.option("--repeat", type=click.IntRange(1), default=1, help="Runs to take the median of.")
@click.option(
    "--only", "groups", multiple=True, type=click.Choice(runner.GROUPS), help="May be repeated."
)
@click.option("--json", "json_path", type=_File, help="Write everything measured here.")
@click.option("--png", "png_path", type=_File, help="Draw ratios against sizes here.")
def main(
    quick: bool,
    is_full: bool,
    rounds: int | None,
    repeat: int,
    groups: tuple[str, ...],
    json_path: Path | None,
    png_path: Path | None,
) -> None:
    """Time unidrop, each framework's own dropout and a plain multiply, side by side.

    All are medians over rounds in which each candidate took its turn. Exits with 0 whether the
    targets are reached or not: what a busy machine measures is no test.
    """
    for option, path in (("--json", json_path), ("--png", png_path)):
        if path is not None and not path.parent.is_dir():
            raise click.BadParameter(f"{path.parent} is no folder", param_hint=option)
    os.environ.update(_ENVIRONMENT)
    effort = _effort(quick, is_full, rounds)
    # A log has no width of its own; the tables need about this much.
    console = Console(width=None if sys.stdout.isatty() else 140)
    machine = facts()
    rows, missing = runner.load(groups or runner.GROUPS, effort)
    outcomes, skipped = _run(console, rows, effort, repeat)
    report = Report(machine, effort, outcomes, [*missing, *skipped])
    report.print(console)
    if json_path is not None:
        json_path.write_text(report.to_json() + "\n", encoding="utf-8")
    if png_path is not None:
        plot(outcomes, png_path)


def _effort(quick: bool, is_full: bool, rounds: int | None) -> Effort:
    effort = QUICK if quick else DEFAULT
    effort = full(effort) if is_full else effort
    return effort if rounds is None else replace(effort, rounds=rounds)


def _run(
    console: Console, rows: Sequence[Row], effort: Effort, repeat: int
) -> tuple[list[Outcome], list[runner.Skipped]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=repeat * len(rows))
        begun = count()

        def begins(row: Row) -> None:
            bar.update(task, completed=next(begun), description=f"{row.group}, {row.name}")

        return runner.run(rows, effort, repeat, begins)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
