"""Starting up: the import, and the first call ever and with compiled kernels at hand."""

from collections.abc import Iterator, Mapping
from tempfile import TemporaryDirectory

from benchmarks.child import get_last_line
from benchmarks.config import SMALL, Effort
from benchmarks.rows import Row
from benchmarks.thresholds import at_most_more, below
from benchmarks.timing import interleaved

__all__ = ["rows"]

_IMPORT = """
from time import perf_counter
begin = perf_counter()
import {module}
print(perf_counter() - begin)
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
begin = perf_counter()
with unidrop.force_path("{{path}}"):
    unidrop.dropout(x, 0.1, unidrop.Key(42))
print(perf_counter() - begin)
"""


def rows(effort: Effort) -> Iterator[Row]:
    """Yield the import's time and modules, and the first call."""
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
        lambda effort: {"unidrop": float(get_last_line("-c", _IMPORTED))},
        base=None,
        unit="modules",
        targets=(below(0, "unidrop", "none imported"),),
    )
    yield Row("startup", "first call", None, _first_calls, base="portable")


def _imports(effort: Effort) -> Mapping[str, float]:
    def seconds(module: str) -> float:
        return float(get_last_line("-c", _IMPORT.format(module=module)))

    seconds("unidrop")  # writes the bytecode
    samples = {name: lambda name=name: seconds(name) for name in ("unidrop", "numpy")}
    return interleaved(samples, min(effort.rounds, effort.processes))


def _first_calls(effort: Effort) -> Mapping[str, float]:
    with TemporaryDirectory() as warm:

        def seconds(path: str, folder: str) -> float:
            code = _FIRST_CALL.format(path=path)
            return float(get_last_line("-c", code, environment={"NUMBA_CACHE_DIR": folder}))

        def ever() -> float:
            with TemporaryDirectory() as empty:
                return seconds("fused", empty)

        seconds("fused", warm)
        samples = {
            "ever, compiling": ever,
            "compiled before": lambda: seconds("fused", warm),
            "portable": lambda: seconds("portable", warm),
        }
        return interleaved(samples, min(effort.rounds, (effort.processes + 1) // 2))
