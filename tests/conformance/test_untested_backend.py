"""A backend that can't be run on this machine says so, and is neither passed nor failed."""

import json
import os
from types import MappingProxyType

import pytest
from click.testing import CliRunner

from unidrop.cli import main
from unidrop.conformance import BackendUnavailableError, RemoteBackend, check, load_backends
from unidrop.conformance.backends.numpy import Numpy

WHY = "untested: there is no such chip"


class Elsewhere(Numpy):
    """What the tests load on the other side."""

    def __init__(self):
        raise BackendUnavailableError("there is no such chip")


class Remote(RemoteBackend):
    name = "chip"
    target = "test_untested_backend:Elsewhere"
    environment = MappingProxyType({"PYTHONPATH": os.path.dirname(__file__)})


@pytest.fixture
def chip(install):
    install(
        "chip",
        """
        from unidrop.conformance.backends.numpy import Numpy
        from unidrop.conformance import BackendUnavailableError


        class make(Numpy):
            name = "chip"

            def __init__(self):
                raise BackendUnavailableError("there is no such chip")
        """,
    )
    return "chip"


def test_an_untested_backend_is_missing_and_says_why(chip):
    (backend,) = load_backends([chip])
    assert (backend.name, backend.error, backend.is_missing) == (chip, WHY, True)
    assert "Traceback" in backend.details


def test_the_matrix_shows_it_as_not_here_and_runs_the_others(chip, tmp_path):
    path = tmp_path / "matrix.json"
    arguments = ["--backend", chip, "--backend", "numpy", "--contract", "generator"]
    result = CliRunner().invoke(main, ["conformance", *arguments, "--json", str(path)])
    assert f"! chip is not here: {WHY}" in result.output
    assert "2 passed, 0 failed" in result.output
    (unavailable,) = json.loads(path.read_text())["unavailable"]
    assert unavailable["error"] == WHY


def test_a_contract_of_it_that_is_asked_for_raises_import_error(chip):
    with pytest.raises(ImportError, match=WHY):
        check("generator", chip)


def test_what_is_raised_in_another_process_is_the_same_here():
    with pytest.raises(BackendUnavailableError, match=r"^there is no such chip$"):
        Remote()
