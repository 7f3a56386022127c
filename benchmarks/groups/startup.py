"""Startup: the import, and the first call in a process, which compiles a kernel."""

from collections.abc import Iterator, Mapping

from benchmarks.child import get_last_line
from benchmarks.config import SMALL, Config
from benchmarks.rows import Row
from benchmarks.thresholds import at_most_more, below
from benchmarks.timing import interleaved

__all__ = ["rows"]

_IMPORT = """
from time import perf_counter
start = perf_counter()
import {module}
print(perf_counter() - start)
"""

_HEAVY = ("dask", "jax", "keras", "llvmlite", "tensorflow", "torch")

_IMPORTED = f"""
import sys
import unidrop
print(sum(name in sys.modules for name in {_HEAVY}))
"""

_FIRST_CALL = f"""
from time import perf_counter
import numpy as np
import unidrop
x = np.ones({SMALL}, dtype=np.float32)
start = perf_counter()
with unidrop.force_path("{{path}}"):
    unidrop.dropout(x, 0.1, unidrop.Key(42))
print(perf_counter() - start)
"""


def rows(config: Config) -> Iterator[Row]:
    """Yield the time of the import, the imported frameworks, and the first call."""
    yield Row(
        "startup",
        "import",
        None,
        _imports,
        base="numpy",
        targets=(at_most_more(0.05, "unidrop", "numpy", "< 0.05 s more than numpy"),),
    )
    yield Row(
        "startup",
        "frameworks and compilers imported",
        None,
        lambda config: {"unidrop": float(get_last_line("-c", _IMPORTED))},
        base=None,
        unit="modules",
        targets=(below(0, "unidrop", "none imported"),),
    )
    yield Row(
        "startup",
        "first call",
        None,
        _first_calls,
        base=None,
        targets=(below(0.5, "unidrop", "< 0.5 s"),),
    )


def _imports(config: Config) -> Mapping[str, float]:
    def seconds(module: str) -> float:
        return float(get_last_line("-c", _IMPORT.format(module=module)))

    seconds("unidrop")  # writes the bytecode
    samples = {name: lambda name=name: seconds(name) for name in ("unidrop", "numpy")}
    return interleaved(samples, min(config.rounds, config.processes))


def _first_calls(config: Config) -> Mapping[str, float]:
    def seconds(path: str) -> float:
        return float(get_last_line("-c", _FIRST_CALL.format(path=path)))

    samples = {"unidrop": lambda: seconds("fused"), "portable": lambda: seconds("portable")}
    return interleaved(samples, min(config.rounds, config.processes))
