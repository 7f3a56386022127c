"""NumPy arrays of many bits and layouts, and their outputs by kernels and by the specification."""

import importlib
import itertools
import math
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import reference

import unidrop
from unidrop import Key

pytest.importorskip("llvmlite", reason="without llvmlite there are no kernels to test")

FUSED = importlib.import_module("unidrop.fused")

KEY = Key(42).fold_in("encoder/0").fold_in(7)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    name: np.dtype(name) for name in ("float16", "float32", "float64", "complex64", "complex128")
} | {"bfloat16": BFLOAT16}
RATES = [2.0**-40, 0.1, 0.5, 0.9, 1 - 2.0**-20, 1]


def rng(*seed):
    """Return a generator of NumPy."""
    return np.random.default_rng(seed)


def random_patterns(shape, name, seed=0):
    """Return an array of random bits: NaN, infinities, zeros and subnormals are among them."""
    dtype = DTYPES[name]
    x = np.frombuffer(rng(seed).bytes(math.prod(shape) * dtype.itemsize), dtype).copy()
    components = x.view(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else x
    special = [0.0, -0.0, np.nan, np.inf, -np.inf]
    components[: 5 * (components.size // 5)][:5] = special[: 5 * (components.size // 5)]
    bits = components.view(f"u{components.dtype.itemsize}")
    bits[5::7] &= np.array(3, bits.dtype)  # subnormals and zeros
    return x.reshape(shape)


def values(shape, name="float32"):
    """Return ordinary values, all different as far as the dtype allows, not 0."""
    x = np.arange(1, math.prod(shape) + 1, dtype="float64").reshape(shape)
    return (x - 1j * x if name.startswith("complex") else x).astype(DTYPES[name])


def patterns(x):
    """Return the bit patterns of an array's components, in logical order, one NaN for all."""
    x = np.ascontiguousarray(x).reshape(-1)
    form = reference.component_format(x.dtype.name)
    if x.dtype.kind == "c":
        x = x.view(f"f{x.dtype.itemsize // 2}")
    bits = x.view(f"u{x.dtype.itemsize}").copy()
    magnitude = bits & np.array(form.sign - 1, bits.dtype)
    bits[magnitude > form.infinity] = form.nan
    return bits


def assert_bits(y, expected):
    """Compare two arrays of NumPy: shape, dtype and each bit, but for NaN's payload and sign."""
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    np.testing.assert_array_equal(patterns(y), patterns(expected))


def portable(x, p, key=KEY, **options):
    """Return the output of NumPy's operations on a C-contiguous copy."""
    with unidrop.force_path("portable"):
        return unidrop.dropout(np.array(x, order="C", subok=False), p, key, **options)


def fused(x, p, key=KEY, **options):
    """Return the output of kernels, which must take the array."""
    with unidrop.force_path("fused"):
        return unidrop.dropout(x, p, key, **options)


def specified(x, p, key=KEY, **options):
    """Return the specification's output, which shares no code with the package."""
    keep = reference.keep_mask(x.shape, p, int(key), **options)
    shape = reference.mask_shape(x.shape, options.get("broadcast_axes", ()))
    keep = np.broadcast_to(np.reshape(keep, shape), x.shape).reshape(-1)
    flat = np.array(x, order="C").reshape(-1)
    components = flat.view(f"f{x.dtype.itemsize // 2}") if x.dtype.kind == "c" else flat
    bits = components.view(f"u{components.dtype.itemsize}")
    wanted = reference.dropout_bits(bits.tolist(), x.dtype.name, keep.tolist(), p)
    return np.asarray(wanted, bits.dtype).view(x.dtype).reshape(x.shape)


def laid_out(x, order):
    """Return a copy of an array with its axes in an order in memory, outermost first."""
    inverse = np.argsort(order)
    return np.ascontiguousarray(x.transpose(order)).transpose(inverse)


def subsets(ndim):
    """Return all sets of axes."""
    return [axes for n in range(ndim + 1) for axes in itertools.combinations(range(ndim), n)]


def get_output(program, cwd=None, **environment):
    """Return the lines that a program prints in a new process."""
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()
