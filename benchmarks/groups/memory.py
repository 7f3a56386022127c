"""Memory: the peak of a call, and the memory between forward and backward."""

import json
import sys
from collections.abc import Iterator, Mapping
from functools import cache

from benchmarks.child import get_last_line
from benchmarks.config import Config
from benchmarks.memory import ATTENTION, NUMPY, OWN_ATTENTION, TORCH
from benchmarks.rows import Row, UnavailableError
from benchmarks.thresholds import Target, at_most, below

__all__ = ["rows"]

_UNIT = "B/element"
_NOTHING = "0 bytes per element for backward"

# The process may grow by a few pages for other reasons, and autograd saves the key.
_SAVED = tuple(below(0.001, name, _NOTHING) for name in TORCH if name.startswith("unidrop"))
_RETAINED = tuple(below(0.1, name, _NOTHING) for name in TORCH if name.startswith("unidrop"))


def rows(config: Config) -> Iterator[Row]:
    """Yield the tensors that autograd saves, all retained memory, and the peaks."""
    if not sys.platform.startswith("linux"):
        raise UnavailableError("the size of a process is available in Linux's /proc only")
    yield _row("torch saved for backward", config, "torch", TORCH, "saved", _SAVED)
    yield _row("torch retained for backward", config, "torch", TORCH, "retained", _RETAINED)
    yield _row("torch peak, forward + backward", config, "torch", TORCH, "peak")
    for figure, targets in (("saved", _SAVED), ("retained", _RETAINED), ("peak", ())):
        what = "peak, forward + backward" if figure == "peak" else f"{figure} for backward"
        yield _row(f"torch compiled {what}", config, "compiled", TORCH, figure, targets)
    yield _row("numpy peak, forward", config, "numpy", NUMPY, "peak")
    yield Row(
        "memory",
        "torch attention peak, forward + backward",
        config.attention,
        lambda config: {
            name: _measure("attention", name, *config.attention)["peak"] for name in ATTENTION
        },
        base=OWN_ATTENTION,
        unit="B/weight",
        targets=(at_most(1 / 3, "unidrop", OWN_ATTENTION),),
    )


def _row(
    name: str,
    config: Config,
    library: str,
    candidates: tuple[str, ...],
    figure: str,
    targets: tuple[Target, ...] = (),
) -> Row:
    def measure(config: Config) -> Mapping[str, float]:
        return {name: _measure(library, name, config.elements)[figure] for name in candidates}

    base = "multiply" if figure == "peak" else None
    shape = (config.elements,)
    return Row("memory", name, shape, measure, base=base, unit=_UNIT, targets=targets)


@cache
def _measure(library: str, candidate: str, *sizes: int) -> Mapping[str, float]:
    """Measure all figures of a candidate once, because memory hardly varies between calls."""
    printed = get_last_line("-m", "benchmarks.memory", library, candidate, *map(str, sizes))
    values: Mapping[str, float] = json.loads(printed)
    return values
