"""Facts about the machine and the libraries, which every figure depends on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import unidrop

__all__ = ["facts"]

_LIBRARIES = ("numpy", "llvmlite", "torch", "tensorflow", "keras", "jax")


def facts() -> dict[str, Any]:
    """Return facts about the machine, Python and the installed libraries.

    ``load`` is the average number of busy processes in the last minute. If other processes are
    busy, libraries that wait for all of their threads take much longer, even in the median.
    """
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "unidrop": unidrop.__version__,
        "unidrop_threads": unidrop.get_num_threads(),
        "unidrop_path": str(unidrop.explain_path(np.ones(1, dtype=np.float32))),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the name of the processor. Python cannot read it on Linux."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
