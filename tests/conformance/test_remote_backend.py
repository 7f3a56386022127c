"""A backend in a process of its own: what crosses, and what becomes of errors and of the dead."""

import os
import subprocess
import sys
from types import MappingProxyType

import numpy as np
import pytest

from unidrop.conformance import Cell, RemoteBackend, cells, run_cell
from unidrop.conformance.backends.numpy import Numpy
from unidrop.conformance.process import RemoteObject
from unidrop.conformance.remote import BACKEND_ENV_VAR


class Served(Numpy):
    """What the tests run on the other side."""

    def __init__(self):
        super().__init__()
        self.modes = tuple(os.environ.get("MODES_OF_SERVED", "eager").split())

    def layouts(self, x):
        if x.ndim == 1:
            os._exit(3)
        print("this must not stand between replies")
        return {"a set": {1, 2}, "numbers": [1, (2.5, None)]}

    def layer(self, p, seed, *, dtype, device, mode):
        return Counting()

    def words(self, counter, key, *, mode):
        raise OwnError("no words today")


class OwnError(LookupError):
    """An error of a class that the caller does not know."""


class Counting:
    calls = 0

    def __call__(self, x, *, training):
        self.calls += training
        return x

    def vjp(self, x):
        return x, lambda upstream: upstream * self.calls


class Remote(RemoteBackend):
    name = "served"
    target = "test_remote_backend:Served"
    environment = MappingProxyType(
        {"MODES_OF_SERVED": "eager fused", "PYTHONPATH": os.path.dirname(__file__)}
    )


@pytest.fixture(scope="module")
def remote():
    return Remote()


def test_attributes_are_those_of_the_other_process_with_its_environment(remote):
    assert remote.modes == ("eager", "fused")
    assert Served().modes == ("eager",)
    assert remote.step_limit == 1 << 64


@pytest.mark.parametrize(
    ("owner", "modes", "is_here"),
    [("served", "eager fused", True), ("served", "eager", False), ("other", "eager fused", False)],
    ids=["its own", "another environment", "another's"],
)
def test_a_process_that_is_its_own_is_all_that_it_needs(monkeypatch, owner, modes, is_here):
    environment = {**Remote.environment, "MODES_OF_SERVED": modes, BACKEND_ENV_VAR: owner}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    backend = Remote()
    assert backend.modes == ("eager", "fused")
    layer = backend.layer(0.5, 42, dtype="float32", device="cpu", mode="eager")
    assert isinstance(layer, Counting) == is_here


@pytest.mark.parametrize("contract", ["mask", "output", "windows", "threads", "bad-rate", "keys"])
def test_contracts_hold_as_they_do_here(remote, contract):
    chosen = [cell for cell in cells(remote, [contract]) if isinstance(cell, Cell)]
    assert len(chosen) == len([cell for cell in cells(Numpy(), [contract])])
    for cell in chosen:
        result = run_cell(cell)
        assert result.status == "passed", result.actual


def test_a_contract_that_does_not_hold_there_does_not_hold_here(remote):
    class Other(Remote):
        target = "test_remote_backend:Wrong"

    (cell,) = (c for c in cells(Other(), ["mask"]) if c.mode == "eager")
    assert run_cell(cell).status == "failed"


class Wrong(Served):
    def dropout(self, x, p, seed, step, **options):
        return super().dropout(x, p, seed, step + 1, **options)


def test_layers_and_functions_stay_there_and_are_called_from_here(remote):
    layer = remote.layer(0.5, 42, dtype="float32", device="cpu", mode="eager")
    assert isinstance(layer, RemoteObject)
    layer(np.ones(3), training=True)
    layer.calls = layer.calls + 4
    y, pullback = layer.vjp(np.ones(3))
    assert y.tolist() == [1, 1, 1]
    assert pullback(np.full(2, 3.0)).tolist() == [15, 15]


def test_containers_are_plain_and_what_is_no_plain_value_has_a_name(remote):
    actual = remote.layouts(np.ones((1, 1)))
    assert actual["numbers"] == [1, (2.5, None)]
    assert isinstance(actual["a set"], RemoteObject)


def test_an_error_arrives_as_the_nearest_of_pythons_own_and_says_what_it_was(remote):
    with pytest.raises(LookupError, match="OwnError: no words today"):
        remote.words([0] * 4, [0] * 2, mode="eager")
    with pytest.raises(ValueError, match="between 0 and 1"):
        remote.dropout(np.ones(3), 2.0, 0, 0, mode="eager")


def test_a_library_that_is_not_installed_there_is_a_module_that_is_not_found():
    class Absent(Remote):
        target = "no_such_library:Backend"

    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        Absent()


def test_a_process_that_dies_fails_its_call_and_later_ones():
    remote = Remote()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="process of backend served has ended"):
            remote.layouts(np.ones(1))


def test_the_process_ends_with_the_one_that_started_it():
    code = (
        "from test_remote_backend import Remote\n"
        "remote = Remote()\n"
        "print(remote._process._popen.pid)"
    )
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
