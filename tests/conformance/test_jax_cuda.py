"""Run the backend of JAX on CUDA on the CPU, with programs as for other platforms.

On a machine with a GPU, the matrix tests the real one.
"""

import jax
import pytest
from jax_off_the_cpu import lower_as_off_the_cpu

from unidrop.conformance import (
    BackendUnavailableError,
    Cell,
    cells,
    load_backends,
    run_cell,
)
from unidrop.conformance.backends.jax import JaxOnCuda


def test_skips_the_backend_without_a_gpu():
    (backend,) = load_backends(["jax-cuda"])
    assert backend.is_missing
    assert backend.error.startswith("JAX finds no CUDA device (")


def test_names_reason_in_one_line(monkeypatch):
    def devices(platform):
        raise RuntimeError("Unable to initialize backend 'cuda'\nthe driver is too old")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(BackendUnavailableError) as error:
        JaxOnCuda()
    assert str(error.value) == "JAX finds no CUDA device (Unable to initialize backend 'cuda')"


class _OnCpu(JaxOnCuda):
    """The backend on the CPU, under the name of a GPU."""

    def get_device(self, y):
        return {"cpu": "cuda"}[super().get_device(y)]


@pytest.fixture
def backend(monkeypatch):
    devices = jax.devices
    monkeypatch.setattr(jax, "devices", lambda platform=None: devices())
    return _OnCpu()


@pytest.mark.slow
def test_passes_contracts_of_programs(backend):
    found = [cell for cell in cells(backend, ["shape-dtype-device"]) if isinstance(cell, Cell)]
    with lower_as_off_the_cpu():
        results = [run_cell(cell) for cell in found if cell.dtype == "float32"]
    assert [(str(result), result.actual) for result in results if result.status != "passed"] == []
    assert {result.device for result in results} == {"cuda"}
    modes = {result.mode for result in results}
    assert modes >= {"jit", "vjp", "vmap", "scan", "remat", "donated"}
    assert not any(mode.endswith("portable") for mode in modes)
