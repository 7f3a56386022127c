"""Recurrent cells and layers for Keras, whose masks of a call are fixed over time.

Keras documentation: keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN (Keras 3).
"""

import inspect
from typing import Any, Final, SupportsIndex

import keras
from keras.src.backend.common import global_state
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from unidrop.adapters.calls import run_exclusively
from unidrop.adapters.keras.layers import _STATE, _narrow_seed, _SeededLayerMixin
from unidrop.adapters.keras_backend import advance_eagerly, find_replica, get_thread
from unidrop.key import Key
from unidrop.library import get_library
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = ["GRU", "LSTM", "GRUCell", "LSTMCell", "SimpleRNN", "SimpleRNNCell"]

_RATES: Final = ("dropout", "recurrent_dropout")

# The name of a call among its masks: its key, and the state before it unless a trace has it.
_CALL: Final = "call"


class _One(float):
    """The rate 1 for Keras's cells, which drop nothing unless a rate is less than 1."""

    def __lt__(self, other: float) -> bool:
        return self <= other


def _check_rates(**rates: Any) -> dict[str, float]:
    """Return valid rates; Keras would clip others."""
    return {name: Rate.from_p(value, name).p for name, value in rates.items()}


class _Sequences:
    """What threads remember during a sequence; an object, because Keras tracks dictionaries."""

    def __init__(self) -> None:
        self._of_thread: dict[int, dict[str, Any]] = {}

    def get(self) -> dict[str, Any]:
        """Return the masks of this thread's sequence, and its call."""
        return self._of_thread.setdefault(get_thread(), {})

    def forget(self, *names: str) -> None:
        """Forget masks, and the call, so that the next mask begins a new one."""
        sequence = self.get()
        for name in (*names, _CALL):
            sequence.pop(name, None)
        if not sequence:
            del self._of_thread[get_thread()]


class _SeededCellMixin(_SeededLayerMixin):
    """The masks of a key and a saved call number, for cells that also derive from Keras's.

    The first mask of a sequence takes a call number. A layer resets its cell after each sequence.
    """

    def __init__(
        self,
        units: int,
        *args: Any,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | Key | None = None,
        **kwargs: Any,
    ) -> None:
        rates = _check_rates(dropout=dropout, recurrent_dropout=recurrent_dropout)
        super().__init__(units, *args, seed=_narrow_seed(seed), **rates, **kwargs)
        self._sequences = _Sequences()
        self._set_seed(seed)

    @property
    def dropout(self) -> float:
        """The fraction of the inputs to drop."""
        return self._input_rate

    @dropout.setter
    def dropout(self, value: float) -> None:
        rate = Rate.from_p(value, "dropout").p
        self._input_rate = _One(rate) if rate == 1 else rate

    @property
    def recurrent_dropout(self) -> float:
        """The fraction of the recurrent state to drop."""
        return self._recurrent_rate

    @recurrent_dropout.setter
    def recurrent_dropout(self, value: float) -> None:
        rate = Rate.from_p(value, "recurrent_dropout").p
        if rate and self._counts and getattr(self, "implementation", 1) == 2:
            raise ValueError(
                "recurrent_dropout must stay 0 in a cell that was made with recurrent_dropout=0, "
                f"because its gates share one product, got {value}: make a new cell"
            )
        self._recurrent_rate = _One(rate) if rate == 1 else rate

    @property  # type: ignore[misc] # users set one of the two
    def rate(self) -> float:
        """The larger of the two rates."""
        return max(self.dropout, self.recurrent_dropout)

    def call(  # type: ignore[override] # a cell has states
        self, inputs: Any, states: Any, training: bool = False
    ) -> Any:
        """Compute a step, with the masks of the sequence in training.

        A step that raises ends the sequence, and its call is not counted.
        """
        try:
            return super(_SeededLayerMixin, self).call(inputs, states, training=training)
        except BaseException:
            self._cancel_sequence()
            raise

    def get_dropout_mask(self, step_input: Any) -> Any:
        """Return the masks of the inputs, scaled; None unless a training call drops inputs."""
        return self._get_masks("dropout", step_input)

    def get_recurrent_dropout_mask(self, step_input: Any) -> Any:
        """Return the masks of the recurrent state, as `get_dropout_mask`."""
        return self._get_masks("recurrent_dropout", step_input)

    def reset_dropout_mask(self) -> None:
        """Let the next call begin a sequence with other masks of the inputs."""
        self._sequences.forget("dropout")

    def reset_recurrent_dropout_mask(self) -> None:
        """Let the next call begin a sequence with other masks of the recurrent state."""
        self._sequences.forget("recurrent_dropout")

    def _get_masks(self, name: str, step_input: Any) -> Any:
        rate = Rate.from_p(getattr(self, name), name)
        # Keras asks for masks in evaluation too. Only the context of the call knows.
        context = global_state.get_global_attribute("current_call_ctx")
        if rate.p == 0 or context is None or not context.training:
            return None
        sequence = self._sequences.get()
        if name in sequence:
            return sequence[name]
        gates = getattr(self, "dropout_mask_count", None)
        ones = keras.ops.ones_like(step_input)
        if in_symbolic_scope():
            return ones if gates is None else [ones] * gates
        rank, window = find_replica(ones) or (None, None)
        global_shape, start = window or (None, None)
        plan = DropoutPlan.from_args(ones, rate, global_shape=global_shape, start=start)
        if _CALL not in sequence:
            sequence[_CALL] = self._begin_sequence(ones, None if window else rank)
        key = sequence[_CALL][0].fold_in(name)
        if gates is None:
            masks = plan.apply(ones, key)
        else:
            masks = [plan.apply(ones, key.fold_in(gate)) for gate in range(gates)]
        sequence[name] = masks
        return masks

    def _begin_sequence(self, x: Any, rank: Any) -> tuple[Key, Any]:
        """Count a call; return its key, and the state before it unless a trace has it."""
        variable = self.seed_generator.state
        is_traced = get_library(variable.value).arrays.is_traced
        traced = is_traced(variable.value)
        if traced or self._checked != id(self):
            self._find_mistakes(traced)
        if traced:
            return self._make_key(self._advance(variable.value, x), rank), None

        def take_number() -> Any:
            state = variable.value
            before = advance_eagerly(state)
            return self._advance(state, x) if before is None else before

        taken = run_exclusively(variable, take_number)
        # Inside a trace, JAX also traces operations on an array that is not traced.
        numbers = taken if is_traced(taken) else self._read(taken)
        return self._make_key(numbers, rank), taken

    def _cancel_sequence(self) -> None:
        """Forget the masks of a call that raised, and do not count it."""
        variable = self.seed_generator.state
        _, taken = self._sequences.get().get(_CALL, (None, None))
        if taken is not None:
            run_exclusively(variable, self._roll_back, taken, variable)
        self._sequences.forget(*_RATES)

    def get_config(self) -> dict[str, Any]:
        """Return Keras's configuration, with the seed as an integer, as `Dropout` does."""
        config = super().get_config()
        return {**config, **{name: float(config[name]) for name in _RATES}}

    def load_own_variables(self, store: Any) -> None:
        """Load the weights, and the call number if there is one."""
        super().load_own_variables(store)
        # A store is not iterable: it has keys() alone.
        weights = {name: store[name] for name in store.keys() if name != _STATE}  # noqa: SIM118
        keras.layers.Layer.load_own_variables(self, weights)


class _CellHook(keras.layers.RNN):
    """Replaces the cell that the constructor of a Keras layer makes, and hands on."""

    _Cell: type[_SeededCellMixin]

    def __init__(self, cell: Any, **options: Any) -> None:
        names = inspect.signature(type(cell).__init__).parameters.keys() - {"self", "kwargs"}
        arguments = {name: getattr(cell, name) for name in names}
        if hasattr(cell, "implementation"):
            arguments["implementation"] = cell.implementation
        arguments |= {"dtype": cell.dtype_policy, "trainable": cell.trainable, "name": cell.name}
        super().__init__(self._Cell(**arguments), **options)


class _SeededRNNMixin(keras.layers.RNN):
    """The seed and the call number of a cell, for layers that also derive from Keras's."""

    def __init__(
        self,
        units: int,
        *args: Any,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | Key | None = None,
        **kwargs: Any,
    ) -> None:
        rates = _check_rates(dropout=dropout, recurrent_dropout=recurrent_dropout)
        super().__init__(units, *args, seed=_narrow_seed(seed), **rates, **kwargs)
        self.cell._set_seed(seed)

    @property
    def _dropout_layer(self) -> Any:
        """The layer that has the seed, under the name of other layers with one inside."""
        return self.cell

    @property
    def seed(self) -> Key | None:
        """The key of the layer; None if Keras drew a seed."""
        seed: Key | None = self.cell.seed
        return seed

    @seed.setter
    def seed(self, value: int | Key | None) -> None:
        self.cell.seed = value

    @property
    def calls(self) -> int:
        """The number of training calls so far; set it to resume a run or follow a global step."""
        calls: int = self.cell.calls
        return calls

    @calls.setter
    def calls(self, value: SupportsIndex) -> None:
        self.cell.calls = value

    def call(
        self, sequences: Any, initial_state: Any = None, mask: Any = None, training: bool = False
    ) -> Any:
        """Run the cell over time; a call that raises is not counted."""
        try:
            return super().call(sequences, initial_state, mask, training)
        except BaseException:
            self.cell._cancel_sequence()
            raise

    def inner_loop(
        self, sequences: Any, initial_state: Any, mask: Any, training: bool = False
    ) -> Any:
        """Run the cell over time, by a fused loop of the backend if one serves."""
        gates = getattr(self.cell, "dropout_mask_count", None)
        if gates is None or not training or not self.dropout:
            return super().inner_loop(sequences, initial_state, mask, training)
        # The fused loops take one mask of the inputs, and Keras would pass one for each gate.
        mask = mask[0] if isinstance(mask, list | tuple) else mask
        return keras.layers.RNN.inner_loop(self, sequences, initial_state, mask, training)

    def rematerialized_call(self, layer_call: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the call unchanged, under `keras.RematScope` too.

        Keras would count the second call, which then had another mask.
        """
        return layer_call

    def get_config(self) -> dict[str, Any]:
        """Return Keras's configuration, with the seed as an integer, as `Dropout` does."""
        config: dict[str, Any] = super().get_config()
        inner = self.cell.get_config()
        return {**config, **{n: inner[n] for n in (*_RATES, "seed", _STATE) if n in inner}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make a layer of its configuration."""
        layer = super().from_config({name: config[name] for name in config if name != _STATE})
        layer.cell._restore_config(config)
        return layer


@keras.saving.register_keras_serializable(package="unidrop")
class LSTMCell(_SeededCellMixin, keras.layers.LSTMCell):
    """A step of an LSTM that drops inputs and recurrent state under keys.

    Replaces `keras.layers.LSTMCell`, inside `keras.layers.RNN` too. Parameters, attributes and
    errors are as in `LSTM`. A cell that is called without a layer has the same masks until
    ``reset_dropout_mask()`` and ``reset_recurrent_dropout_mask()``.

    Examples
    --------
    >>> import keras
    >>> import numpy as np
    >>> from unidrop.adapters.keras import LSTMCell
    >>> layer = keras.layers.RNN(LSTMCell(4, recurrent_dropout=0.5, seed=42))
    >>> layer(np.ones((2, 3, 8), "float32"), training=True).shape
    TensorShape([2, 4])
    >>> layer.cell.calls
    1
    """


@keras.saving.register_keras_serializable(package="unidrop")
class GRUCell(_SeededCellMixin, keras.layers.GRUCell):
    """A step of a GRU that drops inputs and recurrent state under keys, as `LSTMCell`."""


@keras.saving.register_keras_serializable(package="unidrop")
class SimpleRNNCell(_SeededCellMixin, keras.layers.SimpleRNNCell):
    """A step of a fully connected RNN that drops inputs and recurrent state, as `LSTMCell`."""


@keras.saving.register_keras_serializable(package="unidrop")
class LSTM(_SeededRNNMixin, keras.layers.LSTM, _CellHook):
    """Long short-term memory that drops inputs and recurrent state under keys.

    Replaces `keras.layers.LSTM`. The masks of a call are fixed over time. With
    ``K = Key(seed).fold_in(n)``, training call n = 0, 1, 2, ... multiplies the inputs by the masks
    ``dropout(ones((batch, features)), dropout, K.fold_in("dropout").fold_in(gate))``, and the
    recurrent state by masks of "recurrent_dropout" with the shape (batch, units). Without
    recurrent_dropout and with implementation 2, all gates share the mask of
    ``K.fold_in("dropout")``. Gates are numbered in the order of the kernel.

    Parameters
    ----------
    units : int
        The number of outputs.
    *args, **kwargs
        Further arguments of `keras.layers.LSTM`.
    dropout : int or float, default 0.0
        Between 0 and 1. Fraction of the inputs to drop.
    recurrent_dropout : int or float, default 0.0
        Between 0 and 1. Fraction of the recurrent state to drop.
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Attributes
    ----------
    seed : unidrop.Key or None
        The key that call numbers are folded into; None if Keras drew the seed.
    calls : int
        The number of training calls so far. To resume a run, set this one number.

    Raises
    ------
    TypeError
        If a rate is not a Python number.
    ValueError
        If a rate is outside [0, 1], which Keras would clip, or seed is neither an integer in
        [0, 2^64) nor a Key.

    Notes
    -----
    Evaluation does not count calls. A rate of 1 drops everything.

    Y. Gal, Z. Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", NeurIPS 2016.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.keras import LSTM
    >>> layer = LSTM(4, dropout=0.2, recurrent_dropout=0.2, seed=Key(42).fold_in("encoder/0"))
    >>> layer(np.ones((2, 3, 8), "float32"), training=True).shape
    TensorShape([2, 4])
    >>> layer.calls
    1
    """

    _Cell = LSTMCell


@keras.saving.register_keras_serializable(package="unidrop")
class GRU(_SeededRNNMixin, keras.layers.GRU, _CellHook):
    """Gated recurrent unit that drops inputs and recurrent state under keys.

    Replaces `keras.layers.GRU`. Masks, seed, calls and errors are as in `LSTM`.
    """

    _Cell = GRUCell


@keras.saving.register_keras_serializable(package="unidrop")
class SimpleRNN(_SeededRNNMixin, keras.layers.SimpleRNN, _CellHook):
    """Fully connected RNN that drops inputs and recurrent state under keys.

    Replaces `keras.layers.SimpleRNN`. It has no gates: the masks have the keys
    ``K.fold_in("dropout")`` and ``K.fold_in("recurrent_dropout")``. Seed, calls and errors are as
    in `LSTM`.
    """

    _Cell = SimpleRNNCell
