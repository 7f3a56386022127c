"""Dropout layers for Keras: what `keras.layers` calls by these names, whose runs resume.

Keras documentation: keras.layers.Dropout, keras.layers.SpatialDropout1D/2D/3D (Keras 3).
"""

from typing import Any

import keras
import numpy as np

from unidrop.adapters.calls import run_counted
from unidrop.adapters.keras_backend import find_replica, make_increment
from unidrop.adapters.noise_shape import noise_shape_axes
from unidrop.key import Key
from unidrop.library import get_library
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.words import checked_integer

__all__ = ["Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D"]

_STATE = "seed_generator_state"


class _SeededLayerMixin(keras.layers.Layer):
    """What our layers put before Keras' own: the mask of a key, and a call number that is saved.

    The call number is the second element of the layer's own `keras.random.SeedGenerator`, which
    Keras carries through every backend's training step. The first is the seed that Keras draws
    where none is given; a seed that is given is a key of 64 bits and does not change.
    """

    def _set_key(self, seed: int | Key | None) -> None:
        self.seed = int(seed) if isinstance(seed, Key) else seed
        self._key = Key(seed) if isinstance(seed, int) else seed
        # Looked up here, since what is looked up for the first time can't be compiled by torch, and
        # has it compile again what it has: NumPy's arrays too, which users compare with.
        get_library(np.zeros(0))
        get_library(keras.ops.convert_to_tensor(0))
        if self.rate > 0:
            get_library(self.seed_generator.state.value)

    @property
    def calls(self) -> int:
        """The number of training calls so far; may be set, to resume or to follow a global step."""
        if self.rate == 0:
            return 0
        return int(keras.ops.convert_to_numpy(self.seed_generator.state.value)[1])

    @calls.setter
    def calls(self, value: int) -> None:
        value = checked_integer(value, "calls", bits=31)
        if self.rate > 0:
            self._set_state(keras.ops.convert_to_numpy(self.seed_generator.state.value)[0], value)

    def _set_state(self, seed: Any, calls: Any) -> None:
        state = self.seed_generator.state
        state.assign(keras.ops.convert_to_tensor([int(seed), int(calls)], dtype=state.dtype))

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Apply dropout in training, and the identity otherwise."""
        if not training or self.rate == 0:
            return inputs
        if not keras.ops.is_tensor(inputs):
            # Named: Keras on NumPy takes float64 for what Python calls a float, and narrows it.
            dtype = getattr(inputs, "dtype", None)
            inputs = keras.ops.convert_to_tensor(
                inputs, dtype=dtype and keras.backend.standardize_dtype(dtype)
            )
        axes: tuple[int, ...] = ()
        noise_shape = self._noise_shape(inputs)
        if noise_shape is not None:
            shape = get_library(inputs, "inputs").arrays.shape(inputs)
            axes = noise_shape_axes(noise_shape, shape)
        replica = find_replica(inputs)
        rank, window = (None, None) if replica is None else replica
        global_shape, start = window or (None, None)
        plan = DropoutPlan.from_args(
            inputs,
            Rate.from_p(self.rate, "rate"),
            broadcast_axes=axes,
            global_shape=global_shape,
            start=start,
            name="inputs",
        )
        rank = None if window else rank
        state = self.seed_generator.state.value
        if get_library(state).arrays.is_traced(state):
            # One thread traces, and torch.compile cannot record a lock; nothing was counted yet if
            # the call raises.
            return plan.apply(inputs, self._make_key(self._advance(state), rank))
        return run_counted(
            lambda: self._advance(self.seed_generator.state.value),
            self._roll_back,
            lambda state: plan.apply(inputs, self._make_key(self._read(state), rank)),
        )

    def rematerialized_call(self, layer_call: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the call as it is, under `keras.RematScope` too.

        Nothing is kept for the backward pass, so there is nothing to save by calling again; and
        for Keras a second call would be another one, with a mask of its own.
        """
        return layer_call

    def _noise_shape(self, inputs: Any) -> Any:
        return self.noise_shape

    def _advance(self, value: Any) -> Any:
        """Return the seed and the call number, and count; as `SeedGenerator.next` does.

        `SeedGenerator.next` makes a NumPy array on the way, which torch.compile cannot record.
        """
        state = self.seed_generator.state
        before = value * 1
        state.assign(before + make_increment(before))
        return before

    def _read(self, state: Any) -> list[int]:
        """Return the seed and the call number as integers."""
        seed, calls = (int(number) for number in keras.ops.convert_to_numpy(state))
        if not 0 <= calls < 1 << 31:
            raise ValueError(
                f"calls must be below 2**31, the largest number of Keras's own state, got {calls}: "
                "give the layer another seed, and set its calls to 0"
            )
        return [seed, calls]

    def _make_key(self, state: Any, rank: Any) -> Key:
        """Return the key of a call; replicas without a window fold in their rank."""
        key = Key.from_words(state[0], 0) if self._key is None else self._key
        return (key if rank is None else key.fold_in(rank)).fold_in(state[1])

    def _roll_back(self) -> None:
        seed, calls = keras.ops.convert_to_numpy(self.seed_generator.state.value)
        self._set_state(seed, calls - 1)

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> Any:
        """Tell TensorFlow of the call number too, for its checkpoints and SavedModels."""
        children = super()._trackable_children(save_type, **kwargs)
        return {**children, _STATE: self.seed_generator.state} if self.rate > 0 else children

    def save_own_variables(self, store: Any) -> None:
        """Save the call number beside what Keras saves, and the seed that it drew."""
        super().save_own_variables(store)
        if self.rate > 0:
            store[_STATE] = keras.ops.convert_to_numpy(self.seed_generator.state.value)

    def load_own_variables(self, store: Any) -> None:
        """Load the call number; a file without one, such as of `keras.layers`, leaves it."""
        if self.rate == 0 or _STATE not in store:
            return
        seed, calls = store[_STATE][:]
        if self._key is not None:
            seed = keras.ops.convert_to_numpy(self.seed_generator.state.value)[0]
        self._set_state(seed, calls)


def _keras_seed(seed: Any) -> int | None:
    """Return the seed for Keras' own generator, whose 32 bits can't hold every key."""
    if seed is None:
        return None
    if isinstance(seed, Key):
        return int(seed) & 0x7FFFFFFF
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(
            "Argument `seed` must be an integer, 0 <= seed < 2**64, or a unidrop.Key, such as "
            f"Key(42).fold_in('encoder/0'). Received: seed={seed}"
        )
    return int(Key(seed)) & 0x7FFFFFFF


def _checked_rate(rate: Any) -> Any:
    """Raise for a type that is no rate; Keras checks the range, with its own message."""
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        Rate.from_p(rate, "rate")
    return rate


@keras.saving.register_keras_serializable(package="unidrop")
class Dropout(_SeededLayerMixin, keras.layers.Dropout):
    """Set input units to 0 with a frequency of ``rate`` at each training step.

    As `keras.layers.Dropout`, and its replacement: kept inputs are scaled by ``1 / (1 - rate)``,
    and inference is the identity. Beyond it, the same seed drops the same units in every
    framework, the backward pass keeps no mask, and ``.keras`` and ``.weights.h5`` files save the
    call number, so that a resumed run continues as if never stopped.

    Parameters
    ----------
    rate : int or float
        Between 0 and 1. Fraction of the input units to drop.
    noise_shape : sequence of int or None, optional
        The shape of the mask: 1 where one decision is shared, None or the input's own length
        elsewhere, as ``(None, 1, features)`` for the same mask at all timesteps. A length that
        is not known while a function is traced is not compared with the input's.
    seed : int or unidrop.Key, optional
        Training call n = 0, 1, 2, ... uses the key ``Key(seed).fold_in(n)``. Two layers with one
        seed drop the same units: give each its site, ``seed=Key(42).fold_in("encoder/0")``. If
        None, Keras draws a seed once, when the layer is made.
    **kwargs
        Those of `keras.layers.Layer`: name, dtype, trainable, activity_regularizer.

    Attributes
    ----------
    calls : int
        The number of training calls so far. May be set: a run that resumes needs this one number.

    Raises
    ------
    TypeError
        If rate is no Python number.
    ValueError
        If rate is outside [0, 1], noise_shape holds anything but positive integers and None, or
        seed is neither an integer in [0, 2^64) nor a Key.

    Notes
    -----
    ``.keras`` and ``.weights.h5`` files hold the call number, and so does `tf.train.Checkpoint`.

    Weights saved with `keras.layers.Dropout` load into this layer. The other way round Keras'
    layer refuses the call number, unless it is told to by ``skip_mismatch=True``.

    Call numbers have 31 bits.

    N. Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
    JMLR 15 (2014).

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.keras import Dropout
    >>> layer = Dropout(0.5, seed=Key(42).fold_in("encoder/0"))
    >>> np.asarray(layer(np.ones((1, 6), "float32"), training=True))
    array([[2., 0., 0., 2., 2., 2.]], dtype=float32)
    >>> layer.calls
    1
    """

    def __init__(
        self, rate: float, noise_shape: Any = None, seed: int | Key | None = None, **kwargs: Any
    ) -> None:
        super().__init__(_checked_rate(rate), noise_shape, _keras_seed(seed), **kwargs)
        self._set_key(seed)


class _Spatial(_SeededLayerMixin):
    """What the three spatial layers share: Keras' own noise shape, of whole feature maps."""

    def __init__(
        self, rate: float, *args: Any, seed: int | Key | None = None, **kwargs: Any
    ) -> None:
        super().__init__(_checked_rate(rate), *args, seed=_keras_seed(seed), **kwargs)
        self._set_key(seed)

    def _noise_shape(self, inputs: Any) -> Any:
        return [1 if isinstance(n, int) and n == 1 else None for n in self._get_noise_shape(inputs)]


@keras.saving.register_keras_serializable(package="unidrop")
class SpatialDropout1D(_Spatial, keras.layers.SpatialDropout1D):
    """Drop whole feature maps of a (samples, timesteps, channels) input.

    As `keras.layers.SpatialDropout1D`; seed, calls and errors are those of `Dropout`.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import SpatialDropout1D
    >>> np.asarray(SpatialDropout1D(0.5, seed=42)(np.ones((1, 2, 3), "float32"), training=True))
    array([[[2., 2., 0.],
            [2., 2., 0.]]], dtype=float32)
    """


@keras.saving.register_keras_serializable(package="unidrop")
class SpatialDropout2D(_Spatial, keras.layers.SpatialDropout2D):
    """Drop whole feature maps of a 4D input.

    As `keras.layers.SpatialDropout2D`, with its ``data_format``; seed, calls and errors are those
    of `Dropout`.
    """


@keras.saving.register_keras_serializable(package="unidrop")
class SpatialDropout3D(_Spatial, keras.layers.SpatialDropout3D):
    """Drop whole feature maps of a 5D input.

    As `keras.layers.SpatialDropout3D`, with its ``data_format``; seed, calls and errors are those
    of `Dropout`.
    """
