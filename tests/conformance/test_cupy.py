"""Run the CuPy backend on a fake CuPy that computes with NumPy, without a GPU.

The fake raises if the core calls a function that CuPy lacks, converts an array to NumPy implicitly,
or mixes devices. On a machine with a GPU, the matrix tests the real CuPy.
"""

import sys

import array_api_compat
import cupy_by_numpy
import numpy as np
import pytest
import reference

import unidrop
from unidrop import Key
from unidrop.conformance import Cell, cells, load_backends, run_cell
from unidrop.library import get_library

KEY = Key(42).fold_in("encoder/0").fold_in(7)


@pytest.fixture
def cupy(monkeypatch):
    """Replace CuPy by the fake, and forget modules that imported CuPy."""
    for name in list(sys.modules):
        if name.startswith(("cupy.", "array_api_compat.cupy", "unidrop.conformance.backends.cupy")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(array_api_compat, "cupy", raising=False)
    for name, module in cupy_by_numpy.MODULES.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield cupy_by_numpy.MODULES["cupy"]
    for name in list(sys.modules):
        if name.startswith(("array_api_compat.cupy", "unidrop.conformance.backends.cupy")):
            del sys.modules[name]
    vars(array_api_compat).pop("cupy", None)


@pytest.fixture
def backend(cupy):
    (backend,) = load_backends(["cupy"])
    return backend


def test_passes_every_contract_on_each_device(backend):
    assert backend.devices == ("cuda:0", "cuda:1")
    results = [run_cell(cell) for cell in cells(backend) if isinstance(cell, Cell)]
    assert {result.device for result in results} == set(backend.devices)
    assert {result.dtype for result in results} == set(backend.dtypes("eager"))
    assert [(str(result), result.actual) for result in results if result.status != "passed"] == []


def test_drops_arrays_of_the_current_device(cupy):
    x = np.linspace(-2, 2, 601)[1::2]
    expected = np.array(reference.keep_mask((300,), 0.3, int(KEY)), dtype=bool)
    with cupy.cuda.Device(1):
        y, mask = unidrop.dropout(cupy.asarray(x), 0.3, KEY, return_mask=True)
        drawn = unidrop.keep_mask((300,), 0.3, KEY, xp=cupy)
        assert str(unidrop.explain_path(y)).startswith("portable: ")
    assert np.array_equal(cupy.asnumpy(y), unidrop.dropout(x, 0.3, KEY))
    assert np.array_equal(cupy.asnumpy(mask), expected)
    assert np.array_equal(cupy.asnumpy(drawn), expected)
    assert {array.device.id for array in (y, mask, drawn)} == {1}


def test_equals_numpy_in_large_mask(cupy):
    shape = (3, 100_001)
    mask = unidrop.keep_mask(shape, 0.3, KEY, xp=cupy)
    assert np.array_equal(cupy.asnumpy(mask), unidrop.keep_mask(shape, 0.3, KEY))
    x = np.ones(shape, dtype=np.complex64)
    y = unidrop.dropout(cupy.asarray(x), 0.3, KEY)
    assert np.array_equal(cupy.asnumpy(y), unidrop.dropout(x, 0.3, KEY))


def test_knows_that_arrays_are_not_on_the_cpu(cupy):
    x = cupy.asarray(np.ones(3))
    assert not get_library(x).arrays.is_on_cpu(x)


def test_folds_in_a_step_on_its_device(cupy):
    key = Key(42).fold_in("encoder/0").fold_in(cupy.asarray(7))
    assert all(type(word) is cupy.ndarray for word in key.words)
    assert [int(word) for word in key.words] == list(KEY.words)
    y = unidrop.dropout(cupy.asarray(np.ones(50)), 0.3, key)
    assert np.array_equal(cupy.asnumpy(y), unidrop.dropout(np.ones(50), 0.3, KEY))


@pytest.mark.parametrize("devices", ["none", "no driver"])
def test_skips_the_backend_without_a_gpu(cupy, monkeypatch, devices):
    def count():
        if devices == "none":
            return 0
        raise cupy.cuda.runtime.CUDARuntimeError("cudaErrorInsufficientDriver: too old")

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", count)
    (backend,) = load_backends(["cupy"])
    assert backend.is_missing
    assert backend.error.startswith("CuPy finds no CUDA device")
    assert ("cudaErrorInsufficientDriver" in backend.error) == (devices == "no driver")
