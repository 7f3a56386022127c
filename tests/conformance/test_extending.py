"""Test that the files and commands of docs/extending.md suffice for a backend that passes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
TEXT = PAGE.read_text(encoding="utf-8")
FILES = dict(re.findall(r"```\w+\n# (\S+)\n(.*?)```", TEXT, flags=re.DOTALL))
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Install the page's package into a temporary folder, and return its environment."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in ("plain.py", "pyproject.toml"):
        (source / name).write_text(FILES[name], encoding="utf-8")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--quiet", "--target", target, source], check=True)
    paths = [str(target), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(command, environment, folder, returncode=0):
    command = command.replace("python -c", f"{sys.executable} -c")
    command = command.replace("unidrop ", f"{sys.executable} -m unidrop.cli ")
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == returncode, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_passes_every_contract_without_capabilities(package, tmp_path):
    (command,) = (line for line in COMMANDS if line.startswith("unidrop conformance"))
    run(f"{command} --json matrix.json", package, tmp_path)
    matrix = json.loads((tmp_path / "matrix.json").read_text())
    passed = {cell["contract"] for cell in matrix["cells"] if cell["status"] == "passed"}
    assert {"mask", "threshold", "output", "bad-rate", "bad-dtype", "threads", "rate"} <= passed
    assert len(passed) == len(matrix["cells"])


@pytest.mark.slow
def test_names_the_mistake_that_the_page_describes(package, tmp_path):
    broken = tmp_path / "plain.py"
    broken.write_text(FILES["plain.py"].replace("range(10)", "range(7)"), encoding="utf-8")
    environment = package | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{package['PYTHONPATH']}"}
    matrix = run("unidrop conformance --backend plain", environment, tmp_path, returncode=1)
    assert "✗ mask-plain-cpu-float32-eager" in matrix
    red = re.findall(r"^✗ (\S+)-plain-", matrix, flags=re.MULTILINE)
    assert f"{len(red)} contracts fail" in " ".join(TEXT.split())
    (start,) = re.findall(r"```text\n(.*)\n```", TEXT)
    assert start in matrix
    (diff,) = (line for line in COMMANDS if line.startswith("unidrop diff"))
    assert "the generator runs 7 rounds instead of 10" in run(diff, environment, tmp_path, 1)


@pytest.mark.slow
def test_passes_the_test_module_of_the_page(package, tmp_path):
    module = FILES["test_plain.py"].replace('["numpy"],', '["plain"],')
    (tmp_path / "test_plain.py").write_text(module, encoding="utf-8")
    (tmp_path / "pytest.ini").touch()  # else pytest searches the folders above, perhaps our clone
    # The command line above has run the other contracts of this backend.
    arguments = "-q -p no:cacheprovider -k 'keys or bad'"
    output = run(f"{sys.executable} -m pytest {arguments}", package, tmp_path)
    assert re.search(r"^[3-9] passed, 1\d deselected", output, flags=re.MULTILINE), output


def test_names_every_capability_and_its_contracts():
    from unidrop.conformance import CAPABILITIES, CONTRACTS

    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", TEXT, flags=re.MULTILINE)
    enabled = {name: set(re.findall(r"`([\w*-]+)`", contracts)) for name, contracts in rows}
    enabled["family"] -= {"family-*", "members"}
    enabled["family"] |= {c.name for c in CONTRACTS.values() if c.member}
    assert list(enabled) == list(CAPABILITIES)
    for contract in CONTRACTS.values():
        for need in contract.needs:
            others = set().union(*(enabled[other] for other in contract.needs))
            assert contract.name in others, (contract.name, need)
    assert set().union(*enabled.values()) <= {*CONTRACTS, *CAPABILITIES}


@pytest.mark.slow
def test_passes_with_a_library_of_the_standard(package, tmp_path):
    strict = tmp_path / "strict"
    strict.mkdir()
    (strict / "strict.py").write_text(FILES["strict.py"], encoding="utf-8")
    pyproject = FILES["pyproject.toml"].replace("plain:Plain", "strict:Strict")
    (strict / "pyproject.toml").write_text(pyproject.replace("plain", "strict"), encoding="utf-8")
    target = tmp_path / "target"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--quiet", "--target", target, strict], check=True)
    environment = package | {"PYTHONPATH": f"{target}{os.pathsep}{package['PYTHONPATH']}"}
    assert " 0 failed" in run("unidrop conformance --backend strict", environment, tmp_path)
    shutil.rmtree(target)
