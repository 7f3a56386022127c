"""The tables of README: ratios to each framework's own dropout, times, and missed targets."""

import math
from collections.abc import Callable, Iterable, Sequence

from benchmarks.config import LARGE, MIDDLE, SMALL, Shape
from benchmarks.report import Report, format_machine, format_value
from benchmarks.rows import Outcome

__all__ = ["TITLES", "format_markdown"]

TITLES = {
    "numpy": "NumPy",
    "torch": "PyTorch",
    "tensorflow": "TensorFlow",
    "keras": "Keras",
    "jax": "JAX",
}

_TIMED = (SMALL, MIDDLE, LARGE)


def format_markdown(report: Report) -> str:
    """Return the tables of a run, to paste into README.

    The tables show the rows with an ``own`` candidate, and of unidrop's candidates the first.
    """
    swept = [outcome for outcome in report.outcomes if outcome.row.own is not None]
    shapes = sorted({outcome.row.shape or () for outcome in swept}, key=math.prod)
    timed = [shape for shape in shapes if shape in _TIMED]
    return "\n".join(
        [
            f"Measured with {format_machine(report.machine)}; {report.config.rounds} rounds.",
            "",
            *_table("time, in times of the framework's own", swept, shapes, _ratio_to_own),
            "",
            *_table("unidrop / a multiply / the framework's own", swept, timed, _times),
            "",
            f"{report.summary()}:",
            "",
            *_misses(report.outcomes),
            "",
        ]
    )


def _table(
    title: str,
    outcomes: Sequence[Outcome],
    shapes: Sequence[Shape],
    format_cell: Callable[[Outcome], str],
) -> Iterable[str]:
    """Yield the lines of a table with a line for each name of a row, and a column for each shape.

    A line without any cell is left out.
    """
    yield f"| {title} | {' | '.join(map(_size, shapes))} |"
    yield f"|---|{'---:|' * len(shapes)}"
    lines: dict[str, dict[Shape, str]] = {}
    for outcome in outcomes:
        row = outcome.row
        cells = lines.setdefault(f"{TITLES.get(row.group, row.group)}, {row.name}", {})
        if row.shape is not None and row.shape in shapes:
            cells[row.shape] = format_cell(outcome)
    for name, cells in lines.items():
        if cells:
            yield f"| {name} | {' | '.join(cells.get(shape, '') for shape in shapes)} |"


def _ratio_to_own(outcome: Outcome) -> str:
    return f"{outcome.quotient('unidrop', outcome.row.own or ''):.2f}"


def _times(outcome: Outcome) -> str:
    names = ("unidrop", "multiply", outcome.row.own or "")
    return " / ".join(format_value(outcome.value(name), outcome.row.unit) for name in names)


def _misses(outcomes: Sequence[Outcome]) -> Iterable[str]:
    for outcome in outcomes:
        row = outcome.row
        size = "" if row.shape is None else f", {_size(row.shape)}"
        for verdict in outcome.verdicts:
            if not verdict.reached:
                target = verdict.target
                where = f"{TITLES.get(row.group, row.group)}, {row.name}{size}, {target.candidate}"
                yield f"- {where}: {verdict.figure:.3g} ({target.text})"


def _size(shape: Shape) -> str:
    """Return a shape as text: a power of 10, millions of 2^20, or its lengths."""
    if len(shape) > 1:
        return str(shape)
    (length,) = shape
    exponent = round(math.log10(length))
    if length == 10**exponent:
        return f"10^{exponent}"
    return f"{length >> 20}M" if length % (1 << 20) == 0 else str(length)
