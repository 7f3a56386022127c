"""The run: loads the groups that can be measured here, and measures their rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from benchmarks.config import Effort
from benchmarks.rows import Outcome, Row, UnavailableError

__all__ = ["GROUPS", "Skipped", "load", "run"]

GROUPS = ("numpy", "torch", "tensorflow", "keras", "jax", "memory", "startup")


@dataclass(frozen=True)
class Skipped:
    """What was not measured, and why."""

    what: str
    reason: str


def load(groups: Iterable[str], effort: Effort) -> tuple[list[Row], list[Skipped]]:
    """Return the rows of groups, and the groups whose library is not here."""
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for group in groups:
        try:
            rows.extend(import_module(f"benchmarks.groups.{group}").rows(effort))
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in ("benchmarks", "unidrop"):
                raise
            skipped.append(Skipped(group, f"{error.name} is not installed"))
        except UnavailableError as why:
            skipped.append(Skipped(group, str(why)))
    return rows, skipped


def run(
    rows: Sequence[Row], effort: Effort, repeat: int, begins: Callable[[Row], None]
) -> tuple[list[Outcome], list[Skipped]]:
    """Measure all rows, and then all of them again, as often as asked for.

    Parameters
    ----------
    rows : sequence of Row
    effort : Effort
    repeat : int
        At least 1. Runs lie minutes apart, so that what disturbs one spares another.
    begins : callable
        Called with each row before it is measured.
    """
    runs: dict[Row, list[Mapping[str, float]]] = {row: [] for row in rows}
    skipped: dict[Row, Skipped] = {}
    for _ in range(repeat):
        for row in rows:
            begins(row)
            try:
                if row not in skipped:
                    runs[row].append(row.measure(effort))
            except UnavailableError as why:
                skipped[row] = Skipped(f"{row.group}, {row.name}", str(why))
    return [Outcome(row, values) for row, values in runs.items() if values], list(skipped.values())
