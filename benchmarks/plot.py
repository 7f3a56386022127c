"""The plot: the cost of dropout in multiplies, against the size of the array."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.markdown import TITLES
from benchmarks.rows import Outcome

__all__ = ["plot"]

_NAMES = ("forward", "forward + backward")


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write a PNG. Each library has a color; unidrop is solid, the library's own dropout dashed.

    Parameters
    ----------
    outcomes : sequence of Outcome
        The plot shows the rows of eager calls with an ``own`` candidate.
    path : pathlib.Path
    """
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(_NAMES), sharey=True)
    for axes, name in zip(panels, _NAMES, strict=True):
        for number, (group, title) in enumerate(TITLES.items()):
            row = [o for o in outcomes if (o.row.group, o.row.name) == (group, name)]
            if row:
                _lines(axes, sorted(row, key=_elements), title, f"C{number}")
        axes.set_title(name)
        axes.axhline(1, color="0.5", linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("elements, float32")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("time, in multiplies by a scalar")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.savefig(path)


def _lines(axes: Axes, swept: Sequence[Outcome], title: str, color: str) -> None:
    sizes = [_elements(outcome) for outcome in swept]
    ours = [outcome.ratio("unidrop") or float("nan") for outcome in swept]
    own = [_own_ratio(outcome) for outcome in swept]
    axes.plot(sizes, ours, "o-", color=color, label=f"{title}: unidrop")
    axes.plot(sizes, own, "o--", color=color, markersize=4, label=f"{title}: {swept[0].row.own}")


def _own_ratio(outcome: Outcome) -> float:
    ratio = outcome.ratio(outcome.row.own or "")
    return float("nan") if ratio is None else ratio


def _elements(outcome: Outcome) -> int:
    return outcome.row.elements or 0
