"""Test the tests: change one place of the product at a time, and see whether anything fails.

    python tests/mutation/run.py --list                      # the mutants, and run none
    python tests/mutation/run.py                             # run the mutants without a result
    python tests/mutation/run.py --only unidrop/rate.py --limit 6
    python tests/mutation/run.py --summary                   # the results so far

Mutants are chosen from the syntax trees of the core, the kernels and the adapters: a share of each
file's places, the same ones at each run. Each mutant runs in a copy of the repository that is
installed into its own environment. First the everyday tests that mirror the changed file run, and
the matrix of one backend. Then mutants that survive run all other everyday tests.
A test that fails without any mutant is left out. Results are appended to ``results.jsonl`` in the
folder of ``--work``; delete a line to rerun its mutant, and begin with an empty folder when
the tests have changed. A run of every mutant takes hours.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from typing import Any

from mutants import ROOT, Mutant, choose

EVERYDAY = ["-m", "not slow"]
QUICK = ["core", "fused", "adapters/numpy"]

# From the start of a source file's path: the folders of tests that run first, and the backend.
MIRRORS = {
    "unidrop/fused/": (["fused"], "numpy"),
    "unidrop/threads.py": (["fused"], "numpy"),
    "unidrop/dispatch.py": (["fused", "core"], "numpy"),
    "unidrop/": (["core", "adapters/numpy", "fused"], "numpy"),
    "adapters/numpy/": (["adapters/numpy", "core"], "numpy"),
    "adapters/dask.py": (["adapters/dask"], "numpy"),
    "adapters/torch/": (["adapters/torch"], "torch"),
    "adapters/tensorflow/": (["adapters/tensorflow"], "tensorflow"),
    "adapters/keras/": (["adapters/keras"], "keras"),
    "adapters/keras_backend.py": (["adapters/keras"], "keras-2-devices"),
    "adapters/noise_shape.py": (["adapters/tensorflow", "adapters/keras"], "keras"),
    "adapters/jax/primitive.py": (["adapters/jax"], "jax-2-devices"),
    "adapters/jax/": (["adapters/jax"], "jax"),
    "adapters/flax.py": (["adapters/flax"], "flax"),
    "adapters/": (["adapters/torch", "adapters/keras", "adapters/flax"], "keras"),
}
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


class Copy:
    """A copy of the repository with its own environment. It runs one command at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder / "repository", folder / "environment" / "bin"
        shutil.rmtree(folder, ignore_errors=True)
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        venv.create(self.bin.parent, symlinks=True)
        # Everything installed here except the package itself.
        [packages] = self.bin.parent.glob("lib/*/site-packages")
        outer = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "outer.pth").write_text("\n".join(outer))
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install"]
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--editable"]
        subprocess.run([*pip, *options, str(self.folder)], check=True)

    def run(self, command: list[str], timeout: float) -> tuple[int | None, str]:
        """Return a command's exit status, None if it took too long, and what it printed."""
        environment = os.environ | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": str(self.bin.parent),
            # Inductor must not find what it compiled from other code.
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder.parent / "inductor"),
            "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                [str(self.bin / "python"), "-m", *command],
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its children, too
                process.wait()
            output.seek(0)
            return status, output.read()


class Baselines:
    """The seconds, exit status and failures of each command without a mutant."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def get(self, command: list[str], copy: Copy) -> tuple[float, int | None, list[str]]:
        name = " ".join(command)
        with self.locks[name]:
            if name not in self.known:
                begin = time.monotonic()
                status, printed = copy.run(command, 3600)
                if status not in (0, 1, 5):
                    sys.exit(f"{name} exits with {status} without a mutant:\n{printed}")
                failed = [match[1] for match in FAILED.finditer(printed)]
                self.known[name] = time.monotonic() - begin, status, failed
                self.path.write_text(json.dumps(self.known, indent=1))
                print(f"without a mutant: {name}: {self.known[name]}", flush=True)
            return self.known[name]


def commands(file: str) -> tuple[list[list[str]], list[list[str]]]:
    """Return the commands that mirror a file, in order, and the commands of all other tests."""
    mirrors, backend = next(MIRRORS[start] for start in MIRRORS if file.startswith(start))
    tests = {path.parent.relative_to(ROOT / "tests") for path in ROOT.glob("tests/**/test_*.py")}
    tests -= {Path("mutation")}  # they notice any change of the text
    # The folders without a framework first: their tests are the quickest.
    others = sorted(map(Path.as_posix, tests), key=lambda name: (name not in QUICK, name))
    pytest = ["pytest", "-q", "--tb=no", "-p", "no:cacheprovider", *EVERYDAY]
    matrix = ["unidrop.cli", "conformance", "--backend", backend, "--jobs", "1"]
    first = [*([*pytest, f"tests/{folder}"] for folder in mirrors), matrix]
    return first, [[*pytest, f"tests/{folder}"] for folder in others if folder not in mirrors]


def test(
    mutant: Mutant, commands: list[list[str]], copy: Copy, baselines: Baselines
) -> dict[str, Any]:
    """Run commands against a mutant until one fails."""
    original = ROOT / mutant.file
    begin = time.monotonic()
    caught, by = "survived", ""
    for command in commands:
        seconds, status, failing = baselines.get(command, copy)
        if command[0] == "pytest":
            command = [*command, "-x", *(f"--deselect={name}" for name in failing)]
        elif status != 0:
            continue  # the matrix fails without a mutant
        mutant.apply(copy.folder)
        try:
            status, printed = copy.run(command, 120 + 4 * seconds)
        finally:
            shutil.copy2(original, copy.folder / mutant.file)
        if status not in (0, 5):  # 5: pytest has selected nothing
            caught = "timeout" if status is None else command[0]
            failed = FAILED.search(printed)
            by = failed[1] if failed else printed.strip()[-300:]
            break
    taken = round(time.monotonic() - begin)
    return {"id": mutant.id, **asdict(mutant), "caught": caught, "by": by, "seconds": taken}


def show(results: list[dict[str, Any]]) -> None:
    """Print how many mutants of each file and kind were caught, and those that survived."""
    for field in ("file", "kind", "caught"):
        print(f"\n| {field} | mutants | caught |\n|---|---|---|")
        number = Counter(result[field] for result in results)
        caught = Counter(r[field] for r in results if r["caught"] != "survived")
        for name in sorted(number):
            print(f"| {name} | {number[name]} | {caught[name]} |")
    survivors = [result for result in results if result["caught"] == "survived"]
    print(f"\n{len(results) - len(survivors)} of {len(results)} mutants were caught.")
    for result in survivors:
        print(f"\n{result['id']} {result['kind']} {result['file']}:{result['line']}")
        print(f"- {result['old']}\n+ {result['new']}")


def main() -> None:
    """Parse the arguments, run the mutants and print the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(tempfile.gettempdir()) / "unidrop-mutation"
    parser.add_argument("--only", metavar="FILE", action="append", help="mutants of this file")
    parser.add_argument("--limit", type=int, help="run this many")
    parser.add_argument("--number", type=int, default=160, help="mutants to choose (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the choice (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="copies to run in (%(default)s)")
    parser.add_argument("--work", type=Path, default=default, help="folder (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the mutants, run none")
    parser.add_argument("--summary", action="store_true", help="print the results, run none")
    arguments = parser.parse_args()
    mutants = choose(arguments.number, arguments.seed)
    mutants = [m for m in mutants if not arguments.only or m.file in arguments.only]
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.id} {mutant.kind} {mutant.file}:{mutant.line}")
            print(f"- {mutant.old}\n+ {mutant.new}")
        print(len(mutants), "mutants:", dict(Counter(mutant.kind for mutant in mutants)))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    path = arguments.work / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not arguments.summary:
        done = {result["id"] for result in results}
        todo = [mutant for mutant in mutants if mutant.id not in done][: arguments.limit]
        results += run(todo, arguments.jobs, arguments.work, path)
    chosen = {mutant.id for mutant in mutants}
    show([result for result in results if result["id"] in chosen])


def run(mutants: list[Mutant], jobs: int, work: Path, path: Path) -> list[dict[str, Any]]:
    """Test mutants in as many copies as there are jobs, and append each result to a file."""
    copies: Queue[Copy] = Queue()
    for i in range(min(jobs, len(mutants))):
        copies.put(Copy(work / f"copy{i}"))
    baselines = Baselines(work / "baselines.json")
    writing = threading.Lock()

    def one(mutant: Mutant, commands: list[list[str]], is_last: bool) -> dict[str, Any]:
        copy = copies.get()
        try:
            result = test(mutant, commands, copy, baselines)
        finally:
            copies.put(copy)
        if is_last or result["caught"] != "survived":
            with writing, path.open("a") as file:
                file.write(json.dumps(result) + "\n")
        where = f"{result['file']}:{result['line']}"
        print(f"{result['caught']:8} {result['seconds']:4} s {where} {result['by']}", flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        first = list(pool.map(lambda mutant: one(mutant, commands(mutant.file)[0], False), mutants))
        caught = [result for result in first if result["caught"] != "survived"]
        ids = {result["id"] for result in caught}
        left = [mutant for mutant in mutants if mutant.id not in ids]
        return caught + list(
            pool.map(lambda mutant: one(mutant, commands(mutant.file)[1], True), left)
        )


if __name__ == "__main__":
    main()
