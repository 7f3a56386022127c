"""The scripts for GPUs distinguish failures and parts that were not checked, without a GPU."""

import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest

TOOLS = Path(gpu_check.__file__).parent


def run_on_cpu(monkeypatch, **parts):
    """Return the exit status of the check whose parts are replaced."""
    for name, part in parts.items():
        monkeypatch.setattr(gpu_check, name, part)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu"])
    return gpu_check.main()


def test_runs_the_other_parts_after_an_error(monkeypatch, capsys):
    def fail(device):
        raise RuntimeError("no graph")

    assert run_on_cpu(monkeypatch, check_replays=fail, measure=lambda *_: "passed") == 1
    summary = capsys.readouterr().out.partition("--- summary\n")[2].splitlines()
    assert [line.split(maxsplit=1)[1] for line in summary[-2:]] == [
        "failed: RuntimeError, see the traceback above",
        "passed",
    ]
    assert all("not checked: the matrix is not run on the CPU" in line for line in summary[:2])


@pytest.mark.parametrize(
    ("outcome", "status"),
    [("passed", 0), ("not checked: no chip", 0), ("failed: bits differ", 1), ("timed out", 1)],
)
def test_exits_with_1_if_a_part_fails(monkeypatch, outcome, status):
    part = {"check_replays": lambda _: outcome, "measure": lambda *_: "passed"}
    assert run_on_cpu(monkeypatch, **part) == status


def test_compares_calls_of_the_layer(monkeypatch, capsys):
    assert gpu_check.check_replays("cpu") == "passed"
    assert "20 of 20 calls" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check.torch, "equal", lambda *_: False)
    assert gpu_check.check_replays("cpu") == "failed: bits differ in 20 calls"


def test_exits_with_2_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "CLI", ("no_such_module",))
    assert gpu_check.main() == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("finds no CUDA device")
    assert second == 'pip install ".[cli]" installs no_such_module for the matrix'


@pytest.mark.slow  # starts processes that import the backend
def test_ends_a_matrix_that_takes_too_long(install):
    install(
        "sleeper",
        """
        import time
        from unidrop.conformance.backends.numpy import Numpy


        class make(Numpy):
            name = "sleeper"

            def dropout(self, *arguments, **options):
                time.sleep(600)
        """,
    )
    assert gpu_check.find_obstacle("sleeper") == ""
    assert gpu_check.check_matrix("sleeper", 4).startswith("timed out after 4 s")


@pytest.mark.slow
@pytest.mark.skipif(gpu_check.torch.cuda.is_available(), reason="there is a GPU")
def test_names_the_reason_of_a_skipped_matrix():
    outcome = gpu_check.find_obstacle("torch-cuda")
    assert outcome == "not checked: PyTorch finds no CUDA device"


def test_exits_with_1_without_triton():
    code = "import sys; sys.modules['triton'] = None; import gpu_report"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=TOOLS, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr == 'Triton is not installed: pip install ".[triton]"\n'


@pytest.mark.triton
def test_exits_with_2_if_only_names_no_kernel(monkeypatch, capsys):
    import gpu_report

    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--only", "flat int5"])
    with pytest.raises(SystemExit) as caught:
        gpu_report.main()
    assert caught.value.code == 2
    assert "got 'flat int5'" in capsys.readouterr().err
