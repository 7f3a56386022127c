"""The plot: the cost of dropout in multiplies, against the size of the array."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rows import Outcome

__all__ = ["plot"]

_TITLES = {
    "numpy": "NumPy",
    "torch": "PyTorch",
    "tensorflow": "TensorFlow",
    "keras": "Keras",
    "jax": "JAX",
}


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write a PNG. Each library has a color; unidrop is solid, the library's own dropout dashed.

    Parameters
    ----------
    outcomes : sequence of Outcome
        The plot shows the rows with an ``own`` candidate.
    path : pathlib.Path
    """
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, (group, title) in enumerate(_TITLES.items()):
        swept = [o for o in outcomes if o.row.group == group and o.row.own is not None]
        if swept:
            _lines(axes, sorted(swept, key=_elements), title, f"C{number}")
    axes.axhline(1, color="0.5", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("elements, float32")
    axes.set_ylabel("time, in multiplies by a scalar")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False)
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
