"""Runs Python and pytest in a separate process, where Keras uses another backend."""

import os
import re
import subprocess
import sys
from pathlib import Path

__all__ = ["TESTS", "run_foreign_tests", "run_python", "run_tests"]

TESTS = Path(__file__).parent
HIDDEN = TESTS / "hidden"


def run_python(backend: str, *arguments: str) -> str:
    """Run Python where Keras has a backend, and return what it printed; raise if it fails.

    Keras imports what is installed, for seconds. The process finds only what its backend needs, as
    if its user had installed no more. The matrix runs with everything installed.
    """
    hidden = [str(HIDDEN / "always")]
    if backend != "tensorflow":
        hidden.append(str(HIDDEN / "other_backends"))
    path = os.pathsep.join([*hidden, str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": path.rstrip(os.pathsep),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # other packages' plugins take a second
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{arguments} on {backend}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_tests(backend: str, *arguments: str, expected: int) -> None:
    """Run pytest on files, by default beside this one: all pass, none is skipped or missing."""
    paths = [str(TESTS / name) if name.endswith(".py") else name for name in arguments]
    options = ["-q", "-p", "no:cacheprovider", "-p", "xdist"]  # our configuration needs xdist
    output = run_python(backend, "-B", "-m", "pytest", *options, *paths)
    summary = output.strip().splitlines()[-1]
    assert re.fullmatch(rf"{expected} passed(, \d+ (deselected|warnings?))* in .*", summary), output


def run_foreign_tests(backend: str, root: Path, *arguments: str, expected: int) -> None:
    """Run pytest on other people's files below a folder, without configuration.

    pytest would search the folders above for it, and an environment may be inside our clone.
    """
    isolation = ["--rootdir", root, "--confcutdir", root, "--config-file", os.devnull]
    run_tests(backend, *map(str, isolation), *arguments, expected=expected)
