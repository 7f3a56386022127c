"""The run: load the groups that this machine can measure, and measure their rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from benchmarks.config import Config
from benchmarks.rows import Outcome, Row, UnavailableError

__all__ = ["GROUPS", "Skipped", "load", "run"]

GROUPS = ("numpy", "torch", "tensorflow", "keras", "jax", "memory", "startup")


@dataclass(frozen=True)
class Skipped:
    """A skipped measurement, and the reason."""

    what: str
    reason: str


def load(groups: Iterable[str], config: Config) -> tuple[list[Row], list[Skipped]]:
    """Return the rows of groups, and the groups without an installed library."""
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for group in groups:
        try:
            rows.extend(import_module(f"benchmarks.groups.{group}").rows(config))
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in ("benchmarks", "unidrop"):
                raise
            skipped.append(Skipped(group, f"{error.name} is not installed"))
        except UnavailableError as why:
            skipped.append(Skipped(group, str(why)))
    return rows, skipped


def run(
    rows: Sequence[Row], config: Config, repeat: int, on_start: Callable[[Row], None]
) -> tuple[list[Outcome], list[Skipped]]:
    """Measure all rows, ``repeat`` times.

    Parameters
    ----------
    rows : sequence of Row
    config : Config
    repeat : int
        Number of runs, at least 1. Runs are minutes apart, so a disturbance affects only one.
    on_start : callable
        Called with each row before it is measured.
    """
    runs: dict[Row, list[Mapping[str, float]]] = {row: [] for row in rows}
    skipped: dict[Row, Skipped] = {}
    for _ in range(repeat):
        for row in rows:
            on_start(row)
            try:
                if row not in skipped:
                    runs[row].append(row.measure(config))
            except UnavailableError as why:
                skipped[row] = Skipped(f"{row.group}, {row.name}", str(why))
    return [Outcome(row, values) for row, values in runs.items() if values], list(skipped.values())
