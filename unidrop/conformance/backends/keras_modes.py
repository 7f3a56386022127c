"""How a Keras layer is run: at once, compiled as its backend compiles, or by a model's `fit`."""

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
    "FITS",
    "LIMITS",
    "MISSING",
    "REMATERIALISED",
    "UNFIT",
    "AtOnce",
    "compiled_modes",
    "get_scope",
    "graphs",
    "made_in_mode",
    "make_tensor",
]

#: The modes that train a model, by the backend.
FITS: Mapping[str, tuple[str, ...]] = {
    "tensorflow": ("fit", "fit XLA"),
    "jax": ("fit",),
    "torch": ("fit",),
}

#: The mode of a layer that is made where Keras is asked to compute activations again.
REMATERIALISED = "RematScope"

_OWN = "fit takes the gradients itself, and gives none away"

#: What does not apply where a model is trained.
UNFIT: Mapping[str, str] = dict.fromkeys(("gradient", "layer_gradient"), _OWN)

# Each takes a model or two, of which XLA compiles the whole training step.
_OF_FIT = dict.fromkeys(
    ("layer-resumes", "layer-traces", "step-keys", "threads"),
    "compared in fit, which keeps state and traces in the same way, and in XLA",
)

_WRAPPED = (
    "torch can't record how Keras rewords an error of its layers, and raises one of its own kind"
)
_EMPTIED = (
    "Keras on JAX takes a model's state away while it fits, and an error leaves it without any"
)

_OUTER = "RematScope around a layer of layers"
_CALLED_AGAIN = (
    "what Keras puts around the outer layer calls it again and does not say so: to a dropout "
    "inside, as to keras.layers.Dropout, that is another training call, with another mask"
)

#: The modes that a backend has and our layers can't be run in.
MISSING: Mapping[str, Mapping[str, str]] = {
    "tensorflow": {_OUTER: _CALLED_AGAIN, "recompute_grad around a layer": _CALLED_AGAIN},
    "jax": {
        _OUTER: "Keras passes training through jax.checkpoint, whose tracer no layer can branch "
        "on: keras.layers.Dropout raises too"
    },
    "torch": {_OUTER: _CALLED_AGAIN},
    "numpy": {"fit": "Keras' NumPy backend has no gradient"},
}

#: The compiled modes that train with what another compiles, by the backend.
DERIVED: Mapping[str, Mapping[str, str]] = {
    "tensorflow": {"fit": "tf.function", "fit XLA": "XLA"},
    "jax": {"fit": "jit"},
}

#: What does not apply in other modes, by the backend.
LIMITS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "tensorflow": {
        "fit": UNFIT,
        "fit XLA": {**UNFIT, **_OF_FIT},
    },
    "jax": {
        "eager": {"traces": "JAX compiles single operations where it runs eagerly"},
        "fit": {**UNFIT, "layer-error": _EMPTIED},
    },
    "torch": {"torch.compile": dict.fromkeys(("bad-dtype", "layer-error"), _WRAPPED)},
}


def compiled_modes() -> tuple[str, ...]:
    """Return the modes that this process's backend traces a function or a model in."""
    backend = keras.backend.backend()
    fits = () if backend == "torch" else FITS.get(backend, ())
    # JAX compiles each operation for each shape where it runs eagerly, too.
    eager = ("eager",) if backend == "jax" else ()
    return (*eager, *_COMPILED.get(backend, {}), *fits)


def get_scope(mode: str) -> AbstractContextManager[Any]:
    """Return the context in which a mode's layers are made."""
    return keras.RematScope("full") if mode == REMATERIALISED else nullcontext()


def made_in_mode(layer: Dropout, mode: str, count: Callable[[], None]) -> Any:
    """Return what runs a layer in a mode, and counts how often that is traced."""
    backend = keras.backend.backend()
    if mode in FITS.get(backend, ()):
        return _Fitted(layer, count, jit_compile=mode == "fit XLA" or "auto")
    make = _COMPILED.get(backend, {}).get(mode, _EAGER.get(backend, AtOnce))
    return make(layer, count)


def graphs() -> int:
    """Return how many graphs torch.compile has made, by torch's own count."""
    import torch._dynamo.utils

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def make_tensor(x: NDArray[Any]) -> Any:
    """Return a tensor of an array's bits: Keras on torch goes by float32, which changes NaN's."""
    if keras.backend.backend() != "torch" or x.dtype.name != "bfloat16":
        return keras.ops.convert_to_tensor(x, dtype=x.dtype.name)
    import torch

    return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)


class AtOnce:
    """Calls a layer, on any backend."""

    def __init__(self, layer: Dropout, count: Callable[[], None]) -> None:
        self._layer = layer
        self._count = count

    @property
    def calls(self) -> int:
        """The layer's call number, which may be set."""
        return self._layer.calls

    @calls.setter
    def calls(self, value: int) -> None:
        self._layer.calls = value

    def __call__(self, x: Any, *, training: bool) -> Any:
        """Call the layer."""
        return self._layer(x, training=training)


class _TensorFlow(AtOnce):
    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            y = self(x, training=True)
        return y, lambda upstream: tape.gradient(y, x, upstream)


class _Function(_TensorFlow):
    jit_compile = False

    def __init__(self, layer: Dropout, count: Callable[[], None]) -> None:
        import tensorflow as tf

        super().__init__(layer, count)
        self._run = tf.function(self._traced, jit_compile=self.jit_compile)

    def _traced(self, x: Any, training: bool) -> Any:
        self._count()
        return self._layer(x, training=training)

    def __call__(self, x: Any, *, training: bool) -> Any:
        return self._run(x, training)


class _Xla(_Function):
    jit_compile = True


class _Torch(AtOnce):
    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        import torch

        x = x.detach().requires_grad_()
        y = self(x, training=True)
        return y.detach(), lambda upstream: torch.autograd.grad(y, x, upstream)[0]


_numbers = itertools.count()


class _Compiled(_Torch):
    """A layer under `torch.compile`, all of it in one graph."""

    def __init__(self, layer: Dropout, count: Callable[[], None]) -> None:
        import torch

        super().__init__(layer, count)
        # What Keras notes of a layer's first call would have it traced again at the second.
        layer(keras.Input((None,)))
        # Where the matrix has a hundred layers, torch would give up after the eighth.
        torch._dynamo.config.recompile_limit = 1 << 20

        def run(x: Any, training: bool) -> Any:
            return layer(x, training=training)

        # Of code and a name of its own, so that its graphs are not sought among those of other
        # layers, and torch does not take what differs between layers for what varies.
        code = run.__code__.replace(co_name=f"run_{next(_numbers)}")
        own = FunctionType(code, run.__globals__, closure=run.__closure__)
        self._run = torch.compile(own, fullgraph=True)

    def __call__(self, x: Any, *, training: bool) -> Any:
        return self._run(x, training)


class _Jax(AtOnce):
    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        import jax

        y, pullback = jax.vjp(lambda x: self(x, training=True), x)
        return y, lambda upstream: pullback(upstream)[0]


class _Jit(_Jax):
    """A stateless call under `jax.jit`, whose state goes in and out."""

    def __init__(self, layer: Dropout, count: Callable[[], None]) -> None:
        import jax

        super().__init__(layer, count)
        self._run = jax.jit(self._traced, static_argnums=2)

    def _traced(self, state: Any, x: Any, training: bool) -> Any:
        self._count()
        return self._layer.stateless_call([], state, x, training=training)

    def __call__(self, x: Any, *, training: bool) -> Any:
        return self._kept(*self._run(self._state(), x, training))

    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        import jax

        state = self._state()
        y, pullback, new = jax.vjp(lambda x: self._run(state, x, True), x, has_aux=True)
        return self._kept(y, new), lambda upstream: pullback(upstream)[0]

    def _state(self) -> list[Any]:
        return [variable.value for variable in self._layer.non_trainable_variables]

    def _kept(self, y: Any, state: list[Any]) -> Any:
        for variable, value in zip(self._layer.non_trainable_variables, state, strict=True):
            variable.assign(value)
        return y


_EAGER: Mapping[str, type[AtOnce]] = {"tensorflow": _TensorFlow, "jax": _Jax, "torch": _Torch}
_COMPILED: Mapping[str, Mapping[str, type[AtOnce]]] = {
    "tensorflow": {"tf.function": _Function, "XLA": _Xla},
    "jax": {"jit": _Jit},
    "torch": {"torch.compile": _Compiled},
}


class _Record(keras.layers.Layer):
    """Keeps what actual by in training, and counts how often that is traced."""

    def __init__(self, count: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self._count = count

    def build(self, input_shape: tuple[int, ...]) -> None:
        # Zeros, since JAX compiles random numbers for each shape, which takes a second.
        shape = (1, *input_shape[1:])
        self.seen = self.add_weight(shape, "zeros", trainable=False, name="seen")

    def call(self, inputs: Any, training: bool = False) -> Any:
        if training:
            self._count()
            self.seen.assign(inputs)
        return inputs


class _Scale(keras.layers.Layer):
    """Something to train."""

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


def _dataset(batch: Any) -> Any:
    """Return what `fit` takes: of TensorFlow's own where Keras would make one of it."""
    both = batch, batch  # for what it is trained is no matter
    if keras.backend.backend() != "tensorflow":
        return _Batch(*both)
    import tensorflow as tf

    return tf.data.Dataset.from_tensors(both)


class _Fitted(AtOnce):
    """Trains a model for a step whose batch is x as its only example, and returns what was seen."""

    def __init__(self, layer: Dropout, count: Callable[[], None], jit_compile: bool | str) -> None:
        super().__init__(layer, count)
        self._jit_compile = jit_compile
        self._models: dict[Any, tuple[Any, Any]] = {}

    def __call__(self, x: Any, *, training: bool) -> Any:
        batch = x[None]
        form = (tuple(batch.shape), batch.dtype)
        if form not in self._models:
            self._models[form] = self._model(batch)
        model, record = self._models[form]
        if not training:
            # Trained on NaN, it would be that, which has no part in what dropout does.
            model.layers[-1].scale.assign(1)
            actual = make_tensor(model.predict(_dataset(batch), verbose=0))
        else:
            model.fit(_dataset(batch), shuffle=False, verbose=0)
            actual = keras.ops.copy(record.seen.value)
        return actual[0]

    def _model(self, batch: Any) -> tuple[Any, Any]:
        dtype = keras.backend.standardize_dtype(batch.dtype)
        policy = dtype if "float" in dtype else None
        record = _Record(self._count, dtype=policy)
        example = keras.Input(batch.shape[1:], dtype=dtype)
        model = keras.Sequential([example, self._layer, record, _Scale(dtype=policy)])
        model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=self._jit_compile)
        return model, record
