"""Dropout layers for Keras: `keras.layers` under keys, with runs that resume.

Keras documentation: keras.layers.Dropout, keras.layers.AlphaDropout,
keras.layers.GaussianDropout, keras.layers.GaussianNoise,
keras.layers.SpatialDropout1D/2D/3D,
keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention, keras.layers.Attention (Keras 3).
"""

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, SupportsIndex

import keras
import numpy as np
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope
from keras.src.backend.common.variables import AutocastScope, get_autocast_scope

from unidrop.adapters.calls import run_counted, run_exclusively
from unidrop.adapters.keras_backend import (
    advance_eagerly,
    check_loop,
    find_replica,
    make_increment,
    restore_value,
    writes_legacy_file,
)
from unidrop.adapters.keras_seeds import (
    assign_seeds,
    find_callers,
    note_trace,
    renew_traces,
    warn_of_twins,
)
from unidrop.adapters.noise_shape import noise_shape_axes
from unidrop.arguments import checked_integer
from unidrop.drop_block import check_block_size, plan_drop_block
from unidrop.family import Mode, check_mode, plan_alpha_dropout, plan_drop_key, plan_drop_path
from unidrop.gaussian import plan_gaussian_dropout, plan_gaussian_noise
from unidrop.key import Key
from unidrop.library import get_library
from unidrop.permutation import check_patch_rate, check_prefix, plan_patch_dropout
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.schedule import ScheduledRate, make_rate

__all__ = [
    "AlphaDropout",
    "Attention",
    "DropBlock2D",
    "DropBlock3D",
    "DropKey",
    "DropPath",
    "Dropout",
    "GaussianDropout",
    "GaussianNoise",
    "GroupQueryAttention",
    "MultiHeadAttention",
    "PatchDropout",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "assign_seeds",
]

_STATE, _SCHEDULE = "seed_generator_state", "rate_dtype"

# The dropout layer of the attention layer that runs, and the states that its calls have taken.
_attending: ContextVar[tuple[Any, list[Any]] | None] = ContextVar("_attending", default=None)


class _SeededLayerMixin(keras.layers.Layer):
    """The mask of a key and a saved call number, for layers that also derive from Keras's own.

    The call number is the second element of the layer's own `keras.random.SeedGenerator`, which
    Keras carries through every backend's training step. The first element is the seed that Keras
    draws for a layer without one. A given seed is a key of 64 bits and does not change.
    """

    _seed: Key | None = None
    # The identity of the layer that looked for others with its seed; a copy has another one.
    _checked: int | None = None
    # The call number that an ``.h5`` file contains, or that a warning named.
    _filed_calls: int = 0
    # A number or a variable; None until the constructor sets it.
    _rate: Any = None

    @property
    def rate(self) -> Any:
        """The fraction of the input units to drop: a number, or the variable of a schedule."""
        if isinstance(self._rate, keras.Variable) and not in_stateless_scope():
            restore_value(self._rate, "rate")
        return self._rate

    @rate.setter
    def rate(self, value: float) -> None:
        self._set_rate(value, "rate")

    def _set_rate(self, value: float, name: str) -> None:
        """Set the rate, and check it unless Keras's constructor has checked it already.

        The variable of a scheduled rate stays, and gets the value.
        """
        if isinstance(value, _Schedule):
            self._rate = value.variable
            return
        former = self._rate
        if isinstance(former, keras.Variable):
            Rate.from_p(value, name)
            self.rate.assign(value)
            return
        if former is not None:
            is_positive = Rate.from_p(value, name).p > 0
            if is_positive and not self._counts:
                raise ValueError(
                    f"{name} must stay 0 in a layer that was made with {name}=0, because it has no "
                    f"call number, got {value}: make a new layer"
                )
        self._rate = value

    @property
    def _counts(self) -> bool:
        """Return whether the layer has a call number; one made with a rate of 0 has none."""
        return hasattr(self, "seed_generator")

    @property
    def seed(self) -> Key | None:
        """The key of the layer; None if Keras drew a seed."""
        return self._seed

    @seed.setter
    def seed(self, value: int | Key | None) -> None:
        if self._replace_seed(value):
            renew_traces(self)

    def _replace_seed(self, value: int | Key | None) -> bool:
        """Set the seed, and return whether it differs; compiled functions contain the former."""
        former = self._seed
        self._seed = value if value is None or isinstance(value, Key) else Key(value)
        if self._seed == former:
            return False
        self._checked = None
        return True

    @property
    def key(self) -> None:
        """Raise AttributeError: the key of a layer is its attribute ``seed``."""
        raise AttributeError("the key of a layer is its attribute `seed`")

    def _set_seed(self, seed: int | Key | None) -> None:
        self.seed = seed
        # torch.compile cannot trace the first lookup of a type, and recompiles after one. So the
        # constructor looks up the backend's types, and NumPy too, which users compare with.
        get_library(np.zeros(0))
        get_library(keras.ops.convert_to_tensor(0))
        if self._counts:
            get_library(self.seed_generator.state.value)

    @property
    def calls(self) -> int:
        """The number of training calls so far; set it to resume a run or follow a global step."""
        if not self._counts:
            return 0
        restore_value(self.seed_generator.state)
        return int(keras.ops.convert_to_numpy(self.seed_generator.state.value)[1])

    @calls.setter
    def calls(self, value: SupportsIndex) -> None:
        value = checked_integer(value, "calls", bits=31)
        if self._counts:
            restore_value(self.seed_generator.state)
            # With a seed, the state is not read: a trace may have leaked into it.
            drawn_seed = _narrow_seed(self._seed)
            if drawn_seed is None:
                drawn_seed = keras.ops.convert_to_numpy(self.seed_generator.state.value)[0]
            self._set_state(drawn_seed, value)

    def _set_state(self, drawn_seed: Any, calls: Any) -> None:
        state = self.seed_generator.state
        state.assign(keras.ops.convert_to_tensor([int(drawn_seed), int(calls)], dtype=state.dtype))

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Apply dropout in training, and the identity otherwise."""
        is_scheduled = isinstance(self._rate, keras.Variable)
        if not training or (not is_scheduled and self._rate == 0):
            return inputs
        if not keras.ops.is_tensor(inputs):
            # Without a dtype, Keras on NumPy would narrow arrays of float64.
            dtype = getattr(inputs, "dtype", None)
            inputs = keras.ops.convert_to_tensor(
                inputs, dtype=dtype and keras.backend.standardize_dtype(dtype)
            )
        if in_symbolic_scope():  # Keras asks for the shape of the output, with symbols as lengths
            return inputs
        axes: tuple[int, ...] = ()
        noise_shape = self._make_noise_shape(inputs)
        if noise_shape is not None:
            shape = get_library(inputs, "inputs").arrays.shape(inputs)
            axes = noise_shape_axes(noise_shape, shape)
        rank, options = self._find_part(inputs)
        options["name"] = "inputs"
        one_rate = self._read_rate(inputs) if is_scheduled else Rate.from_p(self._rate, "rate")
        plan = self._make_plan(inputs, one_rate, axes, **options)
        if not plan.drops:  # the present value of a scheduled rate is 0
            return inputs
        return self._run_with_key(inputs, rank, lambda key: plan.apply(inputs, key), one_rate)

    def _find_part(self, inputs: Any) -> tuple[Any, dict[str, Any]]:
        """Return the rank of a replica without a window, and the window of one that has it."""
        rank, window = find_replica(inputs) or (None, None)
        global_shape, start = window or (None, None)
        return None if window else rank, {"global_shape": global_shape, "start": start}

    def _run_with_key(
        self, inputs: Any, rank: Any, call: Callable[[Key], Any], rate: Rate | None = None
    ) -> Any:
        """Return ``call(key)`` for the key of a training call, which counts unless it raises."""
        is_traced = get_library(inputs).arrays.is_traced
        state = self.seed_generator.state.value
        traced = is_traced(state)
        if traced or self._checked != id(self):
            self._find_mistakes(traced)
        if traced:
            # One thread traces, and torch.compile cannot record a lock. A trace that raises has
            # counted nothing.
            return call(self._make_key(self._advance(state, inputs, rate), rank))

        def take_number(variable: Any) -> Any:
            state = variable.value
            before = advance_eagerly(state)
            return self._advance(state, inputs, rate) if before is None else before

        def run(state: Any) -> Any:
            # Inside a trace, JAX also traces operations on an array that is not traced.
            numbers = state if is_traced(state) else self._read(state)
            outputs = call(self._make_key(numbers, rank))
            attending = _attending.get()
            if attending is not None and attending[0] is self:
                attending[1].append(state)
            return outputs

        return run_counted(take_number, self._roll_back, run, self.seed_generator.state)

    def _find_mistakes(self, traced: bool) -> None:
        """Look once for layers with this one's seed, and note where a trace puts the seed."""
        if traced and keras.backend.backend() == "torch":
            return  # torch.compile recompiles for a new seed, and cannot record this
        callers = find_callers(self)
        if callers is None:
            return
        if traced:
            note_trace(self, callers)
        if self._checked != id(self):
            warn_of_twins(callers.model, traced)

    def rematerialized_call(self, layer_call: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the call unchanged, under `keras.RematScope` too.

        Rematerialization would save no memory, because the backward pass keeps no mask. And Keras
        would count the second call, which then had another mask.
        """
        return layer_call

    def get_config(self) -> dict[str, Any]:
        """Return Keras's configuration, with the seed as an integer.

        In an ``.h5`` file of a whole model, it also contains the call number and the drawn seed: a
        file of that kind has no other place for them.
        """
        config: dict[str, Any] = super().get_config()
        config["seed"] = None if self.seed is None else int(self.seed)
        if isinstance(self._rate, keras.Variable):
            config["rate"] = float(keras.ops.convert_to_numpy(self.rate))
            config[_SCHEDULE] = keras.backend.standardize_dtype(self._rate.dtype)
        if self._counts and writes_legacy_file():
            self._filed_calls = self.calls
            state = keras.ops.convert_to_numpy(self.seed_generator.state.value)
            config[_STATE] = [int(number) for number in state]
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make a layer of its configuration; one with a schedule gets a new variable."""
        options = {name: config[name] for name in config if name not in (_STATE, _SCHEDULE)}
        if _SCHEDULE in config:
            dtype = config[_SCHEDULE]
            options["rate"] = keras.Variable(config["rate"], dtype=dtype, trainable=False)
        layer = super().from_config(options)
        layer._restore_config(config)
        return layer

    def _restore_config(self, config: dict[str, Any]) -> None:
        if _STATE in config:
            self._restore_state(config[_STATE])
            self._filed_calls = self.calls

    @property
    def weights(self) -> list[Any]:
        """Return the layer's weights; warn if an ``.h5`` file lacks the call number.

        The configuration of a model does not contain the layers inside most custom layers, but
        Keras reads the weights of each.
        """
        if self._counts and writes_legacy_file() and self.calls != self._filed_calls:
            self._filed_calls = self.calls
            warnings.warn(
                f"the .h5 file has no call number of the layer {self.name!r}, which is inside a "
                "custom layer: save the model as .keras, or after loading set "
                f"layer.calls = {self.calls}",
                stacklevel=2,
            )
        weights: list[Any] = super().weights
        return weights

    def _make_noise_shape(self, inputs: Any) -> Any:
        return self.noise_shape

    def _make_plan(
        self, inputs: Any, rate: Rate, axes: tuple[int, ...], **options: Any
    ) -> DropoutPlan:
        """Return the plan of a call, whose elements share decisions along the axes."""
        return DropoutPlan.from_args(inputs, rate, broadcast_axes=axes, **options)

    def _read_rate(self, inputs: Any) -> Rate:
        """Return the rate of the variable, which a layer of mixed precision must not narrow."""
        if get_autocast_scope() is None:  # else torch.compile would recompile once
            return make_rate(self._rate.value, inputs, "rate")
        with AutocastScope(None):
            return make_rate(self._rate.value, inputs, "rate")

    def _advance(self, value: Any, inputs: Any, rate: Rate | None = None) -> Any:
        """Return the drawn seed and the call number, and count the call unless the rate is 0.

        Raises RuntimeError in a loop that would not count each iteration.

        `SeedGenerator.next` does the same, but by a NumPy array, which torch.compile cannot record.
        """
        before = value * 1
        increment = make_increment(before)
        if isinstance(rate, ScheduledRate):
            increment = increment * keras.ops.cast(rate.array != 0, value.dtype)
        after = before + increment
        check_loop(self.name, inputs, value, after)
        self.seed_generator.state.assign(after)
        return before

    def _is_traced(self) -> bool:
        """Return whether the state belongs to a trace."""
        state = self.seed_generator.state.value
        return get_library(state).arrays.is_traced(state)

    def _read(self, state: Any) -> list[int]:
        """Return the drawn seed and the call number as integers."""
        drawn_seed, calls = (int(number) for number in keras.ops.convert_to_numpy(state))
        if not 0 <= calls < 1 << 31:
            raise ValueError(
                f"calls must be below 2**31, the limit of Keras's own state, got {calls}: "
                "give the layer another seed, and set its calls to 0"
            )
        return [drawn_seed, calls]

    def _make_key(self, state: Any, rank: Any) -> Key:
        """Return the key of a call; replicas without a window fold in their rank."""
        key = Key.from_words(state[0], 0) if self._seed is None else self._seed
        return (key if rank is None else key.fold_in(rank)).fold_in(state[1])

    def _roll_back(self, taken: Any, variable: Any) -> None:
        state = variable.value
        is_traced = get_library(state).arrays.is_traced
        if is_traced(state) or is_traced(taken):  # a trace that raises has counted nothing
            return
        drawn_seed, calls = keras.ops.convert_to_numpy(state)
        _, number = keras.ops.convert_to_numpy(taken)
        if calls == number + 1:
            self._set_state(drawn_seed, number)

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> Any:
        """Add the call number to TensorFlow's checkpoints and SavedModels."""
        children = super()._trackable_children(save_type, **kwargs)
        return {**children, _STATE: self.seed_generator.state} if self._counts else children

    def save_own_variables(self, store: Any) -> None:
        """Save Keras's own variables, the call number and the drawn seed."""
        super().save_own_variables(store)
        if self._counts:
            store[_STATE] = keras.ops.convert_to_numpy(self.seed_generator.state.value)

    def load_own_variables(self, store: Any) -> None:
        """Load the call number; a file without one, such as Keras's own, leaves it unchanged.

        A layer with a scheduled rate loads the rate, if the file has one.
        """
        if isinstance(self._rate, keras.Variable) and "0" in store:
            self.rate.assign(store["0"][()])
        if not self._counts or _STATE not in store:
            return
        self._restore_state(store[_STATE][:])

    def _restore_state(self, state: Any) -> None:
        """Set the call number, and without a given seed the drawn seed."""
        drawn_seed, calls = state
        if self.seed is not None:
            drawn_seed = keras.ops.convert_to_numpy(self.seed_generator.state.value)[0]
        self._set_state(drawn_seed, calls)


def _narrow_seed(seed: Any) -> int | None:
    """Return the seed for Keras's own generator, whose 32 bits cannot hold every key."""
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


class _Schedule(float):
    """A number in place of a variable: for a rate above 0, Keras makes a seed generator."""

    variable: Any


def _checked_schedule(rate: Any) -> Any:
    """Return a rate that is a number or a variable for Keras's constructor.

    Raises
    ------
    TypeError
        If it is another object, or a variable that is not of shape () and float32 or float64.
    ValueError
        If the value of the variable is not a rate, or Keras may train it.
    """
    if not isinstance(rate, keras.Variable):
        return _checked_rate(rate)
    if rate.trainable:
        raise ValueError(
            "rate must be a number or a variable that is not trained, got one with trainable=True: "
            "make it by keras.Variable(0.1, trainable=False)"
        )
    kind = keras.backend.standardize_dtype(rate.dtype)
    if tuple(rate.shape) != () or kind not in ("float32", "float64"):
        raise TypeError(
            "rate must be a number or a variable of shape () and dtype float32 or float64, got one "
            f"of shape {tuple(rate.shape)} and dtype {kind}"
        )
    Rate.from_p(float(keras.ops.convert_to_numpy(rate)), "rate")
    schedule = _Schedule(0.5)
    schedule.variable = rate
    return schedule


def _checked_rate(rate: Any, name: str = "rate") -> Any:
    """Raise TypeError unless rate is a number; Keras checks the range, with its own message."""
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        Rate.from_p(rate, name)
    return rate


@keras.saving.register_keras_serializable(package="unidrop")
class Dropout(_SeededLayerMixin, keras.layers.Dropout):
    """Set input units to 0 with a frequency of ``rate`` at each training step.

    Replaces `keras.layers.Dropout`: kept inputs are scaled by ``1 / (1 - rate)``, and inference is
    the identity. In addition, the same seed drops the same units in every framework, and the
    backward pass keeps no mask. ``.keras`` and ``.weights.h5`` files save the call number, so a
    resumed run continues as if never stopped.

    Parameters
    ----------
    rate : int, float or keras.Variable
        Between 0 and 1. Fraction of the input units to drop. A schedule needs a scalar variable of
        float32 or float64 with ``trainable=False``, and assigns to ``layer.rate`` in a callback.
        Then no program is retraced. The layer saves the variable. In a compiled program, a value
        outside [0, 1] makes the output NaN.
    noise_shape : sequence of int or None, optional
        The shape of the mask: for each axis 1, along which units share one decision, or None or the
        input's own length. ``(None, 1, features)`` uses one mask for all timesteps. A length that
        is unknown during tracing is not compared.
    seed : int or unidrop.Key, optional
        Training call n = 0, 1, 2, ... uses the key ``Key(seed).fold_in(n)``. Two layers with one
        seed drop the same units: fold each layer's site into its seed,
        ``seed=Key(42).fold_in("encoder/0")``, or call `assign_seeds`. If None, Keras
        draws a seed when the layer is made.
    **kwargs
        Arguments of `keras.layers.Layer`: name, dtype, trainable, activity_regularizer.

    Attributes
    ----------
    seed : unidrop.Key or None
        The key that call numbers are folded into; None if Keras drew the seed.
    calls : int
        The number of training calls so far. To resume a run, set this one number.

    Raises
    ------
    TypeError
        If rate is neither a number nor such a variable.
    ValueError
        If rate is outside [0, 1], noise_shape holds anything but positive integers and None, or
        seed is neither an integer in [0, 2^64) nor a Key.

    Notes
    -----
    ``.keras`` and ``.weights.h5`` files hold the call number, and so does `tf.train.Checkpoint`. An
    ``.h5`` file of a whole model does, except for layers that custom layers create: then Keras's
    ``save`` warns.

    This layer loads weights that were saved with `keras.layers.Dropout`. The layer of Keras rejects
    the call number of this layer, unless it loads with ``skip_mismatch=True``.

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
        self,
        rate: float | keras.Variable,
        noise_shape: Any = None,
        seed: int | Key | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(_checked_schedule(rate), noise_shape, _narrow_seed(seed), **kwargs)
        self._set_seed(seed)


@keras.saving.register_keras_serializable(package="unidrop")
class AlphaDropout(_SeededLayerMixin, keras.layers.AlphaDropout):
    """Set inputs to the negative limit of SELU at random; keep mean 0 and variance 1.

    Replaces `keras.layers.AlphaDropout`, with its ``noise_shape``; seed, calls and errors are as in
    `Dropout`. At rate 1, all outputs are 0. `unidrop.family.alpha_dropout` has the formula.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import AlphaDropout
    >>> layer = AlphaDropout(0.5, seed=42)
    >>> np.asarray(layer(np.zeros((1, 3), "float32"), training=True)).round(4)
    array([[ 0.7792,  0.7792, -0.7792]], dtype=float32)
    """

    def __init__(
        self, rate: float, noise_shape: Any = None, seed: int | Key | None = None, **kwargs: Any
    ) -> None:
        super().__init__(_checked_rate(rate), noise_shape, _narrow_seed(seed), **kwargs)
        self._set_seed(seed)

    def _make_plan(
        self, inputs: Any, rate: Rate, axes: tuple[int, ...], **options: Any
    ) -> DropoutPlan:
        return plan_alpha_dropout(inputs, rate, broadcast_axes=axes, **options)


@keras.saving.register_keras_serializable(package="unidrop")
class GaussianDropout(_SeededLayerMixin, keras.layers.GaussianDropout):
    """Multiply inputs by normal numbers of mean 1 and variance ``rate / (1 - rate)`` in training.

    Replaces `keras.layers.GaussianDropout`; seed, calls and errors are as in `Dropout`. At rate 1,
    a training call raises ValueError. `unidrop.family.gaussian_dropout` has the formula.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import GaussianDropout
    >>> layer = GaussianDropout(0.5, seed=42)
    >>> np.asarray(layer(np.ones((1, 3), "float32"), training=True)).round(4)
    array([[1.7105, 0.737 , 1.3253]], dtype=float32)
    """

    noise_shape = None

    def __init__(self, rate: float, seed: int | Key | None = None, **kwargs: Any) -> None:
        super().__init__(_checked_rate(rate), _narrow_seed(seed), **kwargs)
        self._set_seed(seed)

    def _make_plan(
        self, inputs: Any, rate: Rate, axes: tuple[int, ...], **options: Any
    ) -> DropoutPlan:
        return plan_gaussian_dropout(inputs, rate, **options)


@keras.saving.register_keras_serializable(package="unidrop")
class GaussianNoise(_SeededLayerMixin, keras.layers.GaussianNoise):
    """Add normal numbers of mean 0 and standard deviation ``stddev`` to inputs in training.

    Replaces `keras.layers.GaussianNoise`, whose ``stddev`` is between 0 and 1; seed, calls and
    errors are as in `Dropout`. `unidrop.family.gaussian_noise` has the formula.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import GaussianNoise
    >>> layer = GaussianNoise(0.1, seed=42)
    >>> np.asarray(layer(np.zeros((1, 3), "float32"), training=True)).round(4)
    array([[ 0.071 , -0.0263,  0.0325]], dtype=float32)
    """

    noise_shape = None

    def __init__(self, stddev: float, seed: int | Key | None = None, **kwargs: Any) -> None:
        super().__init__(_checked_rate(stddev, "stddev"), _narrow_seed(seed), **kwargs)
        self._set_seed(seed)

    @property
    def stddev(self) -> Any:
        """The standard deviation of the noise."""
        return self.rate

    @stddev.setter
    def stddev(self, value: float) -> None:
        self._set_rate(value, "stddev")

    def _make_plan(
        self, inputs: Any, rate: Rate, axes: tuple[int, ...], **options: Any
    ) -> DropoutPlan:
        return plan_gaussian_noise(inputs, rate, stddev=rate.p, **options)


@keras.saving.register_keras_serializable(package="unidrop")
class DropBlock2D(_SeededLayerMixin, keras.layers.Dropout):
    """Drop square blocks of feature maps in training, and scale by the count of the rest.

    Keras itself has no such layer. seed, calls and errors are as in `Dropout`.

    Parameters
    ----------
    rate : int or float
        The share of elements to drop, in [0, 1]. Blocks overlap, so the share is a little smaller.
    block_size : int
        The length of a block, at most the smallest length of a feature map.
    data_format : {"channels_last", "channels_first"}, optional
        The order of axes; Keras's ``image_data_format`` by default.
    seed : int or unidrop.Key, optional
        As in `Dropout`.
    **kwargs
        As in `Dropout`.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import DropBlock2D
    >>> x = np.ones((1, 3, 3, 1), "float32")
    >>> np.asarray(DropBlock2D(0.3, 2, seed=42)(x, training=True))[0, :, :, 0]
    array([[1.8, 1.8, 1.8],
           [1.8, 0. , 0. ],
           [1.8, 0. , 0. ]], dtype=float32)
    """

    _SPATIAL = 2

    def __init__(
        self,
        rate: float,
        block_size: int,
        data_format: str | None = None,
        seed: int | Key | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(_checked_rate(rate), seed=_narrow_seed(seed), **kwargs)
        self.block_size = check_block_size(block_size)
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        if self.data_format not in ("channels_last", "channels_first"):
            raise ValueError(
                f"data_format must be 'channels_last' or 'channels_first', got {data_format!r}"
            )
        self.input_spec = keras.layers.InputSpec(ndim=self._SPATIAL + 2)
        self._set_seed(seed)

    def _make_plan(
        self, inputs: Any, rate: Rate, axes: tuple[int, ...], **options: Any
    ) -> DropoutPlan:
        first = 1 if self.data_format == "channels_last" else 2
        options |= {"block_size": self.block_size, "axes": range(first, first + self._SPATIAL)}
        return plan_drop_block(inputs, rate, **options)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration, with the seed as an integer."""
        config = super().get_config()
        del config["noise_shape"]
        return {**config, "block_size": self.block_size, "data_format": self.data_format}


@keras.saving.register_keras_serializable(package="unidrop")
class DropBlock3D(DropBlock2D):
    """Drop cubic blocks of feature maps in training, and scale by the count of the rest.

    Inputs have three spatial axes. Everything else is as in `DropBlock2D`.
    """

    _SPATIAL = 3


@keras.saving.register_keras_serializable(package="unidrop")
class PatchDropout(_SeededLayerMixin, keras.layers.Dropout):
    """Remove tokens of each example in training, so that the layers after it take less time.

    Keras itself has no such layer. The output of a training call has fewer tokens than the input,
    and the symbolic output of a functional model has all. seed, calls and errors are as in
    `Dropout`.

    Parameters
    ----------
    rate : int or float, default 0.5
        The share of tokens to remove, in [0, 1).
    num_prefix_tokens : int, default 1
        The number of first tokens to keep, such as a class token.
    ordered : bool, default False
        If True, kept tokens stay in order; otherwise their order is random.
    seed : int or unidrop.Key, optional
        As in `Dropout`.
    **kwargs
        As in `Dropout`.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import PatchDropout
    >>> layer = PatchDropout(0.5, ordered=True, seed=42)
    >>> np.asarray(layer(np.arange(9.0)[None], training=True))
    array([[0., 1., 2., 4., 7.]], dtype=float32)
    """

    def __init__(
        self,
        rate: float = 0.5,
        num_prefix_tokens: int = 1,
        ordered: bool = False,
        seed: int | Key | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(_checked_rate(rate), seed=_narrow_seed(seed), **kwargs)
        check_patch_rate(rate, "rate")
        self.num_prefix_tokens, self.ordered = check_prefix(num_prefix_tokens), ordered
        self._set_seed(seed)

    def _make_plan(
        self, inputs: Any, rate: Rate, axes: tuple[int, ...], **options: Any
    ) -> DropoutPlan:
        options |= {"num_prefix_tokens": self.num_prefix_tokens, "ordered": self.ordered}
        return plan_patch_dropout(inputs, rate, **options)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration, with the seed as an integer."""
        config = super().get_config()
        del config["noise_shape"]
        own = {"num_prefix_tokens": self.num_prefix_tokens, "ordered": self.ordered}
        return {**config, **own}


@keras.saving.register_keras_serializable(package="unidrop")
class DropKey(_SeededLayerMixin, keras.layers.Dropout):
    """Set scores of attention to minus infinity in training, before the softmax.

    Keras itself has no such layer. Kept scores are unchanged. Parameters and errors are as in
    `Dropout`. `unidrop.family.drop_key` has the details.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import DropKey
    >>> np.asarray(DropKey(0.5, seed=42)(np.ones((1, 4), "float32"), training=True))
    array([[  1.,   1., -inf, -inf]], dtype=float32)
    """

    def __init__(
        self, rate: float, noise_shape: Any = None, seed: int | Key | None = None, **kwargs: Any
    ) -> None:
        super().__init__(_checked_rate(rate), noise_shape, _narrow_seed(seed), **kwargs)
        self._set_seed(seed)

    def _make_plan(
        self, inputs: Any, rate: Rate, axes: tuple[int, ...], **options: Any
    ) -> DropoutPlan:
        return plan_drop_key(inputs, rate, broadcast_axes=axes, **options)


@keras.saving.register_keras_serializable(package="unidrop")
class DropPath(_SeededLayerMixin, keras.layers.Dropout):
    """Drop whole examples of a residual branch in training: stochastic depth.

    Keras itself has no such layer, and the layers of KerasHub differ from each other. Kept examples
    are scaled by ``1 / (1 - rate)``, and dropped ones are 0. seed, calls and errors are as in
    `Dropout`.

    Parameters
    ----------
    rate : int, float or keras.Variable, default 0.5
        The probability of dropping an example, in [0, 1].
    mode : {"row", "batch"}, default "row"
        "row" decides for each example, and "batch" once for all.
    scale_by_keep : bool, default True
        If False, kept examples are unchanged.
    seed : int or unidrop.Key, optional
        As in `Dropout`.
    **kwargs
        As in `Dropout`.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import DropPath
    >>> np.asarray(DropPath(0.5, seed=42)(np.ones((4, 1), "float32"), training=True)).ravel()
    array([2., 2., 0., 0.], dtype=float32)
    """

    def __init__(
        self,
        rate: float | keras.Variable = 0.5,
        mode: Mode = "row",
        scale_by_keep: bool = True,
        seed: int | Key | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(_checked_schedule(rate), seed=_narrow_seed(seed), **kwargs)
        check_mode(mode)
        self.mode, self.scale_by_keep = mode, scale_by_keep
        self._set_seed(seed)

    def _make_plan(
        self, inputs: Any, rate: Rate, axes: tuple[int, ...], **options: Any
    ) -> DropoutPlan:
        options |= {"mode": self.mode, "scale_by_keep": self.scale_by_keep}
        return plan_drop_path(inputs, rate, **options)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration, with the seed as an integer."""
        config = super().get_config()
        del config["noise_shape"]
        return {**config, "mode": self.mode, "scale_by_keep": self.scale_by_keep}


class _SpatialDropoutMixin(_SeededLayerMixin):
    """Keras's own noise shape of whole feature maps, for the three spatial layers."""

    def _make_noise_shape(self, inputs: Any) -> Any:
        return [1 if isinstance(n, int) and n == 1 else None for n in self._get_noise_shape(inputs)]


@keras.saving.register_keras_serializable(package="unidrop")
class SpatialDropout1D(_SpatialDropoutMixin, keras.layers.SpatialDropout1D):
    """Drop whole feature maps of a (samples, timesteps, channels) input.

    Replaces `keras.layers.SpatialDropout1D`; seed, calls and errors are as in `Dropout`.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import SpatialDropout1D
    >>> np.asarray(SpatialDropout1D(0.5, seed=42)(np.ones((1, 2, 3), "float32"), training=True))
    array([[[2., 2., 0.],
            [2., 2., 0.]]], dtype=float32)
    """

    def __init__(
        self,
        rate: float | keras.Variable,
        seed: int | Key | None = None,
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(_checked_schedule(rate), seed=_narrow_seed(seed), name=name, dtype=dtype)
        self._set_seed(seed)


@keras.saving.register_keras_serializable(package="unidrop")
class SpatialDropout2D(_SpatialDropoutMixin, keras.layers.SpatialDropout2D):
    """Drop whole feature maps of a 4D input.

    Replaces `keras.layers.SpatialDropout2D`, with its ``data_format``; seed, calls and errors are
    as in `Dropout`.
    """

    def __init__(
        self,
        rate: float | keras.Variable,
        data_format: str | None = None,
        seed: int | Key | None = None,
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(_checked_schedule(rate), data_format, _narrow_seed(seed), name, dtype)
        self._set_seed(seed)


@keras.saving.register_keras_serializable(package="unidrop")
class SpatialDropout3D(_SpatialDropoutMixin, keras.layers.SpatialDropout3D):
    """Drop whole feature maps of a 5D input.

    Replaces `keras.layers.SpatialDropout3D`, with its ``data_format``; seed, calls and errors are
    as in `Dropout`.
    """

    def __init__(
        self,
        rate: float | keras.Variable,
        data_format: str | None = None,
        seed: int | Key | None = None,
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(_checked_schedule(rate), data_format, _narrow_seed(seed), name, dtype)
        self._set_seed(seed)


class _SeededAttentionMixin(keras.layers.Layer):
    """Dropout of attention weights by a `Dropout` layer, for layers that also derive from Keras's.

    The inner layer holds the seed and the call number, and Keras saves it with the outer layer.
    """

    def _set_dropout(self, seed: int | Key | None) -> None:
        self._dropout_layer = Dropout(
            self.dropout,
            seed=seed,
            dtype=self.dtype_policy,
            autocast=self.autocast,
            name=self.name,  # for messages, whose reader made the outer layer
        )

    def __setattr__(self, name: str, value: Any) -> None:
        # In `build`, Keras would set its own dropout layer.
        if name != "_dropout_layer" or isinstance(value, Dropout):
            super().__setattr__(name, value)

    def _get_dropout_layer(self) -> Any:
        """Return the inner layer; None while Keras's constructor runs."""
        return getattr(self, "_dropout_layer", None)

    @property
    def dropout(self) -> Any:
        """The fraction of the attention weights to drop."""
        return self._dropout

    @dropout.setter
    def dropout(self, value: float) -> None:
        layer = self._get_dropout_layer()
        if layer is not None:
            layer._set_rate(value, "dropout")
        self._dropout = _checked_rate(value, "dropout")

    @property
    def seed(self) -> Key | None:
        """The key of the layer; None if Keras drew a seed."""
        return self._dropout_layer.seed

    @seed.setter
    def seed(self, value: int | Key | None) -> None:
        layer = self._get_dropout_layer()
        if layer is not None:
            layer.seed = value

    @property
    def calls(self) -> int:
        """The number of training calls so far; set it to resume a run or follow a global step."""
        return self._dropout_layer.calls

    @calls.setter
    def calls(self, value: SupportsIndex) -> None:
        self._dropout_layer.calls = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run attention; a call that raises after the dropout counts no more than one before it."""
        layer = self._dropout_layer
        if not layer._counts or layer._is_traced():  # a trace that raises has counted nothing
            return super().__call__(*args, **kwargs)
        taken: list[Any] = []
        token = _attending.set((layer, taken))
        try:
            return super().__call__(*args, **kwargs)
        except BaseException:
            variable = layer.seed_generator.state
            for state in reversed(taken):
                run_exclusively(variable, layer._roll_back, state, variable)
            raise
        finally:
            _attending.reset(token)

    def rematerialized_call(self, layer_call: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the call unchanged, under `keras.RematScope` too.

        Keras would count the second call, which then had another mask.
        """
        return layer_call

    def get_config(self) -> dict[str, Any]:
        """Return Keras's configuration, with the seed as an integer, as `Dropout` does."""
        config: dict[str, Any] = super().get_config()
        inner = self._dropout_layer.get_config()
        return {**config, **{name: inner[name] for name in ("seed", _STATE) if name in inner}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make a layer of its configuration."""
        layer = super().from_config({name: config[name] for name in config if name != _STATE})
        layer._dropout_layer._restore_config(config)
        return layer


class _SeededProjectionMixin(_SeededAttentionMixin):
    """The `build` of layers whose projections Keras makes together with a dropout layer."""

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        """Build the projections; at rate 0, Keras's dropout layer needs no seed."""
        rate, self._dropout = self._dropout, 0.0
        try:
            super().build(query_shape, value_shape, key_shape)
        finally:
            self._dropout = rate


@keras.saving.register_keras_serializable(package="unidrop")
class MultiHeadAttention(_SeededProjectionMixin, keras.layers.MultiHeadAttention):
    """Multi-head attention that drops attention weights under keys.

    Replaces `keras.layers.MultiHeadAttention`. Training call n = 0, 1, 2, ... keeps the weights
    ``keep_mask((batch, heads, queries, keys), dropout, Key(seed).fold_in(n))``, and so does
    attention with this key in every framework. Saving, seed and calls are as in `Dropout`.

    Parameters
    ----------
    num_heads, key_dim, value_dim : int
        As in `keras.layers.MultiHeadAttention`.
    dropout : int or float
        Between 0 and 1. Fraction of the attention weights to drop.
    *args, **kwargs
        Further arguments of `keras.layers.MultiHeadAttention`.
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
        If dropout is not a Python number.
    ValueError
        If dropout is outside [0, 1], or above 0 with flash attention, or seed is neither an integer
        in [0, 2^64) nor a Key.

    Notes
    -----
    If ``attention_axes`` leaves out axes of the sequence, the mask has the shape (batch, other
    axes, heads, query axes, key axes).

    The scores that ``return_attention_scores=True`` returns are from before the dropout, as in
    Keras.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.keras import MultiHeadAttention
    >>> layer = MultiHeadAttention(2, 8, dropout=0.1, seed=Key(42).fold_in("encoder/0"))
    >>> x = np.ones((1, 5, 16), "float32")
    >>> layer(x, x, training=True).shape
    TensorShape([1, 5, 16])
    >>> layer.calls
    1
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        *args: Any,
        seed: int | Key | None = None,
        **kwargs: Any,
    ) -> None:
        rate = _checked_rate(dropout, "dropout")
        narrow = _narrow_seed(seed)
        super().__init__(num_heads, key_dim, value_dim, rate, *args, seed=narrow, **kwargs)
        self._set_dropout(seed)


@keras.saving.register_keras_serializable(package="unidrop")
class GroupedQueryAttention(_SeededProjectionMixin, keras.layers.GroupQueryAttention):
    """Attention whose heads of keys and values serve groups of query heads.

    Replaces `keras.layers.GroupQueryAttention`. The mask has the shape (batch, query heads,
    queries, keys). Everything else is as in `MultiHeadAttention`.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import GroupQueryAttention
    >>> layer = GroupQueryAttention(8, 4, 2, dropout=0.1, seed=42)
    >>> x = np.ones((1, 5, 16), "float32")
    >>> layer(x, x, training=True).shape
    TensorShape([1, 5, 16])
    """

    def __init__(
        self,
        head_dim: int,
        num_query_heads: int,
        num_key_value_heads: int,
        dropout: float = 0.0,
        *args: Any,
        seed: int | Key | None = None,
        **kwargs: Any,
    ) -> None:
        rate = _checked_rate(dropout, "dropout")
        heads = num_query_heads, num_key_value_heads
        super().__init__(head_dim, *heads, rate, *args, seed=_narrow_seed(seed), **kwargs)
        self._set_dropout(seed)


# Keras too exports its class by another name. Files of weights contain the name of the class.
GroupQueryAttention = GroupedQueryAttention


@keras.saving.register_keras_serializable(package="unidrop")
class Attention(_SeededAttentionMixin, keras.layers.Attention):
    """Dot-product attention without projections that drops attention weights under keys.

    Replaces `keras.layers.Attention`. The mask has the shape (batch, queries, keys), or more axes
    if the inputs have. Everything else is as in `MultiHeadAttention`, but as in Keras, the scores
    that ``return_attention_scores=True`` returns are from after the dropout.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import Attention
    >>> query, value = np.zeros((1, 2, 4), "float32"), np.eye(4, dtype="float32")[None]
    >>> np.asarray(Attention(dropout=0.5, seed=42)([query, value], training=True))
    array([[[0.5, 0.5, 0. , 0. ],
            [0.5, 0. , 0. , 0.5]]], dtype=float32)
    """

    def __init__(
        self,
        use_scale: bool = False,
        score_mode: str = "dot",
        dropout: float = 0.0,
        seed: int | Key | None = None,
        **kwargs: Any,
    ) -> None:
        # At rate 0, Keras makes no seed generator, which nothing would use.
        super().__init__(use_scale, score_mode, 0.0, **kwargs)
        self.dropout = dropout
        self._set_dropout(seed)

    def _apply_scores(
        self, scores: Any, value: Any, scores_mask: Any = None, training: bool = False
    ) -> tuple[Any, Any]:
        """Return the output and the attention weights, dropped in training."""
        if not training or self.dropout == 0:
            output, weights = super()._apply_scores(scores, value, scores_mask, training)
            return output, weights
        # Keras's masked softmax, with values that have no features to add up.
        _, weights = super()._apply_scores(scores, value[..., :0], scores_mask)
        weights = self._dropout_layer(weights, training=True)
        return keras.ops.matmul(weights, value), weights
