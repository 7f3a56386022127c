"""Run the Keras layer in every mode of the Keras backend that this process has.

Keras has one backend per process, so `subprocess_backends` runs the others in their own processes.
"""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from threading import get_ident
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from unidrop.adapters import keras as adapter
from unidrop.adapters.keras import Dropout
from unidrop.conformance import FUSED, eager_modes, missing_eager_modes, use_mode_path
from unidrop.conformance.backends.keras_attention import AttentionOfVector, pack, unpack
from unidrop.conformance.backends.keras_modes import (
    DERIVED,
    EXCLUSIONS,
    FIT_EXCLUSIONS,
    FIT_MODES,
    MISSING,
    REMAT_SCOPE,
    compiled_modes,
    get_scope,
    make_runner,
    make_tensor,
    torch_graphs,
)
from unidrop.conformance.family import MEMBERS

__all__ = ["Keras"]

_NO_GRADIENT = "Keras has no gradients on NumPy"


class Keras:
    """The Keras layer, with its call number as the step."""

    name = "keras"
    devices = ("cpu",)
    step_limit = 1 << 31
    capabilities: Mapping[str, str | None] = {
        **dict.fromkeys(("broadcast_axes", "gradient", "layer", "layer_gradient", "traces")),
        **dict.fromkeys(("family", "family_gradient")),
        **dict.fromkeys(("attention", "attention_gradient")),
        "attention_windows": "a Keras layer has no windows",
        "windows": "a Keras layer has no windows",
        "mask": "a Keras layer returns only its output",
        "words": "the backends of the frameworks test the words",
        "key": "the core folds the layer's key",
        "traced_key": "the layer has no step but its call number",
        "layouts": "Keras has no strides; the backends of the frameworks test layouts",
    }
    members: Mapping[str, str | None] = MappingProxyType(dict.fromkeys(MEMBERS))

    def __init__(self) -> None:
        self._backend = keras.backend.backend()
        self.compiled_modes = compiled_modes()
        self.derived_modes = DERIVED.get(self._backend, {})
        fits = FIT_MODES[self._backend]
        ones = keras.ops.ones(1)
        self.modes = tuple(dict.fromkeys((*eager_modes(ones), *self.compiled_modes, *fits)))
        self.missing_modes = {**MISSING[self._backend], **missing_eager_modes(ones)}
        if self._backend == "numpy":
            names = "gradient", "layer_gradient", "attention_gradient", "family_gradient"
            lacking = dict.fromkeys(names, _NO_GRADIENT)
            self.capabilities = {**self.capabilities, **lacking}
        else:
            self.modes = (*self.modes, REMAT_SCOPE)
        exclusions = {**dict.fromkeys(fits, FIT_EXCLUSIONS), **EXCLUSIONS[self._backend]}
        if FUSED in self.modes:
            exclusions.setdefault("eager", {"attention": "it differs from fused in the mask only"})
        self.mode_exclusions = {mode: exclusions[mode] for mode in self.modes if mode in exclusions}
        if not self.compiled_modes:
            self.capabilities = {**self.capabilities, "traces": "no mode compiles"}
        self._traces = 0
        self._runners: dict[Any, Any] = {}

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return the dtypes of Keras's dtype policies."""
        if self._backend == "torch" and mode == "fit":
            # Keras's torch trainer converts bfloat16 to float32 and back, which changes NaN bits.
            return ("float16", "float32", "float64")
        narrow = ("float16", "bfloat16", "float32")
        # JAX has float64 only if x64 is enabled.
        return narrow if self._backend == "jax" else (*narrow, "float64")

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Convert to a tensor of the Keras backend."""
        return make_tensor(x)

    def to_numpy(self, y: Any) -> NDArray[Any]:
        """Convert to a NumPy array."""
        name = keras.backend.standardize_dtype(y.dtype)
        # Keras cannot convert TensorFlow bfloat16 scalars.
        plain = y.numpy() if self._backend == "tensorflow" else keras.ops.convert_to_numpy(y)
        return np.array(plain, dtype=_numpy_dtype(name))

    def get_device(self, y: Any) -> str:
        """Return the only device, since Keras has no API to choose one."""
        return "cpu"

    def dropout(
        self,
        x: Any,
        p: Any,
        seed: int,
        step: int,
        *,
        mode: str,
        training: bool = True,
        broadcast_axes: tuple[int, ...] = (),
        **options: Any,
    ) -> Any:
        """Call a layer with its call number set to the step."""
        rank = len(x.shape)
        shared = {axis % rank for axis in broadcast_axes}
        if shared:
            options["noise_shape"] = tuple(1 if axis in shared else None for axis in range(rank))
        runner = self._cached_runner(p, seed, x, mode, **options)
        runner.calls = step
        try:
            with use_mode_path(mode):
                return runner(x, training=training)
        except BaseException:
            # Keras on JAX may leave the layer without its state.
            self._runners = {key: r for key, r in self._runners.items() if r is not runner}
            raise

    def _cached_runner(
        self, p: Any, seed: int, x: Any, mode: str, *, member: str = "dropout", **options: Any
    ) -> Any:
        # The call number is state of a layer, so threads must not share layers.
        dtype = keras.backend.standardize_dtype(x.dtype)
        key = (p, type(p), seed, member, tuple(options.items()), dtype, mode, get_ident())
        if key not in self._runners:
            policy = dtype if dtype in self.dtypes("eager") else "float32"
            with self.scope(mode):
                options |= {"seed": seed, "dtype": policy, "autocast": False}
                layer = _make_layer(member, p, options)
            self._runners[key] = self.make_runner(layer, mode)
        return self._runners[key]

    def scope(self, mode: str) -> AbstractContextManager[Any]:
        """Return the context that creates a mode's layers."""
        return get_scope(mode)

    def make_runner(self, layer: Dropout, mode: str) -> Any:
        """Return an object that runs a layer in a mode."""
        return make_runner(layer, mode, self.count_trace)

    def count_trace(self) -> None:
        """Count one trace."""
        self._traces += 1

    def traces(self, mode: str) -> int:
        """Return the number of traces in all modes."""
        return torch_graphs() if self._backend == "torch" else self._traces

    def gradient(
        self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str, **options: Any
    ) -> Any:
        """Differentiate a call of the layer."""
        runner = self._cached_runner(p, seed, x, mode, **options)
        runner.calls = step
        with use_mode_path(mode):
            _, pullback = runner.vjp(x)
            return pullback(upstream)

    def attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        p: float,
        seed: int,
        step: int,
        *,
        mode: str,
        **options: Any,
    ) -> Any:
        """Call a layer whose projections are identities, with its call number set to the step."""
        inputs = query, key, value
        runner = self._attention_runner(inputs, p, seed, mode, **options)
        runner.calls = step
        with use_mode_path(mode):
            return runner(pack(inputs), training=True)

    def attention_gradient(
        self,
        query: Any,
        key: Any,
        value: Any,
        upstream: Any,
        p: float,
        seed: int,
        step: int,
        *,
        mode: str,
        **options: Any,
    ) -> Any:
        """Differentiate a call of the layer."""
        inputs = query, key, value
        runner = self._attention_runner(inputs, p, seed, mode, **options)
        runner.calls = step
        with use_mode_path(mode):
            _, pullback = runner.vjp(pack(inputs))
            return unpack(pullback(upstream), [tuple(x.shape) for x in inputs])

    def _attention_runner(
        self,
        inputs: tuple[Any, ...],
        p: float,
        seed: int,
        mode: str,
        mask: Any = None,
        is_causal: bool = False,
    ) -> Any:
        dtype = keras.backend.standardize_dtype(inputs[0].dtype)
        shapes = tuple(tuple(x.shape) for x in inputs)
        key = ("attention", shapes, p, seed, is_causal, dtype, mode)
        if mask is not None or key not in self._runners:
            pairs = None if mask is None else keras.ops.squeeze(mask, 1)
            layer = AttentionOfVector(shapes, p, seed, pairs, is_causal, dtype)
            runner = self.make_runner(layer, mode)
            if mask is not None:
                return runner
            self._runners[key] = runner
        return self._runners[key]

    def layer(self, p: float, seed: int, *, dtype: str, device: str, mode: str) -> "_Model":
        """Return a layer in a model that saves its weights."""
        with self.scope(mode):
            layer = Dropout(p, seed=seed, dtype=dtype, autocast=False)
        return _Model(layer, self.make_runner(layer, mode), mode)


def _make_layer(member: str, p: Any, options: dict[str, Any]) -> Dropout:
    """Return a layer of a member of the family."""
    if member == "feature_alpha_dropout":
        member, options["noise_shape"] = "alpha_dropout", (None, None, 1)  # of three axes
    if member == "locked_dropout":
        axis = options.pop("axis")
        member, options["noise_shape"] = (
            "dropout",
            tuple(1 if i == axis else None for i in range(3)),
        )
    if member == "drop_block":
        del options["axes"]
        member, options["data_format"] = "drop_block2D", "channels_first"
    kind = "".join(f"{word[:1].upper()}{word[1:]}" for word in member.split("_"))
    layer: Dropout = getattr(adapter, kind)(p, **options)
    return layer


class _Model:
    """A model of one layer, which saves and loads the layer's state."""

    def __init__(self, layer: Dropout, runner: Any, mode: str) -> None:
        self._model = keras.Sequential([keras.Input((None,)), layer])
        self._runner = runner
        self._mode = mode

    @property
    def calls(self) -> int:
        calls: int = self._runner.calls
        return calls

    @calls.setter
    def calls(self, value: int) -> None:
        self._runner.calls = value

    def __call__(self, x: Any, *, training: bool) -> Any:
        with use_mode_path(self._mode):
            return self._runner(x, training=training)

    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        with use_mode_path(self._mode):
            y, pullback = self._runner.vjp(x)
        return y, lambda upstream: self._pull_back(pullback, upstream)

    def _pull_back(self, pullback: Callable[[Any], Any], upstream: Any) -> Any:
        with use_mode_path(self._mode):
            return pullback(upstream)

    def save(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.weights.h5")
            self._model.save_weights(path)
            return path.read_bytes()

    def load(self, state: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.weights.h5")
            path.write_bytes(state)
            self._model.load_weights(path)


def _numpy_dtype(name: str) -> Any:
    if name != "bfloat16":
        return name
    import ml_dtypes

    return ml_dtypes.bfloat16
