"""Run the TensorFlow function in every mode of TensorFlow, from eager to a SavedModel."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any
from unittest.mock import patch

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from unidrop import Key
from unidrop import dropout as core_dropout
from unidrop.adapters import tensorflow as adapter
from unidrop.adapters.tensorflow import xla
from unidrop.conformance import (
    CoreBackend,
    eager_modes,
    missing_eager_modes,
    use_mode_path,
)
from unidrop.library import get_namespace_library
from unidrop.philox import philox

__all__ = ["TensorFlow"]

_UNKNOWN = "unknown dimensions"
_XLA = "XLA"
_RECOMPUTED = "recompute_grad"
_SAVED = "SavedModel"
_LARGE = "large"
_COMPILED = ("tf.function", _UNKNOWN, _LARGE, _XLA, _RECOMPUTED, _SAVED)

_LOCK = RLock()


class TensorFlow(CoreBackend):
    """TensorFlow on the CPU."""

    name = "tensorflow"
    xp = tf
    compiled_modes = _COMPILED
    capabilities: Mapping[str, str | None] = {
        **CoreBackend.core_capabilities,
        **dict.fromkeys(("gradient", "family_gradient", "traces")),
        "layer": "TensorFlow has no layers; the keras backend has",
        "layouts": "TensorFlow tensors have no strides",
    }

    derived_modes: Mapping[str, str] = {
        _SAVED: _UNKNOWN,
        _RECOMPUTED: "tf.function",
    }
    mode_exclusions: Mapping[str, Mapping[str, str]] = {
        _LARGE: {
            "words": "programs for large tensors compute dropout only",
            "traced_key": "programs for large tensors compute dropout only",
        },
        _SAVED: {
            "words": "the SavedModel contains dropout only",
            "traced_key": "the SavedModel contains dropout only",
        },
        _RECOMPUTED: {
            "words": "words have no gradient to recompute",
            "traced_key": "keys have no gradient to recompute",
        },
    }

    def __init__(self) -> None:
        # TensorFlow would warn in the middle of the table that contracts retrace.
        tf.get_logger().setLevel("ERROR")
        self.modes = (*eager_modes(tf.ones(1)), *_COMPILED)
        self.missing_modes = missing_eager_modes(tf.ones(1))
        self._traces = 0
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return TensorFlow's floating-point and complex dtypes."""
        real = ("float16", "bfloat16", "float32", "float64")
        # tf.recompute_grad computes a maximum of the upstream gradient, and so rejects complex
        # numbers.
        return real if mode == _RECOMPUTED else (*real, "complex64", "complex128")

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Convert to a tensor."""
        with tf.device(device):
            return tf.constant(x)

    def to_numpy(self, y: Any) -> NDArray[Any]:
        """Convert to a NumPy array."""
        return np.array(y.numpy(), dtype=y.dtype.as_numpy_dtype)

    def get_device(self, y: Any) -> str:
        """Return the device's type."""
        return str(tf.DeviceSpec.from_string(y.device).device_type).lower()

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call the function, or the core for options that it lacks."""
        if mode not in _COMPILED:
            with use_mode_path(mode):
                return _call(x, p, Key(seed).fold_in(step), options)
        # The seed is an argument, so that calls with different seeds share a program.
        static = (mode, p, type(p), tuple(options.items()), x.dtype, _known_shape(x, mode, options))
        if static not in self._compiled:
            self._compiled[static] = self._compile(
                lambda x, seed, step: self._traced(x, p, seed, step, options), x, mode, options
            )
        with _use_programs(mode):
            return self._compiled[static](x, _split_words(seed), tf.constant(step, tf.uint64))

    def _traced(self, x: Any, p: Any, seed: Any, step: Any, options: dict[str, Any]) -> Any:
        self._traces += 1
        return _call(x, p, Key.from_words(seed[0], seed[1]).fold_in(step), options)

    def _compile(
        self, run: Callable[..., Any], x: Any, mode: str, options: Mapping[str, Any]
    ) -> Callable[..., Any]:
        """Compile a function in a mode; a SavedModel without options includes its gradients."""
        signature = [
            tf.TensorSpec(_known_shape(x, mode, options), x.dtype),
            tf.TensorSpec((2,), tf.int64),
            tf.TensorSpec((), tf.uint64),
        ]
        if mode == _RECOMPUTED:
            run = tf.recompute_grad(run)
        compiled: Callable[..., Any]
        compiled = tf.function(
            run, input_signature=signature, jit_compile=mode == _XLA, autograph=False
        )
        return _save_and_load(compiled, not options) if mode == _SAVED else compiled

    def words(self, counter: Sequence[int], key: Sequence[int], *, mode: str) -> list[int]:
        """Run the generator in a mode, with the words as arguments."""
        if mode not in _COMPILED:
            return super().words(counter, key, mode=mode)
        # Masks and keys have constant upper words in their counters.
        upper = tuple(counter[2:]) if counter[2] == 0 else ()
        static = ("words", mode, upper)
        if static not in self._compiled:

            def run(words: Any) -> Any:
                *lower, lo, hi = tf.unstack(words)
                if upper:
                    return self._run_generator((*lower, *upper), (lo, hi))
                c0, c1, c2, c3 = (word[None] for word in lower)
                library, xp = get_namespace_library(tf)
                return philox((c0, c1, c2, c3), (lo, hi), library.words.arithmetic(xp, None))

            self._compiled[static] = self._function(run, mode)
        words = tf.constant((*counter[: 4 - len(upper)], *key), tf.int64)
        return [int(word[0]) for word in self._compiled[static](words)]

    def traced_key(self, seed: int, step: int, *, mode: str) -> int:
        """Fold in a step in a mode."""
        lo, hi = self._function(self._fold_in, mode)(seed, tf.constant(step, tf.int32))
        return int(hi) << 32 | int(lo)

    def _function(self, run: Callable[..., Any], mode: str) -> Callable[..., Any]:
        """Return a `tf.function`, or the function itself in eager modes."""
        if mode not in _COMPILED:
            return run
        function: Callable[..., Any] = tf.function(run, jit_compile=mode == _XLA, autograph=False)
        return function

    def traces(self, mode: str) -> int:
        """Return the number of traces in all modes."""
        return self._traces

    def gradient(
        self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str, **options: Any
    ) -> Any:
        """Differentiate with a tape: around a SavedModel, inside the function in other modes."""
        if mode == _SAVED:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = self.dropout(x, p, seed, step, mode=mode, **options)
            return tape.gradient(y, x, upstream)

        def run(x: Any, upstream: Any, seed: Any, step: Any) -> Any:
            def forward(x: Any) -> Any:
                return _call(x, p, Key.from_words(seed[0], seed[1]).fold_in(step), options)

            with tf.GradientTape() as tape:
                tape.watch(x)
                y = (tf.recompute_grad(forward) if mode == _RECOMPUTED else forward)(x)
            return tape.gradient(y, x, upstream)

        static = ("gradient", mode, p, tuple(options.items()), x.dtype, tuple(x.shape))
        if static not in self._compiled:
            self._compiled[static] = self._function(run, mode)
        with use_mode_path(mode), _use_programs(mode):
            return self._compiled[static](x, upstream, _split_words(seed), tf.constant(step))


def _known_shape(x: Any, mode: str, options: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the static shape of a tensor in a mode."""
    if mode not in (_UNKNOWN, _LARGE, _SAVED):
        return tuple(x.shape)
    if options.get("member") in ("drop_block", "patch_dropout"):  # which need the other lengths
        return (None, *tuple(x.shape)[1:])
    return (None,) * int(x.shape.rank)


@contextmanager
def _use_programs(mode: str) -> Iterator[None]:
    """Let a graph treat small tensors as large ones in the mode of those."""
    if mode != _LARGE:
        yield
        return
    with _LOCK, patch.object(xla, "LEAST", 0):
        yield


def _split_words(number: int) -> Any:
    """Return the low and the high word of a number."""
    return tf.constant((number & 0xFFFFFFFF, number >> 32), tf.int64)


def _save_and_load(function: Callable[..., Any], gradients: bool) -> Callable[..., Any]:
    """Save a function as a SavedModel and load it."""
    module = tf.Module()
    module.run = function
    with tempfile.TemporaryDirectory() as folder:
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=gradients)
        tf.saved_model.save(module, folder, options=options)
        loaded = tf.saved_model.load(folder)
    run: Callable[..., Any] = loaded.run
    return run


def _call(x: Any, p: Any, key: Key, options: dict[str, Any]) -> Any:
    """Call a function of the family, or the core for options that it lacks."""
    options = dict(options)
    member = options.pop("member", "dropout")
    if member == "feature_alpha_dropout":
        member, options["noise_shape"] = "alpha_dropout", (None, None, *(1,) * (x.shape.rank - 2))
    if options.keys() & {"broadcast_axes", "training"}:
        return core_dropout(x, p, key, **options)
    return getattr(adapter, member)(x, p, key=key, **options)
