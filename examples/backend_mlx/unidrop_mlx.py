"""Add MLX to unidrop and to its matrix: an array library and a backend.

This package is a worked example of docs/extending.md.
"""

from collections.abc import Mapping
from types import SimpleNamespace

import ml_dtypes
import mlx.core as mx
import numpy as np

from unidrop import Key, dropout
from unidrop.conformance import CoreBackend
from unidrop.protocols import ArrayLibrary, Arrays, Operator

__all__ = ["LIBRARY", "MlxBackend"]


def _ignore_device(function):
    """Accept and ignore the standard's ``device=``, since devices share the memory of arrays."""
    return lambda *args, device=None, **kwargs: function(*args, **kwargs)


class _Namespace(SimpleNamespace):
    """MLX functions by the standard's names; the attributes override MLX functions."""

    def __getattr__(self, name):
        return getattr(mx, name)


_NAMESPACE = _Namespace(
    __name__="mlx",
    __array_namespace_info__=lambda: SimpleNamespace(
        dtypes=lambda **_: {"int64": mx.int64, "uint32": mx.uint32}
    ),
    bool=mx.bool_,
    arange=_ignore_device(lambda stop, *, dtype: mx.arange(stop, dtype=dtype)),
    asarray=_ignore_device(mx.array),
    full=_ignore_device(mx.full),
    zeros=_ignore_device(mx.zeros),
    ones=_ignore_device(mx.ones),
    empty=_ignore_device(mx.zeros),
    astype=lambda x, dtype, *, copy=True: x.astype(dtype),
    bitwise_left_shift=mx.left_shift,
    bitwise_right_shift=mx.right_shift,
    concat=lambda arrays, *, axis=0: mx.concatenate(arrays, axis=axis),
)


class MlxArrays(Arrays):
    """MLX arrays, which are lazy."""

    def namespace(self, x):
        """Return MLX's functions by the standard's names."""
        return _NAMESPACE

    def device(self, x):
        """Return None: operations have devices, but arrays have none."""

    def is_traced(self, x):
        """Return True: MLX fuses what it records, so the core computes no pieces."""
        return True

    def is_mutable(self, x):
        """Return False: assigning to an item copies the array."""
        return False

    def complex(self, xp, real, imag):
        """Return complex numbers of the same bits; adding 1j * imag would create more NaN."""
        return mx.stack([real, imag], axis=-1).view(mx.complex64).reshape(real.shape)


class MlxOperator(Operator):
    """Dropout with a gradient that recomputes the mask."""

    def dropout(self, x, key, plan, mask=None):
        """Apply dropout as one function with a custom gradient."""
        function = mx.custom_function(lambda v: plan.run(v, key, mask))
        function.vjp(lambda primal, cotangent, output: plan.apply(cotangent, key))
        return function(x)


LIBRARY = ArrayLibrary(arrays=MlxArrays(), operator=MlxOperator())


class MlxBackend(CoreBackend):
    """MLX in eager and in compiled mode."""

    name = "mlx"
    xp = mx
    modes = ("eager", "compile")
    compiled_modes = ("compile",)
    capabilities: Mapping[str, str | None] = {
        **CoreBackend.core_capabilities,
        **dict.fromkeys(("gradient", "layouts", "traces")),
        "family": "this example calls dropout alone",
        "layer": "this example has no layer for mlx.nn",
        "layer_gradient": "this example has no layer for mlx.nn",
    }
    mode_exclusions: Mapping[str, Mapping[str, str]] = {"eager": {"traces": "no tracing"}}

    def __init__(self):
        self._compiled = {}
        self._traces = 0

    def dtypes(self, mode):
        """Return MLX's floating-point dtypes; it lacks complex128."""
        return ("float16", "bfloat16", "float32", "float64", "complex64")

    def from_numpy(self, x, device, mode):
        """Convert bit for bit; bfloat16 through integers, since MLX cannot read ml_dtypes."""
        if x.dtype == ml_dtypes.bfloat16:
            return mx.array(x.view(np.uint16)).view(mx.bfloat16)
        return mx.array(x, dtype=getattr(mx, "bool_" if x.dtype == bool else x.dtype.name))

    def to_numpy(self, y):
        """Convert to NumPy bit for bit."""
        if y.dtype == mx.bfloat16:
            return np.array(y.view(mx.uint16)).view(ml_dtypes.bfloat16)
        return np.array(y)

    def get_device(self, y):
        """Return the default device, since arrays have none."""
        return mx.default_device().type.name

    def dropout(self, x, p, seed, step, *, mode, **options):
        """Call the core; compiled code has the step as an argument."""
        if mode == "eager":
            return super().dropout(x, p, seed, step, mode=mode, **options)
        return self._run("dropout", p, options, x, *_key_and_step(seed, step))

    def gradient(self, x, upstream, p, seed, step, *, mode):
        """Pull the upstream gradient back."""
        if mode == "eager":
            key = Key(seed).fold_in(step)
            return mx.vjp(lambda x: dropout(x, p, key), [x], [upstream])[1][0]
        return self._run("gradient", p, {}, x, upstream, *_key_and_step(seed, step))

    def _run(self, name, p, options, *arrays):
        static = (name, p, type(p), tuple(options.items()))
        if static not in self._compiled:

            def traced(x, *rest):
                self._traces += 1
                *upstream, lo, hi, step = rest
                key = Key.from_words(lo, hi).fold_in(step)

                def drop(x):
                    return dropout(x, p, key, **options)

                return mx.vjp(drop, [x], upstream)[1][0] if upstream else drop(x)

            self._compiled[static] = mx.compile(traced)
        return self._compiled[static](*arrays)

    def layouts(self, x):
        """Return a transposed and a strided view."""
        axes = tuple(reversed(range(x.ndim)))
        doubled = mx.concatenate([x, x], axis=-1)
        return {
            "transposed": mx.contiguous(x.transpose(axes)).transpose(axes),
            "strided": mx.contiguous(doubled)[..., : x.shape[-1]],
        }

    def traces(self, mode):
        """Return the number of traces."""
        return self._traces


def _key_and_step(seed, step):
    """Return the words of a key, and a step, as arrays: changing them does not recompile."""
    lo, hi = Key(seed).words
    return mx.array(lo, mx.uint32), mx.array(hi, mx.uint32), mx.array(step, mx.uint64)
