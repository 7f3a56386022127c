"""The matrix as a whole: backends side by side, whatever one of them does."""

import os
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest
from click.testing import CliRunner

from unidrop.cli import main
from unidrop.conformance import BackendNotRun, NotApplicable, Progress, Result, run_matrix
from unidrop.conformance.remote import BACKEND_ENV_VAR
from unidrop.conformance.schedule import Work

BROKEN = {
    "exits": ("raise SystemExit(0)", "SystemExit: 0"),
    "raises": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "dies": ("os._exit(3)", "has ended, with exit status 3"),
    "is killed": ("os.kill(os.getpid(), signal.SIGSEGV)", "has ended, by signal SIGSEGV"),
    "forks and dies": (
        "os.fork() or (os.close(0), time.sleep(300)); os._exit(3)",
        "has ended, with exit status 3",
    ),
    "is interrupted": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "has no text": (
        "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})()",
        "Mute: its text could not be made",
    ),
    "can not be encoded": (r"raise ValueError('\udcff')", r"ValueError: \udcff"),
    "hangs": ("time.sleep(600)", "gave no answer within 10 s"),
}


def run(*arguments):
    return CliRunner().invoke(main, ["conformance", *arguments])


def mutant(where, statement):
    """Return a module whose backend does something when it is made, described or run."""
    places = dict.fromkeys(("make", "dtypes", "dropout"), "pass") | {where: statement}
    return f"""
    import os, signal, time
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


@pytest.mark.parametrize("where", ["make", "dtypes"])
@pytest.mark.parametrize(("statement", "mention"), BROKEN.values(), ids=BROKEN)
def test_a_backend_that_can_not_be_loaded_is_one_red_line_and_the_others_still_run(
    install, where, statement, mention
):
    install("mutant", mutant(where, statement))
    both = ("--backend", "mutant", "--backend", "numpy")
    result = run(*both, "--contract", "mask", "--timeout", "10")
    assert result.exit_code == 1
    assert "2 passed, 0 failed" in result.output
    assert "! mutant is broken" in result.output
    assert mention in result.output


@pytest.mark.parametrize(
    ("statement", "mention"),
    [BROKEN[how] for how in ("dies", "is killed", "forks and dies", "hangs")],
    ids=("dies", "is killed", "forks and dies", "hangs"),
)
def test_a_backend_that_breaks_down_fails_the_contract_and_the_rest_is_said_not_to_be_run(
    install, statement, mention
):
    install("mutant", mutant("dropout", statement))
    outcomes = list(run_matrix(["mutant"], ["traces", "mask", "steps"], jobs=1, timeout=10))
    *missing, failure, rest = outcomes
    assert {type(outcome) for outcome in missing} == {NotApplicable}
    assert isinstance(failure, Result)
    assert str(failure) == "mask-mutant-cpu-float32-eager"
    assert failure.status == "failed"
    assert mention in failure.actual
    assert isinstance(rest, BackendNotRun)
    assert rest.error.endswith("3 more were not run")


@pytest.mark.parametrize("how", ["is interrupted", "has no text", "can not be encoded"])
def test_an_error_of_any_kind_is_a_failure_of_its_contract_in_every_report(install, tmp_path, how):
    statement, mention = BROKEN[how]
    install("mutant", mutant("dropout", statement))
    names = {name: tmp_path / name for name in ("html", "json", "junit", "markdown")}
    files = [str(part) for name, path in names.items() for part in (f"--{name}", path)]
    result = run("--backend", "mutant", "--contract", "mask", "--contract", "keys", *files)
    assert result.exit_code == 1
    assert "2 passed, 2 failed" in result.output
    for path in names.values():
        assert mention.partition(":")[0] in path.read_text(encoding="utf-8")


def test_what_a_backend_starts_reads_nothing_of_what_is_asked(install):
    install("mutant", mutant("dropout", "assert os.read(0, 1) == b''"))
    assert run("--backend", "mutant", "--contract", "mask").exit_code == 0


def test_a_traceback_is_printed_on_request(install):
    install("mutant", mutant("make", "raise RuntimeError('boom')"))
    chosen = ("--backend", "mutant", "--contract", "mask")
    assert "Traceback" not in run(*chosen).output
    assert "raise RuntimeError('boom')" in run(*chosen, "--traceback").output


def test_where_a_process_was_that_is_killed_is_printed_on_request(install):
    install("mutant", mutant("dropout", "os.kill(os.getpid(), signal.SIGSEGV)"))
    chosen = ("--backend", "mutant", "--contract", "mask")
    assert "Segmentation fault" not in run(*chosen).output
    output = run(*chosen, "--traceback").output
    assert "Segmentation fault" in output
    assert "mutant.py" in output


def test_what_backends_print_does_not_stand_in_the_tables(install, capfd):
    install("mutant", mutant("dropout", "os.write(1, b'talkative'); os.write(2, b'talkative')"))
    assert run("--backend", "mutant", "--contract", "mask").exit_code == 0
    assert "talkative" not in "".join(capfd.readouterr())


def test_a_module_that_can_not_be_imported_is_not_tried_again(install):
    first = "sys.imports = getattr(sys, 'imports', 0) + 1\nassert sys.imports != 1, 'the reason'\n"
    install("mutant", f"import sys\n{first}{dedent(mutant('make', 'pass'))}")
    result = run("--backend", "mutant", "--contract", "mask")
    assert "! mutant is broken: AssertionError: the reason" in result.output
    assert result.exit_code == 1


def test_an_entry_point_of_a_module_that_is_not_there_is_broken(install, tmp_path):
    install("mutant", mutant("make", "pass"))
    (tmp_path / "mutant.py").unlink()
    result = run("--backend", "numpy", "--backend", "mutant", "--contract", "mask")
    assert result.exit_code == 1
    assert "! mutant is broken: ModuleNotFoundError: No module named 'mutant'" in result.output


def test_files_of_the_current_folder_are_not_taken_for_packages(tmp_path, monkeypatch):
    (tmp_path / "click.py").write_text("raise RuntimeError('not this one')")
    (tmp_path / "unidrop").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run("--backend", "numpy", "--contract", "mask").exit_code == 0


def test_a_named_backend_whose_library_is_not_installed_is_a_failure(install):
    install("mutant", "import no_such_library")
    result = run("--backend", "mutant", "--backend", "numpy", "--contract", "mask")
    assert result.exit_code == 1
    assert "! mutant is not here: ModuleNotFoundError" in result.output


def test_as_many_backends_as_jobs_run_at_a_time(install):
    # Each waits for the other one, in vain where they run in turn.
    meet = """
    import pathlib, time
    from unidrop.conformance.backends.numpy import Numpy

    here = pathlib.Path(__file__)


    class make(Numpy):
        name = here.stem

        def dropout(self, x, p, seed, step, **options):
            here.with_suffix(".here").touch()
            end = time.monotonic() + 60
            while len(list(here.parent.glob("*.here"))) < 2:
                assert time.monotonic() < end
            return super().dropout(x, p, seed, step, **options)
    """
    for name in ("one", "other"):
        install(name, meet)
    together = list(run_matrix(["one", "other"], ["steps"], jobs=2))
    assert {outcome.status for outcome in together} == {"passed"}


SHARED = """
import os, pathlib, time
from unidrop.conformance.backends.numpy import Numpy

here = pathlib.Path(__file__)


class make(Numpy):
    name = "shared"

    def __init__(self):
        super().__init__()
        self.modes = tuple("abcdef")
        here.with_suffix(f".{os.getpid()}").touch()
        if len(self.there()) > 1:
            SECOND

    def there(self):
        return list(here.parent.glob("shared.[0-9]*"))

    def dropout(self, x, p, seed, step, *, mode, **options):
        # All but the first mode wait for the other process.
        end = time.monotonic() + 60
        while mode != "a" and len(self.there()) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        return super().dropout(x, p, seed, step, mode="eager", **options)
"""


@pytest.mark.parametrize(
    "second",
    [
        "pass",
        "os._exit(3)",
        "raise RuntimeError('taken')",
        "self.modes = self.modes[:3]",
        "self.modes = self.modes[::-1]",
        "self.devices = ()",
    ],
    ids=["helps", "exits", "raises", "has fewer modes", "has another order", "is broken"],
)
def test_who_has_nothing_to_do_helps_where_a_backend_takes_long(install, monkeypatch, second):
    install("shared", SHARED.replace("SECOND", second))
    pays = property(lambda work: work.is_shareable and bool(work.ran and work.modes))
    monkeypatch.setattr(Work, "pays", pays)
    begun, ran = [], []
    progress = Progress(lambda name, count: begun.append((name, count)), ran.append)
    outcomes = list(run_matrix(["shared"], ["steps", "rate"], jobs=2, progress=progress))
    assert [(outcome.contract, outcome.mode) for outcome in outcomes] == [
        (contract, mode) for contract in ("steps", "rate") for mode in "abcdef"
    ]
    assert {outcome.status for outcome in outcomes} == {"passed"}
    assert begun == [("shared", 12)]
    assert ran == ["shared"] * 12


def test_a_backend_that_lives_elsewhere_has_its_environment_in_the_only_process(install):
    install(
        "mutant",
        f"""
        import os
        from pathlib import Path
        from unidrop.conformance.backends.numpy import Numpy
        from unidrop.conformance import RemoteBackend


        class make(RemoteBackend):
            name = "mutant"
            target = "mutant:Served"
            environment = {{"OF_PLANTED": Path("its own")}}


        class Served(Numpy):
            def dropout(self, x, p, seed, step, **options):
                assert (os.environ["OF_PLANTED"], os.getppid()) == ("its own", {os.getpid()})
                return super().dropout(x, p, seed, step, **options)
        """,
    )
    outcomes = list(run_matrix(["mutant"], ["mask", "threads"], jobs=1))
    assert len(outcomes) == 4
    assert {outcome.status for outcome in outcomes} == {"passed"}


CACHE, LEAST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


@pytest.mark.parametrize("own", ["", "of the user"])
def test_what_jax_compiles_is_kept_for_a_run_and_longer_only_where_the_user_keeps_it(
    install, tmp_path, monkeypatch, own
):
    folder, noted = tmp_path / "own", tmp_path / "noted"
    monkeypatch.delenv(CACHE, raising=False)
    if own:
        monkeypatch.setenv(CACHE, str(folder))
        monkeypatch.setenv(LEAST, "0.00")
    compiled = f"""
    import os
    import jax
    from unidrop.conformance.backends.numpy import Numpy


    class make(Numpy):
        name = "mutant"

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
    assert (cache == folder, cache.exists()) == (bool(own), bool(own))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this platform has no /proc")
def test_processes_end_with_a_run_that_is_given_up_and_so_does_what_they_forked(install, tmp_path):
    pids = tmp_path / "pids"
    note = f"os.fork(); os.write(os.open({str(pids)!r}, 1090, 0o600), b'%d ' % os.getpid())"
    install("mutant", mutant("make", f"{note}; os.getpid() == os.getsid(0) or time.sleep(600)"))
    outcomes = run_matrix(["mutant"], ["keys", "mask"], jobs=1)
    next(outcomes)
    outcomes.close()
    both = [int(pid) for pid in pids.read_text().split()]
    assert len(both) == 2
    end = time.monotonic() + 60
    while any(_is_running(pid) for pid in both):
        assert time.monotonic() < end, "a process is left behind"
        time.sleep(0.05)


def _is_running(pid):
    """Tell whether a process is there, and no zombie that nobody has asked for yet."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("backends", "contracts"), [(["numpi"], []), ([], ["masks"])])
def test_unknown_names_raise_at_once(backends, contracts):
    with pytest.raises(ValueError, match=r"numpi|masks"):
        run_matrix(backends, contracts, jobs=1)


@pytest.mark.parametrize("own", [True, False], ids=["own process", "anybody's"])
def test_only_a_process_of_the_matrix_leaves_out_what_keras_imports_for_others(own):
    code = "import sys, unidrop.conformance.backends.keras; print('sklearn.base' in sys.modules)"
    environment = os.environ | ({BACKEND_ENV_VAR: "keras"} if own else {})
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(not own)]
