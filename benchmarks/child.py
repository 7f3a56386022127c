"""Fresh processes: what happens once in a process can be measured only there."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.rows import UnavailableError

__all__ = ["get_last_line"]

_ROOT = Path(__file__).parents[1]


def get_last_line(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run Python at the clone's root, and return the last line that it prints.

    Raises
    ------
    UnavailableError
        If it fails, with the last line of its complaint.
    """
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=_ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (finished.stderr if finished.returncode else finished.stdout).splitlines()
    if finished.returncode:
        raise UnavailableError(
            lines[-1] if lines else f"the process ended with {finished.returncode}"
        )
    return lines[-1]
