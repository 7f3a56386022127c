"""A run of the matrix: each backend has a child process, and harms no other."""

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest
from click.testing import CliRunner

from unidrop.cli import main
from unidrop.conformance import (
    BackendNotRun,
    NotApplicable,
    Progress,
    Result,
    check,
    load_backends,
    run_matrix,
)
from unidrop.conformance.compare import ContractError

DEATHS = {
    "exit": ("os._exit(3)", "ended with exit status 3"),
    "signal": ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by signal 11"),
    "exit before its child": ("os.fork() or time.sleep(300); os._exit(3)", "exit status 3"),
    "hang": ("time.sleep(600)", "backend mutant did not answer in"),
}
ERRORS = {
    "error": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "SystemExit": ("raise SystemExit(0)", "SystemExit: 0"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "error without a message": (
        "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})()",
        "Mute: its message raises an error",
    ),
    "error that UTF-8 cannot encode": (r"raise ValueError('\udcff')", r"ValueError: \udcff"),
}

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def run(*arguments):
    return CliRunner().invoke(main, ["conformance", *arguments])


def mutant(where, statement):
    """Return a module whose backend runs a statement in one place."""
    places = dict.fromkeys(("make", "dtypes", "dropout"), "pass") | {where: statement}
    return f"""
    import os, signal, sys, time
    from unidrop.conformance.backends.numpy import Numpy


    class make(Numpy):
        name = "mutant"

        def __init__(self):
            {places["make"]}
            super().__init__()

        def dtypes(self, mode):
            {places["dtypes"]}
            return super().dtypes(mode)

        def dropout(self, x, p, seed, step, **options):
            if x.shape == (257,):
                {places["dropout"]}
            return super().dropout(x, p, seed, step, **options)
    """


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "how"),
    [*(("make", how) for how in (*DEATHS, *ERRORS)), ("dtypes", "SystemExit"), ("dtypes", "exit")],
)
def test_reports_one_outcome_if_loading_fails(install, where, how):
    statement, mention = {**DEATHS, **ERRORS}[how]
    install("mutant", mutant(where, statement))
    (outcome,) = run_matrix(["mutant"], ["mask"], jobs=1, timeout=5 if how == "hang" else None)
    assert isinstance(outcome, BackendNotRun)
    assert mention in outcome.error
    assert not outcome.is_missing


@pytest.mark.parametrize("how", DEATHS)
def test_fails_cell_of_death_and_counts_cells_not_run(install, how):
    limit = 5 if how == "hang" else None
    statement, mention = DEATHS[how]
    install("mutant", mutant("dropout", statement))
    outcomes = list(run_matrix(["mutant"], ["traces", "steps", "mask"], jobs=1, timeout=limit))
    *known, failure, missing, other_missing, rest = outcomes
    assert [type(outcome) for outcome in known] == [NotApplicable, Result]
    assert (str(failure), failure.status) == ("mask-mutant-cpu-float32-eager", "failed")
    assert mention in failure.actual
    assert (missing.contract, missing.mode) == ("traces", "fused")
    assert (other_missing.contract, other_missing.mode) == ("traces", "fused-general")
    assert isinstance(rest, BackendNotRun)
    assert rest.error.endswith("; 4 cells were not run")


def test_runs_other_backends_after_a_death(install):
    install("mutant", mutant("make", DEATHS["signal"][0]))
    result = run("--backend", "mutant", "--backend", "numpy", "--contract", "mask")
    assert result.exit_code == 1
    assert "✗ mutant: broken (the process of backend mutant was killed" in result.output
    assert "3 passed, 0 failed" in result.output


@pytest.mark.parametrize("how", [how for how in ERRORS if how not in ("error", "SystemExit")])
def test_fails_cell_of_any_error_in_every_report(install, tmp_path, how):
    statement, mention = ERRORS[how]
    install("mutant", mutant("dropout", statement))
    names = {name: tmp_path / name for name in ("html", "json", "junit", "markdown")}
    files = [str(part) for name, path in names.items() for part in (f"--{name}", path)]
    result = run("--backend", "mutant", "--contract", "mask", "--contract", "keys", *files)
    assert result.exit_code == 1
    assert "3 passed, 3 failed" in result.output
    for path in names.values():
        assert mention.partition(":")[0] in path.read_text(encoding="utf-8")


def test_runs_child_process_without_input(install):
    install("mutant", mutant("dropout", "assert os.read(0, 1) == b''"))
    assert {outcome.status for outcome in run_matrix(["mutant"], ["mask"], jobs=1)} == {"passed"}


def test_keeps_output_of_backend_out_of_report(install, capfd):
    install("mutant", mutant("dropout", "print('talkative'); os.write(2, b'talkative')"))
    result = run("--backend", "mutant", "--contract", "mask")
    assert result.exit_code == 0
    assert "talkative" not in result.output + "".join(capfd.readouterr())


def test_shows_output_and_place_of_death_with_traceback(install):
    die = "print('last words'); os.kill(os.getpid(), signal.SIGSEGV)"
    install("mutant", mutant("dropout", die))
    chosen = ("--backend", "mutant", "--contract", "mask")
    assert "last words" not in run(*chosen).output
    output = run(*chosen, "--traceback").output
    for word in ("last words", "Segmentation fault", "mutant.py"):
        assert word in output


def test_shows_where_loading_failed_with_traceback(install):
    install("mutant", mutant("make", "raise RuntimeError('boom')"))
    chosen = ("--backend", "mutant", "--contract", "mask")
    assert "Traceback" not in run(*chosen).output
    assert "raise RuntimeError('boom')" in run(*chosen, "--traceback").output


def test_imports_module_once_even_if_that_fails(install):
    first = "sys.imports = getattr(sys, 'imports', 0) + 1\nassert sys.imports != 1, 'the reason'\n"
    install("mutant", f"import sys\n{first}{dedent(mutant('make', 'pass'))}")
    (outcome,) = run_matrix(["mutant"], ["mask"], jobs=1)
    assert outcome.error == "AssertionError: the reason"


def test_reports_entry_point_without_module_as_broken(install, tmp_path):
    install("mutant", mutant("make", "pass"))
    (tmp_path / "mutant.py").unlink()
    result = run("--backend", "mutant", "--contract", "mask")
    assert result.exit_code == 1
    assert "mutant: broken (ModuleNotFoundError: No module named 'mutant')" in result.output


def test_skips_backend_without_its_library(install):
    install("mutant", "import no_such_library")
    result = run("--backend", "mutant", "--backend", "numpy", "--contract", "mask")
    assert "mutant: skipped (no_such_library is not installed)" in result.output
    assert result.exit_code == 1, "a backend that the user names must run"


MEET = """
import pathlib, time
from unidrop.conformance.backends.numpy import Numpy

here = pathlib.Path(__file__)


class make(Numpy):
    name = here.stem

    def dropout(self, x, p, seed, step, **options):
        here.with_suffix(".here").touch()
        end = time.monotonic() + 60
        while len(list(here.parent.glob("*.here"))) < 2:
            assert time.monotonic() < end, "the other backend does not run"
            time.sleep(0.01)
        return super().dropout(x, p, seed, step, **options)
"""


def test_runs_as_many_backends_at_a_time_as_jobs(install):
    for name in ("one", "other"):
        install(name, MEET)
    outcomes = list(run_matrix(["one", "other"], ["steps"], jobs=2))
    assert {outcome.status for outcome in outcomes} == {"passed"}


def test_runs_one_backend_at_a_time_with_one_job(install, tmp_path):
    note = f"os.write(os.open({str(tmp_path / 'log')!r}, 1089, 0o600), b'%d ' % os.getpid())"
    for name in ("one", "other"):
        install(name, mutant("dropout", note).replace('"mutant"', repr(name)))
    assert len(list(run_matrix(["one", "other"], ["mask"], jobs=1))) == 6
    pids = (tmp_path / "log").read_text().split()
    changes = sum(before != after for before, after in itertools.pairwise(pids))
    assert (len(set(pids)), changes) == (2, 1)


def test_yields_outcomes_by_mode_and_counts_them():
    begun, ran = [], []
    progress = Progress(lambda name, count: begun.append((name, count)), ran.append)
    outcomes = run_matrix(["numpy"], ["traces", "steps", "keys"], jobs=1, progress=progress)
    assert [(outcome.mode, outcome.contract) for outcome in outcomes] == [
        (mode, contract)
        for mode in ("eager", "fused", "fused-general")
        for contract in ("traces", "steps", "keys")
    ]
    assert begun == [("numpy", 9)]
    assert ran == ["numpy"] * 9


@pytest.mark.parametrize(("backends", "contracts"), [(["numpi"], []), ([], ["masks"])])
def test_rejects_unknown_names_at_once(backends, contracts):
    with pytest.raises(ValueError, match=r"numpi|masks"):
        run_matrix(backends, contracts, jobs=1)


ENVIRONMENT = """
import os
from unidrop.conformance import SubprocessBackend
from unidrop.conformance.backends.numpy import Numpy

make = SubprocessBackend(
    "mutant", "mutant:Target", environment={"REQUIRED": "1"}, defaults={"A": "ours", "B": "ours"}
)


class Target(Numpy):
    name = "other"

    def dropout(self, x, p, seed, step, **options):
        variables = [os.environ.get(name) for name in ("REQUIRED", "A", "B")]
        assert variables == ["1", "theirs", "ours"], variables
        WRONG
        return super().dropout(x, p, seed, step, **options)
"""


@pytest.fixture
def in_own_environment(install, monkeypatch):
    """Install a backend with an environment, whose dropout runs a statement."""
    monkeypatch.setenv("A", "theirs")
    monkeypatch.setenv("REQUIRED", "0")
    monkeypatch.delitem(sys.modules, "mutant", raising=False)
    return lambda wrong="pass": install("mutant", ENVIRONMENT.replace("WRONG", wrong))


def test_runs_child_process_in_backend_environment(in_own_environment):
    in_own_environment()
    outcomes = list(run_matrix(["mutant"], ["mask", "threads"], jobs=1))
    assert [(outcome.backend, outcome.status) for outcome in outcomes] == [("mutant", "passed")] * 6


def test_requires_environment_to_load_backend(in_own_environment, monkeypatch):
    in_own_environment()
    (backend,) = load_backends(["mutant"])
    assert backend.is_missing
    assert backend.error.startswith("it needs a process with REQUIRED=1")
    monkeypatch.setenv("REQUIRED", "1")
    (backend,) = load_backends(["mutant"])
    assert backend.name == "mutant"


def test_runs_check_in_backend_environment(in_own_environment):
    in_own_environment()
    check("mask", "mutant", mode="eager")
    with pytest.raises(ValueError, match=r"eager: NumPy has no layers"):
        check("layer-calls", "mutant")


@pytest.mark.parametrize(
    ("wrong", "mention"),
    [("step += 1", "the step is"), ("1 / 0", "ZeroDivisionError"), ("os._exit(3)", "status 3")],
)
def test_raises_failure_of_check_in_backend_environment(in_own_environment, wrong, mention):
    in_own_environment(wrong)
    with pytest.raises(ContractError, match=mention):
        check("mask", "mutant", mode="eager")


def test_raises_import_error_if_child_cannot_load(in_own_environment, tmp_path):
    in_own_environment()
    text = (tmp_path / "mutant.py").read_text()
    (tmp_path / "mutant.py").write_text(text.replace("mutant:Target", "mutant:Absent"))
    with pytest.raises(ImportError, match="Absent"):
        check("mask", "mutant")


def test_runs_diff_in_backend_environment(in_own_environment, capfd):
    in_own_environment("step += 1")
    mask = ("--seed", "42", "--step", "7", "--p", "0.3", "--shape", "4x50")
    result = CliRunner().invoke(main, ["diff", "--backend", "mutant", *mask])
    assert result.exit_code == 1
    assert "this explains all of it: the step is 8 instead of 7" in capfd.readouterr().out


CACHE, LEAST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True], ids=["for the run", "the user's"])
def test_keeps_jax_cache_for_the_run_unless_user_sets_it(install, tmp_path, monkeypatch, own):
    folder, noted = tmp_path / "own", tmp_path / "noted"
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.delenv(LEAST, raising=False)
    if own:
        monkeypatch.setenv(CACHE, str(folder))
        monkeypatch.setenv(LEAST, "0.00")
    compiled = f"""
    import os
    import jax
    from unidrop.conformance import SubprocessBackend
    from unidrop.conformance.backends.numpy import Numpy
    from unidrop.conformance.backends.subprocess_backends import JAX_DEFAULTS

    make = SubprocessBackend("mutant", "mutant:Target", defaults=JAX_DEFAULTS)


    class Target(Numpy):
        def dropout(self, x, p, seed, step, **options):
            jax.jit(lambda v: v * 2)(x)
            cache = os.environ[{CACHE!r}]
            assert os.listdir(cache)
            assert os.environ[{LEAST!r}] == {"0.00" if own else "0"!r}
            open({str(noted)!r}, "w").write(cache)
            return super().dropout(x, p, seed, step, **options)
    """
    install("mutant", compiled)
    (outcome, *_) = run_matrix(["mutant"], ["rate"], jobs=1)
    assert outcome.status == "passed", outcome
    cache = Path(noted.read_text())
    assert (cache == folder, cache.exists()) == (own, own)


@pytest.fixture
def sleepers(install, tmp_path):
    """Install a backend that forks and sleeps; return a function that waits for both processes."""
    pids = tmp_path / "pids"
    note = f"os.write(os.open({str(pids)!r}, 1089, 0o600), b'%d ' % os.getpid())"
    install("mutant", mutant("make", f"os.fork(); {note}; time.sleep(600)"))

    def wait():
        until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        return [int(pid) for pid in pids.read_text().split()]

    return wait


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid):
    """Tell whether a process exists, other than as a zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@needs_proc
def test_ends_children_when_run_is_closed(sleepers):
    outcomes = run_matrix(["mutant", "numpy"], ["keys"], jobs=2)
    assert next(outcomes).backend == "numpy"
    both = sleepers()
    outcomes.close()
    until(lambda: not any(map(is_running, both)))


@needs_proc
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ends_child_when_signal_stops_command(sleepers, how):
    # A shell starts background jobs, such as a run of these tests, with SIGINT ignored.
    script = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('unidrop.cli', run_name='__main__')"
    )
    command = [sys.executable, "-c", script, "conformance", "--backend", "mutant"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            both = sleepers()
            process.send_signal(how)
            assert process.wait(timeout=60) != 0
        finally:
            process.kill()
    until(lambda: not any(map(is_running, both)))
