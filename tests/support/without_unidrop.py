"""Runs what users exported, in a process that cannot import unidrop."""

import subprocess
import sys

__all__ = ["run_without_unidrop"]


def run_without_unidrop(code, folder):
    """Run Python code in a folder; raise if it fails."""
    hide = "import sys\nsys.modules['unidrop'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", hide + code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
