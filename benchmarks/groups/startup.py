"""Startup: the import, and the first call, with and without cached kernels."""

from collections.abc import Iterator, Mapping
from tempfile import TemporaryDirectory

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

_HEAVY = ("dask", "jax", "keras", "numba", "tensorflow", "torch")

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
        "frameworks and Numba imported",
        None,
        lambda config: {"unidrop": float(get_last_line("-c", _IMPORTED))},
        base=None,
        unit="modules",
        targets=(below(0, "unidrop", "none imported"),),
    )
    yield Row("startup", "first call", None, _first_calls, base="portable")


def _imports(config: Config) -> Mapping[str, float]:
    def seconds(module: str) -> float:
        return float(get_last_line("-c", _IMPORT.format(module=module)))

    seconds("unidrop")  # writes the bytecode
    samples = {name: lambda name=name: seconds(name) for name in ("unidrop", "numpy")}
    return interleaved(samples, min(config.rounds, config.processes))


def _first_calls(config: Config) -> Mapping[str, float]:
    with TemporaryDirectory() as warm:

        def seconds(path: str, folder: str) -> float:
            code = _FIRST_CALL.format(path=path)
            return float(get_last_line("-c", code, environment={"NUMBA_CACHE_DIR": folder}))

        def uncached() -> float:
            with TemporaryDirectory() as empty:
                return seconds("fused", empty)

        seconds("fused", warm)
        samples = {
            "not cached": uncached,
            "cached": lambda: seconds("fused", warm),
            "portable": lambda: seconds("portable", warm),
        }
        return interleaved(samples, min(config.rounds, (config.processes + 1) // 2))
