"""Child processes, to measure events that occur only once per process."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.rows import UnavailableError

__all__ = ["get_last_line"]

_ROOT = Path(__file__).parents[1]


def get_last_line(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run Python in the clone's root folder, and return the last line of its output.

    Raises
    ------
    UnavailableError
        If the process fails. The message is the last line of its error output.
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
