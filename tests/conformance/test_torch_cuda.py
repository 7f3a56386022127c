"""Run the backend of PyTorch on CUDA on the CPU, and find out why a machine skips the backends.

On a machine with a GPU, the matrix tests the real one.
"""

import pytest
import torch

from unidrop.conformance import BackendUnavailableError, Cell, cells, load_backends, run_cell
from unidrop.conformance.backend import _check_modes
from unidrop.conformance.backends.torch_gpu import TorchOnCuda, TorchOnTriton


class _OnCpu(TorchOnCuda):
    """The backend on the CPU, under the name of a GPU."""

    devices = ("cpu",)


def test_skips_the_backend_without_a_gpu():
    (backend,) = load_backends(["torch-cuda"])
    assert backend.is_missing
    assert backend.error == "PyTorch finds no CUDA device"


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return _OnCpu()


def test_declares_modes_that_exist(backend):
    _check_modes(backend)
    assert {"cuda-graph", "compile-cuda-graph", "compile", "export", "fused"} < set(backend.modes)


def test_passes_a_contract_of_eager_modes(backend):
    found = [cell for cell in cells(backend, ["mask"]) if isinstance(cell, Cell)]
    results = [run_cell(cell) for cell in found if cell.mode in ("eager", "fused", "func.vmap")]
    assert [result.status for result in results] == ["passed"] * 3


def test_names_the_reason_without_triton(monkeypatch):
    monkeypatch.setattr("unidrop.adapters.torch.buffers.BUFFERS.is_interpreted", False)
    monkeypatch.setattr("unidrop.fused.triton.unavailable", lambda: "Triton is not installed")
    with pytest.raises(BackendUnavailableError, match=r"^Triton is not installed$"):
        TorchOnTriton()
