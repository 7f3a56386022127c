"""A backend that cannot run on this machine is skipped, and neither passes nor fails."""

import json

import pytest
from click.testing import CliRunner

from unidrop.cli import main
from unidrop.conformance import check, load_backends

REASON = "there is no such chip"


@pytest.fixture
def chip(install):
    install(
        "chip",
        f"""
        from unidrop.conformance import BackendUnavailableError
        from unidrop.conformance.backends.numpy import Numpy


        class make(Numpy):
            name = "chip"

            def __init__(self):
                raise BackendUnavailableError({REASON!r})
        """,
    )
    return "chip"


def test_returns_the_reason_from_load_backends(chip):
    (backend,) = load_backends([chip])
    assert (backend.name, backend.error, backend.is_missing) == (chip, REASON, True)
    assert "Traceback" in backend.details


def test_skips_it_in_matrix_and_runs_the_others(chip, tmp_path):
    path = tmp_path / "matrix.json"
    arguments = ["--backend", chip, "--backend", "numpy", "--contract", "generator"]
    result = CliRunner().invoke(main, ["conformance", *arguments, "--json", str(path)])
    assert f"chip: skipped ({REASON})" in result.output
    assert "3 passed, 0 failed" in result.output
    (unavailable,) = json.loads(path.read_text())["unavailable"]
    assert unavailable["error"] == REASON


def test_says_that_every_chosen_backend_was_skipped(chip):
    result = CliRunner().invoke(main, ["conformance", "--backend", chip])
    assert result.exit_code == 1
    assert result.output.splitlines()[1:] == [
        f"chip: skipped ({REASON})",
        "nothing was run: every chosen backend was skipped",
        "0 passed, 0 failed",
    ]


def test_raises_import_error_in_check(chip):
    with pytest.raises(ImportError, match=REASON):
        check("generator", chip)
