"""Run a Keras layer in each mode: eager, compiled by its backend, or in a model's `fit`."""

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from unidrop.adapters.keras import Dropout

__all__ = [
    "DERIVED",
    "EXCLUSIONS",
    "FIT_EXCLUSIONS",
    "FIT_MODES",
    "MISSING",
    "REMAT_SCOPE",
    "EagerRunner",
    "compiled_modes",
    "get_scope",
    "make_runner",
    "make_tensor",
    "torch_graphs",
]

#: The modes that train a model, by Keras backend.
FIT_MODES: Mapping[str, tuple[str, ...]] = {
    "tensorflow": ("fit", "fit XLA"),
    "jax": ("fit",),
    "torch": ("fit",),
    "numpy": (),
}

#: The mode of a layer that is created inside `keras.RematScope`.
REMAT_SCOPE = "RematScope"

#: Exclusions of modes that train a model.
FIT_EXCLUSIONS: Mapping[str, str] = {
    "family": "the only example of a batch has one decision",
    **dict.fromkeys(("gradient", "layer_gradient"), "fit does not return gradients"),
    "attention": "the matrix fits models of one layer and one input",
}

# Each of these contracts trains one or two models, and XLA compiles a whole training step.
_FIT_XLA_EXCLUSIONS = dict.fromkeys(
    ("layer-resumes", "layer-traces", "step-keys", "threads"), "fit and XLA cover this"
)

_WRAPPED_ERROR = "Dynamo cannot trace how Keras rewords errors of layers, and raises its own error"
_LOST_STATE = "Keras on JAX detaches a model's state in fit, and an error leaves it detached"

_SAME_PROGRAMS = {"attention": "it compiles the same operations as jit"}
_FLOAT32_ATTENTION = {"attention-output": "Keras's einsum of NumPy computes in float32"}
_OUTER_LAYER = {"attention": "the matrix creates the layer outside of the scope"}

_OUTER_REMAT = "RematScope around a layer of layers"
_UNKNOWN_RECOMPUTATION = (
    "Keras recomputes the outer layer without telling the inner ones, so a dropout layer inside "
    "counts another training call; keras.layers.Dropout draws another mask too"
)

#: The modes that Keras has and the layer does not support, by Keras backend.
MISSING: Mapping[str, Mapping[str, str]] = {
    "tensorflow": {
        _OUTER_REMAT: _UNKNOWN_RECOMPUTATION,
        "recompute_grad around a layer": _UNKNOWN_RECOMPUTATION,
    },
    "jax": {
        _OUTER_REMAT: "Keras passes training through jax.checkpoint, and no layer can branch on "
        "its tracer; keras.layers.Dropout raises too"
    },
    "torch": {_OUTER_REMAT: _UNKNOWN_RECOMPUTATION},
    "numpy": {"fit": "Keras has no gradients on NumPy"},
}

#: The compiled modes that wrap another mode in training, by Keras backend.
DERIVED: Mapping[str, Mapping[str, str]] = {
    "tensorflow": {"fit": "tf.function", "fit XLA": "XLA"},
    "jax": {"fit": "jit"},
}

#: Exclusions of modes, by Keras backend.
EXCLUSIONS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "tensorflow": {
        "XLA": {"attention": "tf.function has the same graph"},
        "fit": FIT_EXCLUSIONS,
        "fit XLA": {**FIT_EXCLUSIONS, **_FIT_XLA_EXCLUSIONS},
        REMAT_SCOPE: _OUTER_LAYER,
    },
    "jax": {
        "eager": {"traces": "JAX compiles single operations in eager mode", **_SAME_PROGRAMS},
        "fused": _SAME_PROGRAMS,
        REMAT_SCOPE: _OUTER_LAYER,
        "fit": {**FIT_EXCLUSIONS, "layer-error": _LOST_STATE},
    },
    "torch": {
        "torch.compile": {
            **dict.fromkeys(("bad-dtype", "layer-error"), _WRAPPED_ERROR),
            "attention": "the torch backend compiles attention",
        },
        REMAT_SCOPE: _OUTER_LAYER,
    },
    "numpy": {"eager": _FLOAT32_ATTENTION, "fused": _FLOAT32_ATTENTION},
}


def compiled_modes() -> tuple[str, ...]:
    """Return the modes that trace a function or a model on this process's Keras backend."""
    backend = keras.backend.backend()
    fits = () if backend == "torch" else FIT_MODES[backend]
    # In eager mode, JAX compiles each operation for each shape too.
    eager = ("eager",) if backend == "jax" else ()
    return (*eager, *_COMPILED_RUNNERS.get(backend, {}), *fits)


def get_scope(mode: str) -> AbstractContextManager[Any]:
    """Return the context that creates a mode's layers."""
    return keras.RematScope("full") if mode == REMAT_SCOPE else nullcontext()


def make_runner(layer: Dropout, mode: str, count_trace: Callable[[], None]) -> Any:
    """Return an object that runs a layer in a mode and reports each trace."""
    backend = keras.backend.backend()
    if mode in FIT_MODES[backend]:
        return _FitRunner(layer, count_trace, jit_compile=mode == "fit XLA" or "auto")
    eager = _EAGER_RUNNERS.get(backend, EagerRunner)
    runner = _COMPILED_RUNNERS.get(backend, {}).get(mode, eager)
    return runner(layer, count_trace)


def torch_graphs() -> int:
    """Return the number of graphs that torch.compile has compiled, from torch's own counter."""
    import torch._dynamo.utils

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def make_tensor(x: NDArray[Any]) -> Any:
    """Convert an array bit for bit; Keras on torch would convert bfloat16 through float32."""
    if keras.backend.backend() != "torch" or x.dtype.name != "bfloat16":
        return keras.ops.convert_to_tensor(x, dtype=x.dtype.name)
    import torch

    return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)


class EagerRunner:
    """Call a layer directly, on any Keras backend."""

    def __init__(self, layer: Dropout, count_trace: Callable[[], None]) -> None:
        self._layer = layer
        self._count_trace = count_trace

    @property
    def calls(self) -> int:
        """The layer's call number."""
        return self._layer.calls

    @calls.setter
    def calls(self, value: int) -> None:
        self._layer.calls = value

    def __call__(self, x: Any, *, training: bool) -> Any:
        """Call the layer."""
        return self._layer(x, training=training)


class _TensorFlowRunner(EagerRunner):
    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            y = self(x, training=True)
        return y, lambda upstream: tape.gradient(y, x, upstream)


class _FunctionRunner(_TensorFlowRunner):
    jit_compile = False

    def __init__(self, layer: Dropout, count_trace: Callable[[], None]) -> None:
        import tensorflow as tf

        super().__init__(layer, count_trace)
        self._run = tf.function(self._traced, jit_compile=self.jit_compile)

    def _traced(self, x: Any, training: bool) -> Any:
        self._count_trace()
        return self._layer(x, training=training)

    def __call__(self, x: Any, *, training: bool) -> Any:
        return self._run(x, training)


class _XlaRunner(_FunctionRunner):
    jit_compile = True


class _TorchRunner(EagerRunner):
    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        import torch

        x = x.detach().requires_grad_()
        y = self(x, training=True)
        return y.detach(), lambda upstream: torch.autograd.grad(y, x, upstream)[0]


_numbers = itertools.count()


class _TorchCompileRunner(_TorchRunner):
    """A layer under `torch.compile` in one graph."""

    def __init__(self, layer: Dropout, count_trace: Callable[[], None]) -> None:
        import torch

        super().__init__(layer, count_trace)
        # Keras records attributes at a layer's first call, which would retrace the second.
        axes = getattr(layer.input_spec, "ndim", None)
        layer(keras.Input((8,) * (axes - 1) if axes else (None,)))
        # The matrix has a hundred layers. By default, Dynamo stops compiling after eight.
        torch._dynamo.config.recompile_limit = 1 << 20

        def run(x: Any, training: bool) -> Any:
            return layer(x, training=training)

        # Each layer has its own code object and name. Otherwise Dynamo would search the graphs of
        # other layers, and take differences between layers for dynamic values.
        code = run.__code__.replace(co_name=f"run_{next(_numbers)}")
        function = FunctionType(code, run.__globals__, closure=run.__closure__)
        self._run = torch.compile(function, fullgraph=True)

    def __call__(self, x: Any, *, training: bool) -> Any:
        return self._run(x, training)


class _JaxRunner(EagerRunner):
    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        import jax

        y, pullback = jax.vjp(lambda x: self(x, training=True), x)
        return y, lambda upstream: pullback(upstream)[0]


class _JitRunner(_JaxRunner):
    """A stateless call under `jax.jit`, with the state as an argument and a result."""

    def __init__(self, layer: Dropout, count_trace: Callable[[], None]) -> None:
        import jax

        super().__init__(layer, count_trace)
        self._run = jax.jit(self._traced, static_argnums=2)

    def _traced(self, state: Any, x: Any, training: bool) -> Any:
        self._count_trace()
        return self._layer.stateless_call([], state, x, training=training)

    def __call__(self, x: Any, *, training: bool) -> Any:
        return self._assign_state(*self._run(self._state(), x, training))

    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        import jax

        state = self._state()
        y, pullback, new = jax.vjp(lambda x: self._run(state, x, True), x, has_aux=True)
        return self._assign_state(y, new), lambda upstream: pullback(upstream)[0]

    def _state(self) -> list[Any]:
        return [variable.value for variable in self._layer.non_trainable_variables]

    def _assign_state(self, y: Any, state: list[Any]) -> Any:
        for variable, value in zip(self._layer.non_trainable_variables, state, strict=True):
            variable.assign(value)
        return y


_EAGER_RUNNERS: Mapping[str, type[EagerRunner]] = {
    "tensorflow": _TensorFlowRunner,
    "jax": _JaxRunner,
    "torch": _TorchRunner,
}
_COMPILED_RUNNERS: Mapping[str, Mapping[str, type[EagerRunner]]] = {
    "tensorflow": {"tf.function": _FunctionRunner, "XLA": _XlaRunner},
    "jax": {"jit": _JitRunner},
    "torch": {"torch.compile": _TorchCompileRunner},
}


class _Recorder(keras.layers.Layer):
    """Store the inputs of training calls, and report each trace."""

    def __init__(self, count_trace: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self._count_trace = count_trace

    def build(self, input_shape: tuple[int, ...]) -> None:
        # JAX would compile random initial values for each shape, which takes a second.
        shape = (1, *input_shape[1:])
        self.recorded = self.add_weight(shape, "zeros", trainable=False, name="recorded")

    def call(self, inputs: Any, training: bool = False) -> Any:
        if training:
            self._count_trace()
            self.recorded.assign(inputs)
        return inputs


class _Scale(keras.layers.Layer):
    """A trainable weight, since `fit` requires one."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, inputs: Any) -> Any:
        return inputs * self.scale


class _Batch(keras.utils.PyDataset):
    """A dataset of one batch."""

    def __init__(self, *batch: Any) -> None:
        super().__init__()
        self._batch = batch

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self._batch


def _make_dataset(batch: Any) -> Any:
    """Return a dataset for `fit`; on TensorFlow a `tf.data` one, which saves a conversion."""
    inputs_and_targets = batch, batch  # the targets do not matter
    if keras.backend.backend() != "tensorflow":
        return _Batch(*inputs_and_targets)
    import tensorflow as tf

    return tf.data.Dataset.from_tensors(inputs_and_targets)


class _FitRunner(EagerRunner):
    """Train a model for one step with x as the only example, and return the layer's output."""

    def __init__(
        self, layer: Dropout, count_trace: Callable[[], None], jit_compile: bool | str
    ) -> None:
        super().__init__(layer, count_trace)
        self._jit_compile = jit_compile
        self._models: dict[Any, tuple[Any, Any]] = {}

    def __call__(self, x: Any, *, training: bool) -> Any:
        batch = x[None]
        form = (tuple(batch.shape), batch.dtype)
        if form not in self._models:
            self._models[form] = self._make_model(batch)
        model, recorder = self._models[form]
        if not training:
            # Training on NaN made the scale NaN, which must not change the prediction.
            model.layers[-1].scale.assign(1)
            y = make_tensor(model.predict(_make_dataset(batch), verbose=0))
        else:
            model.fit(_make_dataset(batch), shuffle=False, verbose=0)
            y = keras.ops.copy(recorder.recorded.value)
        return y[0]

    def _make_model(self, batch: Any) -> tuple[Any, Any]:
        dtype = keras.backend.standardize_dtype(batch.dtype)
        policy = dtype if "float" in dtype else None
        recorder = _Recorder(self._count_trace, dtype=policy)
        example = keras.Input(batch.shape[1:], dtype=dtype)
        model = keras.Sequential([example, self._layer, recorder, _Scale(dtype=policy)])
        model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=self._jit_compile)
        return model, recorder
