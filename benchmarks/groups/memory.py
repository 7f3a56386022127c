"""Memory: what a call takes at its peak, and what it keeps for the backward call."""

import json
import sys
from collections.abc import Iterator, Mapping
from functools import cache

from benchmarks.child import get_last_line
from benchmarks.config import Effort
from benchmarks.memory import NUMPY, TORCH
from benchmarks.rows import Row, UnavailableError
from benchmarks.thresholds import Target, below

__all__ = ["rows"]

_UNIT = "B/element"
_NOTHING = "0 bytes an element kept for backward"

# A page here and there of the process's growth is not the call's; of what is saved, a key is.
_SAVED = tuple(below(0.001, name, _NOTHING) for name in TORCH if name.startswith("unidrop"))
_HELD = tuple(below(0.1, name, _NOTHING) for name in TORCH if name.startswith("unidrop"))


def rows(effort: Effort) -> Iterator[Row]:
    """Yield what autograd saves, what is held in all, and the peaks."""
    if not sys.platform.startswith("linux"):
        raise UnavailableError("the size of a process is read from Linux' /proc")
    yield _row("torch saved for backward", effort, "torch", TORCH, "saved", _SAVED)
    yield _row("torch held for backward", effort, "torch", TORCH, "held", _HELD)
    yield _row("torch peak, forward + backward", effort, "torch", TORCH, "peak")
    for figure, targets in (("saved", _SAVED), ("held", _HELD), ("peak", ())):
        what = "peak, forward + backward" if figure == "peak" else f"{figure} for backward"
        yield _row(f"torch compiled {what}", effort, "compiled", TORCH, figure, targets)
    yield _row("numpy peak, forward", effort, "numpy", NUMPY, "peak")


def _row(
    name: str,
    effort: Effort,
    library: str,
    candidates: tuple[str, ...],
    figure: str,
    targets: tuple[Target, ...] = (),
) -> Row:
    def measure(effort: Effort) -> Mapping[str, float]:
        return {name: _measured(library, name, effort.elements)[figure] for name in candidates}

    base = "multiply" if figure == "peak" else None
    shape = (effort.elements,)
    return Row("memory", name, shape, measure, base=base, unit=_UNIT, targets=targets)


@cache
def _measured(library: str, candidate: str, elements: int) -> Mapping[str, float]:
    """Return all figures of a candidate: measured once, for unlike time they hardly vary."""
    printed = get_last_line("-m", "benchmarks.memory", library, candidate, str(elements))
    values: Mapping[str, float] = json.loads(printed)
    return values
