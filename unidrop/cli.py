"""The command line: ``unidrop conformance`` runs the matrix, ``unidrop mask`` prints a mask."""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    import click
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    import unidrop
    from unidrop.conformance import (
        CONTRACTS,
        Backend,
        Cell,
        Missing,
        UnavailableBackend,
        cells,
        load_backends,
        run_cell,
    )
    from unidrop.conformance.report import Outcome, Report
except ModuleNotFoundError as error:
    raise SystemExit(
        f"the command line needs {error.name}, which is not installed: install unidrop with its "
        "extra 'cli', as in pip install '.[cli]'"
    ) from None

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    unidrop.__version__, message=f"unidrop %(version)s, stream {unidrop.STREAM_VERSION}"
)
def main() -> None:
    """One dropout that drops the very same elements in every array library."""


@main.command()
@click.option("--backend", "backends", multiple=True, help="Only this backend; may be repeated.")
@click.option("--contract", "contracts", multiple=True, help="Only this contract; repeatable.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here."
)
@click.option("--list", "listing", is_flag=True, help="List the contracts and backends, run none.")
def conformance(
    backends: tuple[str, ...], contracts: tuple[str, ...], json_path: Path | None, listing: bool
) -> None:
    """Run the conformance matrix over every installed backend.

    Exits with 1 if a contract does not hold, a backend is broken or nothing was run, and with 2 on
    bad arguments.
    """
    # What TensorFlow logs of its build would stand in the middle of the table.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # A log has no width of its own; the table needs about this much.
    console = Console(width=None if sys.stdout.isatty() else 200)
    _check_names("--contract", contracts, list(CONTRACTS))
    if json_path is not None and not json_path.parent.is_dir():
        raise click.BadParameter(f"{json_path.parent} is no folder", param_hint="--json")
    try:
        loaded = list(load_backends(backends))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--backend") from None
    if listing:
        _list(console, loaded)
        return
    if backends and any(isinstance(backend, UnavailableBackend) for backend in loaded):
        missing = next(b for b in loaded if isinstance(b, UnavailableBackend))
        raise click.BadParameter(
            f"{missing.name} could not be loaded: {missing.error!r}", param_hint="--backend"
        )
    report = _run(console, loaded, contracts)
    report.print(console)
    if json_path is not None:
        json_path.write_text(report.to_json() + "\n", encoding="utf-8")
    if not report.is_good:
        sys.exit(1)


def _check_names(option: str, names: tuple[str, ...], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint=option)


def _run(
    console: Console, loaded: Sequence[Backend | UnavailableBackend], contracts: tuple[str, ...]
) -> Report:
    planned: list[Cell | Missing | UnavailableBackend] = []
    for backend in loaded:
        planned.extend(
            [backend] if isinstance(backend, UnavailableBackend) else cells(backend, contracts)
        )
    outcomes: list[Outcome] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=len(planned))
        for item in planned:
            if isinstance(item, Cell):
                bar.update(task, description=f"{item.backend.name} {item.contract.name}")
            outcomes.append(run_cell(item) if isinstance(item, Cell) else item)
            bar.advance(task)
    return Report(outcomes)


def _list(console: Console, loaded: Sequence[Backend | UnavailableBackend]) -> None:
    for contract in CONTRACTS.values():
        needs = f" [dim](needs {', '.join(contract.needs)})[/]" if contract.needs else ""
        console.print(f"[bold]{contract.name}[/]  {contract.promise}{needs}", soft_wrap=True)
    console.print()
    for backend in loaded:
        if isinstance(backend, UnavailableBackend):
            console.print(f"[bold]{backend.name}[/]  not here: {backend.error!r}", soft_wrap=True)
        else:
            console.print(
                f"[bold]{backend.name}[/]  {', '.join(backend.modes)} on "
                f"{', '.join(backend.devices)}",
                soft_wrap=True,
            )


class _Shape(click.ParamType[tuple[int, ...]]):
    name = "shape"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        try:
            shape = tuple(int(length) for length in str(value).split("x"))
        except ValueError:
            self.fail(f"{value!r} is no shape such as 4x8", param, ctx)
        return shape


@main.command()
@click.option("--seed", type=int, required=True, help="0 <= seed < 2^64.")
@click.option("--site", default=None, help="A string to fold in, such as encoder/0.")
@click.option("--step", type=int, default=None, help="An integer to fold in, after the site.")
@click.option("--p", type=float, required=True, help="The probability of dropping, in [0, 1].")
@click.option("--shape", type=_Shape(), required=True, help="Such as 4x8.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the key.")
def mask(
    seed: int, site: str | None, step: int | None, p: float, shape: tuple[int, ...], as_json: bool
) -> None:
    """Print a mask: 1 where an element is kept, a row of the last axis a line.

    For anyone who checks a kernel of their own.
    """
    try:
        key = unidrop.Key(seed)
        if site is not None:
            key = key.fold_in(site)
        if step is not None:
            key = key.fold_in(step)
        keep = unidrop.keep_mask(shape, p, key).astype(int)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        described = {"stream": unidrop.STREAM_VERSION, "key": f"{int(key):016x}", "p": p}
        click.echo(json.dumps(described | {"shape": shape, "keep": keep.tolist()}))
        return
    rows = keep.reshape(math.prod(shape[:-1]), shape[-1])
    for row in rows:
        click.echo("".join(map(str, row)))
