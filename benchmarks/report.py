"""The report of a run: tables in the terminal, and JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.config import Config, Shape
from benchmarks.rows import Outcome
from benchmarks.runner import Skipped

__all__ = ["Report", "format_machine", "format_value"]

_BUSY = 0.5  # processes, on average in the last minute


class Report:
    """The outcomes of a run, and the skipped measurements.

    Parameters
    ----------
    machine : mapping
        Facts about the machine.
    config : Config
    outcomes : sequence of Outcome
    skipped : sequence of Skipped
    """

    def __init__(
        self,
        machine: Mapping[str, Any],
        config: Config,
        outcomes: Sequence[Outcome],
        skipped: Sequence[Skipped],
    ) -> None:
        self.machine = machine
        self.config = config
        self.outcomes = outcomes
        self.skipped = skipped

    def print(self, console: Console) -> None:
        """Print the machine, a table per group, the skipped measurements, and the last line."""
        console.print(Text(format_machine(self.machine), style="dim"), soft_wrap=True)
        for group in dict.fromkeys(outcome.row.group for outcome in self.outcomes):
            console.print(_table(group, [o for o in self.outcomes if o.row.group == group]))
        if (self.machine["load"] or 0) > _BUSY:
            line = "! other processes were busy, so multi-threaded candidates may take longer"
            console.print(Text(line, style="yellow"), soft_wrap=True)
        for skip in self.skipped:
            line = f"! {skip.what}: not measured, {skip.reason}"
            console.print(Text(line, style="yellow"), soft_wrap=True)
        console.print(Text(self.summary(), style="bold"), soft_wrap=True)

    def summary(self) -> str:
        """Return the last line: the number of targets that were reached, and were not."""
        reached = [verdict.reached for outcome in self.outcomes for verdict in outcome.verdicts]
        return f"{reached.count(True)} targets reached, {reached.count(False)} not reached"

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(
            {
                "machine": self.machine,
                "rounds": self.config.rounds,
                "rows": [_as_dict(outcome) for outcome in self.outcomes],
                "skipped": [{"what": s.what, "reason": s.reason} for s in self.skipped],
            },
            indent=1,
        )


def format_machine(machine: Mapping[str, Any]) -> str:
    """Return the machine and the libraries as one line."""
    shown = [
        machine["processor"],
        f"{machine['cpus']} CPUs",
        f"Python {machine['python']}",
        *(f"{name} {version}" for name, version in machine["libraries"].items()),
        f"unidrop {machine['unidrop']} {machine['unidrop_path']}",
    ]
    if machine["load"] is not None:
        shown.append(f"load before {machine['load']:.1f}")
    return ", ".join(shown)


def _table(group: str, outcomes: Sequence[Outcome]) -> Table:
    table = Table(title=group, title_justify="left")
    table.add_column("work", no_wrap=True)
    table.add_column("candidate", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("ns/element", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("target")
    for outcome in outcomes:
        work = Text(f"{outcome.row.name} {_size(outcome.row.shape)}".rstrip())
        for candidate in outcome.candidates:
            ratio = outcome.ratio(candidate)
            nanoseconds = _ns_per_element(outcome, candidate)
            table.add_row(
                work,
                candidate,
                format_value(outcome.value(candidate), outcome.row.unit),
                "" if nanoseconds is None else f"{nanoseconds:.3g}",
                "" if ratio is None else f"{ratio:.2f}",
                _verdicts(outcome, candidate),
            )
            work = Text()
        table.add_section()
    return table


def _verdicts(outcome: Outcome, candidate: str) -> Text:
    lines = [
        Text(str(verdict), style="green" if verdict.reached else "bold red")
        for verdict in outcome.verdicts
        if verdict.target.candidate == candidate
    ]
    return Text("\n").join(lines)


def _size(shape: Shape | None) -> str:
    return "" if shape is None else "x".join(str(length) for length in shape)


def format_value(value: float, unit: str) -> str:
    """Return a value and its unit; a time in s, ms or µs."""
    if unit != "s":
        return f"{value:.3g} {unit}"
    for factor, short in ((1, "s"), (1e-3, "ms")):
        if value >= factor:
            return f"{value / factor:.3g} {short}"
    return f"{value * 1e6:.3g} µs"


def _ns_per_element(outcome: Outcome, candidate: str) -> float | None:
    elements = outcome.row.elements
    if elements is None or outcome.row.unit != "s":
        return None
    return outcome.value(candidate) / elements * 1e9


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    row = outcome.row
    return {
        "group": row.group,
        "name": row.name,
        "shape": row.shape,
        "unit": row.unit,
        "base": row.base,
        "candidates": [_candidate_as_dict(outcome, name) for name in outcome.candidates],
        "targets": [
            {
                "candidate": verdict.target.candidate,
                "target": verdict.target.text,
                "bound": verdict.target.bound,
                "figure": verdict.figure,
                "reached": verdict.reached,
            }
            for verdict in outcome.verdicts
        ],
    }


def _candidate_as_dict(outcome: Outcome, candidate: str) -> dict[str, Any]:
    return {
        "name": candidate,
        "value": outcome.value(candidate),
        "ns_per_element": _ns_per_element(outcome, candidate),
        "ratio": outcome.ratio(candidate),
        "runs": [values[candidate] for values in outcome.runs],
    }
