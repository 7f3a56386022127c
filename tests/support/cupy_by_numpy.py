"""A stand-in for CuPy on two GPUs, made of NumPy, for tests on machines without a GPU.

It has CuPy's names and NumPy's values, and is at least as strict as CuPy. It never converts an
array to a NumPy array implicitly, nor combines the two. Operations return arrays, never scalars.
They run on the current device, and all their arrays must be there. The stand-in does not test
CuPy's kernels.
"""

import threading
from types import ModuleType, SimpleNamespace

import numpy as np

DEVICES = 2
_here = threading.local()


class Device:
    """A GPU, the current one in a ``with`` statement."""

    def __init__(self, device=None):
        current = _current()[-1]
        self.id = current if device is None else getattr(device, "id", device)
        if not 0 <= self.id < DEVICES:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def __enter__(self):
        _current().append(self.id)
        return self

    def __exit__(self, *error):
        _current().pop()


class CUDARuntimeError(RuntimeError):
    """What CuPy raises of CUDA's errors."""


def _current():
    """Return this thread's stack of current devices."""
    if not hasattr(_here, "devices"):
        _here.devices = [0]
    return _here.devices


class ndarray:  # noqa: N801 # CuPy's name
    """An array on a device."""

    def __init__(self, values):
        self._values = values
        self.device = Device()

    def __array__(self, *args, **options):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __dlpack_device__(self):
        return 2, self.device.id  # of CUDA

    def __getattr__(self, name):
        if name.startswith("__"):  # NumPy would reach the values through these
            raise AttributeError(name)
        value = getattr(self._values, name)
        return _on_device(value) if callable(value) else _arrays(value)

    def __setitem__(self, index, value):
        self._values[_values(index)] = _values(value)

    def __index__(self):
        return self._values.__index__()

    def __int__(self):
        return int(self._values)


def _on_device(function):
    """Return a function of NumPy's as one of arrays on the current device."""

    def on_device(*args, **options):
        return _arrays(function(*_values(args), **_values(options)))

    return on_device


def _values(x):
    """Return the values of arrays in any container; they must be on the current device."""
    if isinstance(x, ndarray):
        assert x.device.id == Device().id, "an array is not on the current device"
        return x._values
    if isinstance(x, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(x, dict):
        return {name: _values(value) for name, value in x.items()}
    return type(x)(map(_values, x)) if type(x) in (tuple, list) else x


def _arrays(y):
    """Return NumPy arrays and scalars as arrays of the stand-in."""
    if isinstance(y, np.ndarray | np.generic):
        return ndarray(np.asarray(y))
    return type(y)(map(_arrays, y)) if type(y) in (tuple, list) else y


_OPERATORS = "add radd sub mul rmul truediv and rand or ror xor rxor eq ge lt ne neg invert getitem"
for _name in _OPERATORS.split():
    setattr(ndarray, f"__{_name}__", _on_device(getattr(np.ndarray, f"__{_name}__")))


def asarray(x, dtype=None):
    """Copy values to the current device."""
    return ndarray(np.array(x._values if isinstance(x, ndarray) else x, dtype=dtype))


def asnumpy(x):
    """Copy from any device."""
    return x._values.copy()


def _module(name, members):
    module = ModuleType(name)
    vars(module).update(members)
    return module


def _of_numpy(source):
    """Return what a module of NumPy's has, of arrays on the current device."""
    members = {name: value for name, value in vars(source).items() if not name.startswith("_")}
    return {
        name: _on_device(value) if callable(value) and not isinstance(value, type) else value
        for name, value in members.items()
    }


ndarray.__module__ = "cupy"
_linalg = _module("cupy.linalg", _of_numpy(np.linalg))
_fft = _module("cupy.fft", _of_numpy(np.fft))
_runtime = SimpleNamespace(getDeviceCount=lambda: DEVICES, CUDARuntimeError=CUDARuntimeError)
_device = _module("cupy.cuda.device", {"Device": Device})
_cuda = _module("cupy.cuda", {"Device": Device, "device": _device, "runtime": _runtime})
_own = {"ndarray": ndarray, "asarray": asarray, "asnumpy": asnumpy}
_cupy = _module("cupy", _of_numpy(np) | _own | {"linalg": _linalg, "fft": _fft, "cuda": _cuda})

#: The modules of the stand-in, by name.
MODULES = {module.__name__: module for module in (_cupy, _linalg, _fft, _cuda, _device)}
