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
from benchmarks.config import DEFAULT, QUICK, Config, full
from benchmarks.machine import facts
from benchmarks.markdown import format_markdown
from benchmarks.plot import plot
from benchmarks.report import Report
from benchmarks.rows import Outcome, Row

__all__ = ["main"]

_File = click.Path(dir_okay=False, path_type=Path)

# The benchmarks compare CPUs, so these keep every framework on the CPU, and Keras on TensorFlow.
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Use few rounds and small arrays, for a trial.")
@click.option("--full", "is_full", is_flag=True, help="Include 10^8 elements (3 GB of memory).")
@click.option("--rounds", type=click.IntRange(1), help="Number of timings of each candidate.")
@click.option("--repeat", type=click.IntRange(1), default=1, help="Runs; results are medians.")
@click.option(
    "--only",
    "groups",
    multiple=True,
    type=click.Choice(runner.GROUPS),
    help="Run only this group. Repeatable.",
)
@click.option("--row", "part", default="", help="Run only the rows whose name contains this text.")
@click.option("--json", "json_path", type=_File, help="Write all results to this file.")
@click.option("--markdown", "md_path", type=_File, help="Write the tables of README to this file.")
@click.option("--png", "png_path", type=_File, help="Plot ratios against sizes into this file.")
def main(
    quick: bool,
    is_full: bool,
    rounds: int | None,
    repeat: int,
    groups: tuple[str, ...],
    part: str,
    json_path: Path | None,
    md_path: Path | None,
    png_path: Path | None,
) -> None:
    """Time unidrop, each framework's own dropout and a plain multiply, side by side.

    The results are medians over rounds, and each candidate runs once in each round. The exit
    status is 0 even if a target is not reached, because a busy machine distorts times.
    """
    for option, path in (("--json", json_path), ("--markdown", md_path), ("--png", png_path)):
        if path is not None and not path.parent.is_dir():
            raise click.BadParameter(f"{path.parent} is not a folder", param_hint=option)
    os.environ.update(_ENVIRONMENT)
    config = _effort(quick, is_full, rounds)
    # A log has no width, and the tables need about 140 columns.
    console = Console(width=None if sys.stdout.isatty() else 140)
    machine = facts()
    rows, missing = runner.load(groups or runner.GROUPS, config)
    rows = [row for row in rows if part in row.name]
    if part and not rows:
        raise click.BadParameter(f"no row has a name with {part!r}", param_hint="--row")
    outcomes, skipped = _run(console, rows, config, repeat)
    report = Report(machine, config, outcomes, [*missing, *skipped])
    report.print(console)
    if json_path is not None:
        json_path.write_text(report.to_json() + "\n", encoding="utf-8")
    if md_path is not None:
        md_path.write_text(format_markdown(report), encoding="utf-8")
    if png_path is not None:
        plot(outcomes, png_path)


def _effort(quick: bool, is_full: bool, rounds: int | None) -> Config:
    config = QUICK if quick else DEFAULT
    config = full(config) if is_full else config
    return config if rounds is None else replace(config, rounds=rounds)


def _run(
    console: Console, rows: Sequence[Row], config: Config, repeat: int
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
        started = count()

        def on_start(row: Row) -> None:
            bar.update(task, completed=next(started), description=f"{row.group}, {row.name}")

        return runner.run(rows, config, repeat, on_start)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
