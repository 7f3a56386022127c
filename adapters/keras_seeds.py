"""The seeds of a Keras model: assigns each layer its own, warns of twins, renews compiled steps."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import keras

from unidrop.adapters.frames import list_callers
from unidrop.adapters.keras_backend import forget_programs
from unidrop.adapters.seeds import warn_of_equal_seeds
from unidrop.key import Key

__all__ = ["Callers", "assign_seeds", "find_callers", "note_trace", "renew_traces", "warn_of_twins"]

M = TypeVar("M", bound=keras.layers.Layer)

# Types that may hold layers.
_HOLDERS = (keras.layers.Layer, dict, list, tuple)

# Frames of Keras's compiled steps. The first is only on TensorFlow, and not in replicas' threads.
_STEPS = ("one_step_on_data", "train_step", "test_step", "predict_step")
# Methods that run the layers of their object. Steps on JAX call no other one than the last.
_CALLS = (*_STEPS[1:], "__call__", "call", "stateless_call")
_COMPILED = ("train_function", "test_function", "predict_function")

# The models whose compiled steps contain the key of a layer.
_TRAINERS: "WeakKeyDictionary[Any, WeakSet[Any]]" = WeakKeyDictionary()

# The layers whose keys other compiled functions contain.
_TRACED: "WeakSet[Any]" = WeakSet()


def assign_seeds(model: M, seed: int | Key) -> M:
    """Give each dropout layer of a model the seed ``Key(seed).fold_in(name)``.

    The name is the path of attributes and indices from the model to the layer, joined by ".":
    ``model.encoder.layers[2]`` has the name "encoder.layers.2". A Sequential or functional model
    has its layers at ``layers``. The names that Keras invents, such as "dropout_3", do not matter,
    so a model that is built, cloned or loaded again has the same seeds. A layer in two places has
    the name that comes first in the alphabet, and private attributes come last.

    Parameters
    ----------
    model : keras.layers.Layer
        The model. Its layers keep their call numbers.
    seed : int or unidrop.Key
        The seed of the model.

    Returns
    -------
    keras.layers.Layer
        The model itself.

    Raises
    ------
    TypeError
        If model is not a Keras layer, or seed is neither an integer nor a Key.
    ValueError
        If the model has no layer of `unidrop.adapters.keras`, or seed is outside [0, 2^64).

    Examples
    --------
    >>> import keras
    >>> from unidrop import Key
    >>> from unidrop.adapters.keras import Dropout, assign_seeds
    >>> model = keras.Sequential([keras.layers.Dense(2), Dropout(0.5), keras.layers.Dense(2)])
    >>> assign_seeds(model, 42).layers[1].seed == Key(42).fold_in("layers.1")
    True
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model must be a keras.layers.Layer, got {type(model).__name__}")
    key = seed if isinstance(seed, Key) else Key(seed)
    layers = dict(_named_layers(model))
    if not layers:
        raise ValueError("model must have a layer of unidrop.adapters.keras, and it has none")
    changed = [layer for name, layer in layers.items() if layer._replace_seed(key.fold_in(name))]
    renew_traces(*changed)
    return model


class Callers(NamedTuple):
    """The callers of a layer.

    Attributes
    ----------
    model : keras.layers.Layer
        The outermost layer whose call or step contains the current call.
    trainers : list of keras.Model
        The models whose steps contain the call. One of them may run the step of another.
    in_function : bool
        Whether a function that a user compiled contains the call, on TensorFlow.
    """

    model: Any
    trainers: list[Any]
    in_function: bool


def find_callers(layer: Any) -> Callers | None:
    """Return the callers of a layer that are on the stack; None if Keras computes shapes alone."""
    model: Any = layer
    trainers = []
    in_step = in_function = False
    for frame, caller in list_callers(sys._getframe(1)):
        name = frame.f_code.co_name
        if name == "compute_output_spec":
            return None
        if isinstance(caller, keras.layers.Layer) and name in _CALLS:
            model = caller
        if isinstance(caller, keras.Model) and name in _STEPS:
            trainers.append(caller)
            in_step = in_step or name == _STEPS[0]
        elif "polymorphic_function" in frame.f_globals.get("__name__", ""):
            # A tf.function: Keras makes one around its own frame, and users make others inside.
            in_function = in_function or not in_step
    return Callers(model, trainers, in_function)


def note_trace(layer: Any, callers: Callers) -> None:
    """Remember the functions that now receive the key of a layer as a constant."""
    trainers = callers.trainers and [
        trainer
        for trainer in callers.trainers
        if any(getattr(trainer, name, None) for name in _COMPILED)
    ]
    _TRAINERS.setdefault(layer, WeakSet()).update(trainers)
    if callers.in_function or not trainers:
        _TRACED.add(layer)


def renew_traces(*layers: Any) -> None:
    """Let Keras recompile its steps, which contain the former keys of layers."""
    trainers = {trainer for layer in layers for trainer in _TRAINERS.pop(layer, ())}
    if trainers:
        forget_programs()  # another model may have the same step
    for trainer in trainers:
        for name in _COMPILED:
            if getattr(trainer, name, None) is not None:
                # Another thread may run the former function, so there must always be one.
                getattr(trainer, f"make_{name}")(force=True)
    for layer in layers:
        if layer in _TRACED:
            warnings.warn(
                f"the layer {layer.name!r} has a new seed, but a compiled function, such as a "
                "tf.function or jax.jit, contains an earlier one: define that function again",
                stacklevel=3,
            )


def warn_of_twins(model: Any, traced: bool) -> None:
    """Warn if layers of the model that runs have one seed and one call number.

    Layers call this once, before their first training call: a model whose layers are copies, such
    as those in `keras.layers.Bidirectional`, is a mistake that no output shows.
    """
    layers = list(_named_layers(model))
    for _, other in layers:
        other._checked = id(other)
    active = []
    for name, other in layers:
        may_drop = isinstance(other.rate, keras.Variable) or other.rate > 0
        if other.seed is not None and may_drop:
            number = 0  # a trace has no numbers
            if not traced:  # by `calls`, a trainer on JAX would put back its variables
                number = int(keras.ops.convert_to_numpy(other.seed_generator.state.value)[1])
            active.append((name, other.seed, number))
    warn_of_equal_seeds(active, "unidrop.adapters.keras", known=not traced, stacklevel=3)


def _named_layers(
    value: Any, name: str = "", seen: dict[int, Any] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield the dropout layers that have seeds, each once, by the path of attributes and indices.

    The dropout layer of an attention layer has the attention layer's path.
    """
    seen = {} if seen is None else seen
    if id(value) in seen:
        return
    seen[id(value)] = value  # so that no other object gets its identity
    layer = getattr(value, "_dropout_layer", value)
    if hasattr(type(value), "calls") and hasattr(type(layer), "_replace_seed"):
        seen[id(layer)] = layer
        yield name, layer
    for child_name, child in _get_children(value):
        if isinstance(child, _HOLDERS):
            yield from _named_layers(child, f"{name}.{child_name}" if name else child_name, seen)


def _get_children(value: Any) -> Iterable[tuple[Any, Any]]:
    """Yield what a layer or a container holds: layers, containers and other objects."""
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, list | tuple):
        return enumerate(value)
    # On the torch backend, a layer is a module of PyTorch, and holds its children as such.
    attributes = {**vars(value), **vars(value).get("_modules", {})}
    names = sorted(attributes, key=lambda name: (name.startswith("_"), name))
    # Names of TensorFlow begin with "_self_". All layers are in "_layers", with no better name.
    hidden = {"_modules", *(name for name in names if name.startswith("_self_"))}
    children = {name: attributes[name] for name in names if name not in hidden}
    if isinstance(value, keras.Sequential) or hasattr(type(value), "operations"):
        children = {"layers": value.layers, **children}  # first, as in Keras's files
    children["_layers"] = children.pop("_layers")
    return children.items()
