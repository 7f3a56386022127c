"""Tests of the types that mypy and pyright infer in users' programs.

The checkers see the package as users install it: from the wheel, and from a strict editable
install. `programs` asserts exact types with `assert_type`. A comment ``type: ignore`` marks a line
that both must reject; a comment without an error is an error too.
"""

import itertools
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted((Path(__file__).parent / "programs").glob("*.py"))
INSTALLS = {
    "wheel": [],
    "editable": ["--config-settings", "editable_mode=strict", "--editable"],
}
CONFIGURATIONS = {
    "mypy.ini": "[mypy]\nstrict = true\n"
    # These frameworks have no annotations.
    "[mypy-keras.*,tensorflow.*]\nignore_missing_imports = true\n",
    "pyrightconfig.json": '{"typeCheckingMode": "standard",'
    ' "reportUnnecessaryTypeIgnoreComment": "error"}\n',
}

pytestmark = pytest.mark.slow


def run(*arguments, accepted=(0,), **options):
    """Run a module of this Python in a process, and return what it prints."""
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode in accepted, done.stdout + done.stderr
    return done.stdout


def install(folder, options):
    """Return the Python of a new environment with the package and everything installed here."""
    source, environment = folder / "source", folder / "environment"
    source.mkdir()
    for name in ("adapters", "unidrop"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(environment, with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
    here = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "zz_here.pth").write_text("\n".join(here) + "\n")
    python = environment / "bin" / "python"
    pip = ["pip", "--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "--ignore-installed", *options, source)
    return python


@pytest.fixture(scope="session")
def pythons(tmp_path_factory):
    """Return the Python of each kind of installation, by its name."""
    return {name: install(tmp_path_factory.mktemp(name), INSTALLS[name]) for name in INSTALLS}


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """Return a user's folder with all programs, and the checkers' configurations."""
    folder = tmp_path_factory.mktemp("project")
    for program in PROGRAMS:
        shutil.copy(program, folder)
    for name, text in CONFIGURATIONS.items():
        (folder / name).write_text(text)
    return folder


def run_mypy(python, project):
    """Return each message of mypy, with the path of its program."""
    output = run("mypy", "--python-executable", python, ".", accepted=(0, 1), cwd=project)
    *lines, summary = output.splitlines()
    assert f"{len(PROGRAMS)} source files" in summary, output
    return [(line.partition(":")[0], line) for line in lines]


def run_pyright(python, project):
    """Return each message of pyright, with the path of its program."""
    options = ["--pythonpath", python, "--outputjson", "."]
    report = json.loads(run("basedpyright", *options, accepted=(0, 1), cwd=project))
    assert report["summary"]["filesAnalyzed"] == len(PROGRAMS)
    found = report["generalDiagnostics"]
    return [(d["file"], f"{d['range']['start']['line'] + 1}: {d['message']}") for d in found]


CHECKERS = {"mypy": run_mypy, "pyright": run_pyright}


@pytest.fixture(
    scope="session", params=itertools.product(CHECKERS, INSTALLS), ids=lambda pair: "-".join(pair)
)
def messages(request, pythons, project):
    """Return the messages of each checker for each installation, by the name of the program."""
    checker, kind = request.param
    messages = defaultdict(list)
    for path, message in CHECKERS[checker](pythons[kind], project):
        messages[Path(path).name].append(message)
    return messages


@pytest.mark.parametrize("program", [program.name for program in PROGRAMS])
def test_infers_exact_types_in_each_checker(messages, program):
    assert not messages[program], "\n".join(messages[program])
