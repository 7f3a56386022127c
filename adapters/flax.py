"""Dropout and attention for Flax: modules of `flax.nnx` under keys, with runs that resume.

Flax documentation: flax.nnx.Dropout, flax.nnx.MultiHeadAttention (0.12).
"""

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar
from weakref import WeakSet

import jax
from flax import nnx, serialization
from flax.errors import TraceContextError
from jax import numpy as jnp

from unidrop.adapters.calls import run_counted
from unidrop.adapters.flax_attention import dot_product_attention
from unidrop.adapters.frames import list_callers
from unidrop.adapters.jax.functional import as_array, as_key, check_lengths
from unidrop.adapters.jax.word_dropout import as_tokens
from unidrop.adapters.numpy.arrays import check_plain
from unidrop.adapters.seeds import warn_of_equal_seeds
from unidrop.arguments import checked_integer
from unidrop.drop_block import check_block_size, plan_drop_block
from unidrop.drop_head import plan_drop_head
from unidrop.embedding import look_up, plan_embedding_dropout
from unidrop.family import Mode, check_mode, plan_alpha_dropout, plan_drop_key, plan_drop_path
from unidrop.gaussian import NOISE_RATE, check_stddev, plan_gaussian_dropout, plan_gaussian_noise
from unidrop.key import Key
from unidrop.library import get_library
from unidrop.mask import keep_mask
from unidrop.permutation import check_patch_rate, check_prefix, plan_patch_dropout
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.schedule import ScheduledRate, make_rate
from unidrop.word_dropout import check_tokens, plan_word_dropout
from unidrop.zoneout import expect_zoneout, plan_zoneout

__all__ = [
    "AlphaDropout",
    "DropBlock",
    "DropConnect",
    "DropHead",
    "DropKey",
    "DropPath",
    "Dropout",
    "DropoutCalls",
    "Embed",
    "GaussianDropout",
    "GaussianNoise",
    "LayerDrop",
    "MultiHeadAttention",
    "PatchDropout",
    "WordDropout",
    "Zoneout",
    "assign_seeds",
    "dot_product_attention",
]

M = TypeVar("M", bound=nnx.Module)

# The modules that looked for others with their seed. An attribute would make nnx.jit retrace.
_CHECKED: "WeakSet[Any]" = WeakSet()

_NO_CALLS = (
    "this module counts no calls, because it was made without a seed, with keys from rngs: "
    "to have calls, make it with seed=, an int or a unidrop.Key"
)

_NOT_CARRIED = (
    "Each call would have the same mask, so let the transformation carry the call number, as "
    "in nnx.scan(in_axes=(nnx.StateAxes({DropoutCalls: nnx.Carry, ...: None}), 0)), or use the "
    "function with a key, unidrop.adapters.jax.dropout(x, rate, key.fold_in(i))"
)

_SCAN = nnx.transforms.iteration.ScanFn.__call__.__code__


def _to_state_dict(key: Key) -> dict[str, Any]:
    lo, hi = jax.tree.leaves(key)
    return {"lo": lo, "hi": hi}


def _from_state_dict(_: Key, state: dict[str, Any]) -> Key:
    return Key.from_words(state["lo"], state["hi"])


# Saved trees, such as an optimizer's state, may hold keys.
serialization.register_serialization_state(Key, _to_state_dict, _from_state_dict, override=True)


class DropoutCalls(nnx.Variable[jax.Array]):
    """The number of training calls of a module with a seed, modulo 2^32: a ``uint32`` scalar."""


class _SeededModule(nnx.Module):
    """A module whose training calls have numbers, if it has a seed."""

    _RATE = "rate"  # the name of the attribute

    seed: Key | None

    if TYPE_CHECKING:  # at run time nnx keeps the variable among the module's attributes

        @property
        def calls(self) -> DropoutCalls:
            """The number of training calls so far."""

        @calls.setter
        def calls(self, value: SupportsIndex | jax.Array | DropoutCalls) -> None: ...

    def _init_seed(self, seed: int | Key | None) -> None:
        key = seed if seed is None or isinstance(seed, Key) else Key(seed)
        # A traced key, as in layers that are made under nnx.vmap, belongs to the state.
        self.seed = nnx.data(key) if key is not None and key.is_traced else key

    def _run_counted(self, call: Callable[[Key], Any], rate: Rate | None = None) -> Any:
        """Return the result of a call with the key of the next call number.

        A call at a scheduled rate of 0 does not count.
        """
        seed = self.seed
        assert seed is not None
        if self not in _CHECKED:
            _warn_of_twins(self)
        return run_counted(
            partial(_take_number, rate=rate),
            _roll_back,
            lambda number: call(seed.fold_in(number)),
            self.calls,
        )

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError, with a hint for ``calls``."""
        if name == "calls":
            raise AttributeError(_NO_CALLS)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "seed" and isinstance(value, int | str):
            value = Key(value)  # type: ignore[arg-type] # raises for a string
        if name == "seed":
            _CHECKED.discard(self)
        if name == "seed" and value is not None and "calls" not in vars(self):
            self.calls = DropoutCalls(jnp.zeros((), jnp.uint32))
        if name != "calls" or isinstance(value, nnx.Variable):
            super().__setattr__(name, value)
        elif "calls" in vars(self):
            self.calls.set_value(_as_call_number(value))
        else:
            raise AttributeError(_NO_CALLS)


class Dropout(_SeededModule, nnx.Dropout):
    """Drop elements with probability rate in training, and scale the rest by 1 / (1 - rate).

    Replaces `flax.nnx.Dropout`: `train`, `eval`, ``deterministic`` in the constructor or the call,
    and ``rngs`` work as they do there. In addition, the same key drops the same elements in every
    framework, and the backward pass keeps no mask. With a seed the module counts its calls, so a
    resumed run continues as if never stopped.

    Parameters
    ----------
    rate : int, float, or 0-d jax.Array or nnx.Variable
        The probability of dropping an element, in [0, 1]. A schedule may set the value of a
        variable of float32 or float64, ``module.rate.set_value(x)``, and `nnx.jit` does not
        retrace. In a program, a value outside [0, 1] makes the output NaN. With ``rngs``, a program
        draws a key at rate 0 too.
    broadcast_dims : sequence of int, default ()
        Axes along which elements share one decision.
    deterministic : bool or None, default False
        If True, inputs are returned unchanged.
    rng_collection : str, default "dropout"
        The name of the stream of ``rngs`` to use.
    rngs : nnx.Rngs or nnx.RngStream, optional
        The source of keys if there is no seed, one key for each training call. Ignored with a seed.
    seed : int or unidrop.Key, optional
        Training call n = 0, 1, 2, ... uses the key ``Key(seed).fold_in(n)``. Two modules with one
        seed drop the same units: fold each module's site into its seed,
        ``seed=Key(42).fold_in("encoder/0")``, or call `assign_seeds`.

    Attributes
    ----------
    seed : unidrop.Key or None
        The key that call numbers are folded into; None without a seed.
    calls : DropoutCalls
        The number of training calls so far: with a seed, a variable of the module's state, which
        `nnx.jit`, `nnx.grad`, `nnx.scan` and `nnx.remat` carry. May be set, ``module.calls = 7``.
        Without a seed, reading or setting it raises AttributeError.

    Raises
    ------
    TypeError
        If rate is neither a number nor such an array, rngs of another type, or seed neither an
        integer nor a Key.
    ValueError
        If rate is outside [0, 1], or seed outside [0, 2^64).

    Notes
    -----
    Under `nnx.remat` the recomputation reuses the call number of the first computation. The number
    has 32 bits, because JAX by default has no larger integers: call 2^32 is number 0 again, with
    the same mask.

    With a seed, ``calls`` is the whole state. With ``rngs`` the state is the same as in
    `flax.nnx.Dropout`, and `nnx.update` accepts either module's state in the other. The state of a
    stream does not fit a module with a seed: `nnx.update` raises ValueError. A checkpoint without
    ``calls`` loads by `nnx.replace_by_pure_dict` and `nnx.update`, which leave the number
    unchanged; `flax.serialization.from_bytes` requires a value for every entry of its target.

    N. Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
    JMLR 15 (2014).

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.flax import Dropout
    >>> module = Dropout(0.5, seed=Key(42).fold_in("encoder/0"))
    >>> module(jax.numpy.ones(6))
    Array([2., 0., 0., 2., 2., 2.], dtype=float32)
    >>> int(module.calls)
    1
    """

    _HAS_SCHEDULE = True  # the rate may be an array

    def __init__(
        self,
        rate: float | jax.Array | nnx.Variable[jax.Array],
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        seed: int | Key | None = None,
    ) -> None:
        self._read_rate(rate, jnp.zeros(0))
        super().__init__(
            rate,
            broadcast_dims=broadcast_dims,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs if seed is None else None,
        )
        self._init_seed(seed)

    def __call__(
        self,
        inputs: Any,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | Key | None = None,
    ) -> jax.Array:
        """Apply dropout in training, and the identity otherwise.

        Parameters
        ----------
        inputs : jax.Array
            Any shape, of a floating-point or complex dtype.
        deterministic : bool, optional
            Takes precedence over the constructor's.
        rngs : nnx.Rngs, nnx.RngStream, jax.Array or unidrop.Key, optional
            The key of this call, or the source of the key. Takes precedence over the constructor's
            and over the seed. A call with its own rngs is not counted.

        Returns
        -------
        jax.Array
            Of the inputs' shape and dtype.

        Raises
        ------
        TypeError
            If inputs have an integer or bool dtype, or rngs another type.
        ValueError
            If ``deterministic`` is None here and in the constructor, or a training call has no key.
        """
        check_plain(type(inputs), "inputs")
        if self._keeps_all(deterministic):
            return inputs
        if isinstance(inputs, nnx.Variable):
            inputs = inputs.get_value()
        x = self._as_array(inputs)
        check_lengths(x, "inputs")
        # The plan checks the inputs before a call is counted or a key drawn.
        rate = self._read_rate(self.rate, x)
        plan = self._make_plan(x, rate)
        if not plan.drops:  # the present value of a scheduled rate is 0
            return x
        drop = partial(_drop, x, plan)
        return self._run_with_key(drop, rngs, rate)

    def _as_array(self, inputs: Any) -> Any:
        return as_array(inputs, "inputs")

    def _run_with_key(self, drop: Callable[[Key], Any], rngs: Any, rate: Rate | None = None) -> Any:
        """Return ``drop(key)`` for the key of a training call."""
        if rngs is None and self.seed is not None:
            return self._run_counted(drop, rate)
        return drop(self._draw_key(rngs))

    def _keeps_all(self, deterministic: bool | None) -> bool:
        """Return whether a call drops nothing; raises ValueError if that is unknown."""
        if deterministic is None:
            deterministic = self.deterministic
        if deterministic is None:
            raise ValueError(
                "Dropout must know whether to drop: pass `deterministic` to the constructor or "
                "to the call, or use `nnx.view(model, deterministic=...)`"
            )
        return bool(deterministic) or (isinstance(self.rate, int | float) and self.rate == 0)

    def _read_rate(self, rate: Any, x: jax.Array) -> Rate:
        """Return the rate for an array; raises TypeError or ValueError unless it is one."""
        if not self._HAS_SCHEDULE:
            return Rate.from_p(rate, "rate")
        return make_rate(rate.get_value() if isinstance(rate, nnx.Variable) else rate, x, "rate")

    def _make_plan(self, x: jax.Array, rate: Rate) -> DropoutPlan:
        """Return the plan of a call."""
        return DropoutPlan.from_args(x, rate, broadcast_axes=self.broadcast_dims, name="inputs")

    def _draw_key(self, rngs: Any) -> Key:
        """Return the key of a call, from its rngs or the ones of the module."""
        rngs = self.rngs if rngs is None else rngs
        if rngs is None:
            raise ValueError(
                "`deterministic` is False, but Dropout has neither a seed nor rngs: pass one of "
                "them to the constructor, or `rngs` to the call"
            )
        if isinstance(rngs, nnx.Rngs):
            rngs = rngs[self.rng_collection]
        if isinstance(rngs, nnx.RngStream):
            rngs = rngs()
        if not isinstance(rngs, jax.Array | Key):
            raise TypeError(
                "rngs must be an nnx.Rngs, an nnx.RngStream, a key of jax.random or a "
                f"unidrop.Key, got {type(rngs)}"
            )
        return as_key(rngs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "key":
            raise AttributeError("the key of a module is its attribute `seed`")
        super().__setattr__(name, value)


def _drop(x: jax.Array, plan: DropoutPlan, key: Key) -> jax.Array:
    y: jax.Array = plan.apply(x, as_key(key))
    return y


class AlphaDropout(Dropout):
    """Set elements to the negative limit of SELU in training; keep mean 0 and variance 1.

    Parameters, attributes, calls and errors are as in `Dropout`; complex inputs raise TypeError.
    With ``broadcast_dims``, whole channels are dropped. `unidrop.family.alpha_dropout` has the
    formula.

    Examples
    --------
    >>> import jax
    >>> from unidrop.adapters.flax import AlphaDropout
    >>> AlphaDropout(0.5)(jax.numpy.ones(6), rngs=jax.random.key(42)) > 0
    Array([ True, False, False, False, False,  True], dtype=bool)
    """

    _HAS_SCHEDULE = False

    def _make_plan(self, x: jax.Array, rate: Rate) -> DropoutPlan:
        return plan_alpha_dropout(x, rate, broadcast_axes=self.broadcast_dims, name="inputs")


class DropKey(Dropout):
    """Set scores of attention to minus infinity in training, before the softmax.

    Parameters, attributes, calls and errors are as in `Dropout`; complex inputs raise TypeError.
    `unidrop.family.drop_key` has the details.

    Examples
    --------
    >>> import jax
    >>> from unidrop.adapters.flax import DropKey
    >>> DropKey(0.5)(jax.numpy.ones(6), rngs=jax.random.key(42))
    Array([  1., -inf, -inf, -inf, -inf,   1.], dtype=float32)
    """

    _HAS_SCHEDULE = False

    def _make_plan(self, x: jax.Array, rate: Rate) -> DropoutPlan:
        return plan_drop_key(x, rate, broadcast_axes=self.broadcast_dims, name="inputs")


class DropHead(Dropout):
    """Drop whole heads of attention in training.

    `unidrop.family.drop_head` has the details.

    Parameters
    ----------
    rate : int or float
        The probability of dropping a head of an example, in [0, 1].
    axis : int, default -2
        The axis of heads, as in ``(batch, length, heads, features)``.
    deterministic, rng_collection, rngs, seed
        As in `Dropout`.

    Examples
    --------
    >>> import jax
    >>> from unidrop.adapters.flax import DropHead
    >>> DropHead(0.5)(jax.numpy.ones((1, 1, 6, 1)), rngs=jax.random.key(42)).ravel()
    Array([2., 0., 0., 0., 0., 2.], dtype=float32)
    """

    def __init__(
        self,
        rate: float,
        *,
        axis: int = -2,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        seed: int | Key | None = None,
    ) -> None:
        super().__init__(
            rate,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
            seed=seed,
        )
        self.axis = axis

    def _make_plan(self, x: jax.Array, rate: Rate) -> DropoutPlan:
        return plan_drop_head(x, rate, axis=self.axis, name="inputs")


class GaussianDropout(Dropout):
    """In training, multiply inputs by normal numbers of mean 1 and variance rate / (1 - rate).

    Parameters, attributes, calls and errors are as in `Dropout`; complex inputs raise TypeError,
    and a rate of 1 raises ValueError. `unidrop.family.gaussian_dropout` has the formula.

    Examples
    --------
    >>> import jax
    >>> from unidrop.adapters.flax import GaussianDropout
    >>> GaussianDropout(0.5)(jax.numpy.ones(3), rngs=jax.random.key(42)).round(2)
    Array([1.37, 1.04, 0.5 ], dtype=float32)
    """

    _HAS_SCHEDULE = False

    def _make_plan(self, x: jax.Array, rate: Rate) -> DropoutPlan:
        axes = self.broadcast_dims
        return plan_gaussian_dropout(x, rate, broadcast_axes=axes, name="inputs")


class GaussianNoise(Dropout):
    """In training, add normal numbers of mean 0 and standard deviation stddev to inputs.

    Parameters
    ----------
    stddev : int or float
        The standard deviation, at least 0. A schedule may set the attribute.
    deterministic, rng_collection, rngs, seed
        As in `Dropout`.

    Examples
    --------
    >>> import jax
    >>> from unidrop.adapters.flax import GaussianNoise
    >>> GaussianNoise(0.1)(jax.numpy.zeros(3), rngs=jax.random.key(42)).round(2)
    Array([ 0.04,  0.  , -0.05], dtype=float32)
    """

    _HAS_SCHEDULE = False

    def __init__(
        self,
        stddev: float,
        *,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        seed: int | Key | None = None,
    ) -> None:
        super().__init__(
            NOISE_RATE,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
            seed=seed,
        )
        self.stddev = stddev

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "stddev":  # at rate 0, a call does nothing
            self.rate = NOISE_RATE if check_stddev(value) > 0 else 0.0
        super().__setattr__(name, value)

    def _make_plan(self, x: jax.Array, rate: Rate) -> DropoutPlan:
        return plan_gaussian_noise(x, rate, stddev=self.stddev, name="inputs")


class DropBlock(Dropout):
    """Drop blocks of feature maps in training, and scale by the count of the rest.

    Parameters
    ----------
    rate : int or float
        The share of elements to drop, in [0, 1]. Blocks overlap, so the share is a little smaller.
    block_size : int
        The length of a block along each of the axes.
    axes : sequence of int
        The axes of a block, such as ``(1, 2)`` for images of shape ``(N, H, W, C)``.
    deterministic, rng_collection, rngs, seed
        As in `Dropout`.

    Examples
    --------
    >>> import jax
    >>> from unidrop.adapters.flax import DropBlock
    >>> module = DropBlock(0.5, block_size=2, axes=(1,))
    >>> module(jax.numpy.ones((1, 6)), rngs=jax.random.key(42)).round(4)
    Array([[3., 0., 0., 3., 0., 0.]], dtype=float32)
    """

    _HAS_SCHEDULE = False

    def __init__(
        self,
        rate: float,
        *,
        block_size: int,
        axes: Sequence[int],
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        seed: int | Key | None = None,
    ) -> None:
        super().__init__(
            rate,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
            seed=seed,
        )
        self.block_size, self.axes = check_block_size(block_size), tuple(axes)

    def _make_plan(self, x: jax.Array, rate: Rate) -> DropoutPlan:
        return plan_drop_block(x, rate, block_size=self.block_size, axes=self.axes, name="inputs")


class PatchDropout(Dropout):
    """Remove tokens of each example in training, so that the modules after it take less time.

    Parameters
    ----------
    rate : int or float, default 0.5
        The share of tokens to remove, in [0, 1).
    num_prefix_tokens : int, default 1
        The number of first tokens to keep, such as a class token.
    ordered : bool, default False
        If True, kept tokens stay in order; otherwise their order is random.
    deterministic, rng_collection, rngs, seed
        As in `Dropout`.

    Examples
    --------
    >>> import jax
    >>> from unidrop.adapters.flax import PatchDropout
    >>> module = PatchDropout(0.5, ordered=True)
    >>> module(jax.numpy.arange(9.0)[None], rngs=jax.random.key(42))
    Array([[0., 1., 3., 5., 7.]], dtype=float32)
    """

    _HAS_SCHEDULE = False

    def __init__(
        self,
        rate: float = 0.5,
        *,
        num_prefix_tokens: int = 1,
        ordered: bool = False,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        seed: int | Key | None = None,
    ) -> None:
        check_patch_rate(rate, "rate")
        super().__init__(
            rate,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
            seed=seed,
        )
        self.num_prefix_tokens, self.ordered = check_prefix(num_prefix_tokens), ordered

    def _make_plan(self, x: jax.Array, rate: Rate) -> DropoutPlan:
        options: dict[str, Any] = {"num_prefix_tokens": self.num_prefix_tokens, "name": "inputs"}
        return plan_patch_dropout(x, rate, ordered=self.ordered, **options)


class DropPath(Dropout):
    """Drop whole examples of a residual branch in training: stochastic depth.

    Parameters
    ----------
    rate : int, float, or 0-d jax.Array or nnx.Variable
        The probability of dropping an example, in [0, 1].
    mode : {"row", "batch"}, default "row"
        "row" decides for each element of the first axis, and "batch" once for all.
    scale_by_keep : bool, default True
        If False, kept examples are unchanged; otherwise they are scaled by 1 / (1 - rate).
    deterministic, rng_collection, rngs, seed
        As in `Dropout`.

    Examples
    --------
    >>> import jax
    >>> from unidrop.adapters.flax import DropPath
    >>> DropPath(0.5)(jax.numpy.ones((4, 1)), rngs=jax.random.key(42)).ravel()
    Array([2., 0., 0., 0.], dtype=float32)
    """

    def __init__(
        self,
        rate: float | jax.Array | nnx.Variable[jax.Array],
        *,
        mode: Mode = "row",
        scale_by_keep: bool = True,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        seed: int | Key | None = None,
    ) -> None:
        check_mode(mode)
        super().__init__(
            rate,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
            seed=seed,
        )
        self.mode, self.scale_by_keep = mode, scale_by_keep

    def _make_plan(self, x: jax.Array, rate: Rate) -> DropoutPlan:
        return plan_drop_path(
            x, rate, mode=self.mode, scale_by_keep=self.scale_by_keep, name="inputs"
        )


class DropConnect(nnx.Module):
    """Drop weights of a module in training.

    With ``K = Key(seed).fold_in(n)``, training call n = 0, 1, 2, ... runs the module with
    ``dropout(weight, rate, K.fold_in(name))`` in place of the variable of each name.

    Parameters
    ----------
    module : nnx.Module
        The module, such as a `flax.nnx.Linear`.
    rate : int or float, default 0.5
        The probability of dropping a weight, in [0, 1].
    names : str or sequence of str, default ("kernel",)
        The variables to drop, by their attributes, such as "dense_h.kernel" of an
        `nnx.OptimizedLSTMCell`.
    deterministic, rng_collection, rngs, seed
        As in `Dropout`.

    Attributes
    ----------
    module : nnx.Module
        The module, which keeps its variables.
    dropout : Dropout
        The module that has the rate, the seed and the call number: ``module.dropout.calls``.
    names : tuple of str
        The names of the variables.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`; ValueError if the module has no variable of a name, or there are no names.

    Notes
    -----
    L. Wan et al., "Regularization of neural networks using DropConnect", ICML 2013.

    Examples
    --------
    >>> import jax
    >>> from flax import nnx
    >>> from unidrop.adapters.flax import DropConnect
    >>> linear = nnx.Linear(1, 4, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    >>> DropConnect(linear, 0.5, seed=1)(jax.numpy.ones(1))
    Array([2., 0., 0., 2.], dtype=float32)
    """

    def __init__(
        self,
        module: nnx.Module,
        rate: float = 0.5,
        names: str | Sequence[str] = ("kernel",),
        *,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        seed: int | Key | None = None,
    ) -> None:
        self.module = module
        self.names = (names,) if isinstance(names, str) else tuple(names)
        self.dropout = Dropout(
            rate,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
            seed=seed,
        )
        self._find_weights()

    def _find_weights(self) -> dict[str, Any]:
        """Return the variables to drop, by their names."""
        found: dict[str, Any] = {}
        for name in self.names:
            found[name] = self.module
            for part in name.split("."):
                found[name] = getattr(found[name], part, None)
        if not found or not all(isinstance(v, nnx.Variable) for v in found.values()):
            raise ValueError(f"names must be variables of the module, got {self.names}")
        return found

    def __call__(
        self,
        *args: Any,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | Key | None = None,
        **options: Any,
    ) -> Any:
        """Run the module, with dropped weights in training.

        deterministic and rngs are as in the calls of `Dropout`; the module has the others.
        """
        dropout = self.dropout
        if dropout._keeps_all(deterministic):
            return self.module(*args, **options)
        weights = self._find_weights()
        rate = Rate.from_p(dropout.rate, "rate")
        plans = {
            name: DropoutPlan.from_args(weight.get_value(), rate, name=name)
            for name, weight in weights.items()
        }

        def call(key: Key) -> Any:
            module: Any = self.module
            for name, weight in weights.items():
                dropped = _drop(weight.get_value(), plans[name], as_key(key).fold_in(name))
                module = _replace(module, name, weight.replace(dropped))
            return module(*args, **options)

        if rngs is None and dropout.seed is not None:
            return dropout._run_counted(call)
        return call(dropout._draw_key(rngs))


def _replace(module: Any, name: str, variable: Any) -> Any:
    """Return a module with another variable, which shares the rest with the first one."""
    first, _, rest = name.partition(".")
    twin = copy.copy(module)
    # Flax refuses to set attributes of a module that an outer trace has made.
    vars(twin)[first] = _replace(getattr(module, first), rest, variable) if rest else variable
    return twin


class Embed(nnx.Embed):
    """Look up embeddings of words, and drop words everywhere in training.

    Replaces `flax.nnx.Embed`. A dropped word is 0 in all places, and others are scaled by
    1 / (1 - rate). The mask is ordinary dropout of the matrix with ``broadcast_dims=(1,)``, and
    only the rows that are looked up are multiplied. `attend` drops nothing.

    Parameters
    ----------
    num_embeddings, features, **options
        As in `flax.nnx.Embed`.
    rate : int or float, default 0.0
        The probability of dropping a word, in [0, 1].
    deterministic : bool or None, default False
        If True, nothing is dropped.
    rngs : nnx.Rngs
        The source of the matrix, and of the keys if there is no seed.
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Attributes
    ----------
    embedding : nnx.Param
        The matrix.
    dropout : Dropout
        The module that has the rate, the seed and the call number: ``module.dropout.calls``.

    Examples
    --------
    >>> import jax
    >>> from flax import nnx
    >>> from unidrop.adapters.flax import Embed
    >>> module = Embed(
    ...     4, 1, rate=0.5, embedding_init=nnx.initializers.ones, rngs=nnx.Rngs(0), seed=42
    ... )
    >>> module(jax.numpy.array([0, 1, 2, 3, 0])).ravel()
    Array([2., 2., 0., 0., 2.], dtype=float32)
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        rate: float = 0.0,
        deterministic: bool | None = False,
        rngs: nnx.Rngs,
        seed: int | Key | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_embeddings, features, rngs=rngs, **options)
        source = rngs if Rate.from_p(rate, "rate").p > 0 else None
        self.dropout = Dropout(rate, deterministic=deterministic, rngs=source, seed=seed)

    def __call__(
        self,
        inputs: jax.Array,
        out_sharding: Any = None,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | Key | None = None,
    ) -> jax.Array:
        """Look up words, and drop some in training.

        Parameters
        ----------
        inputs : jax.Array
            The words, of an integer dtype.
        out_sharding
            As in `flax.nnx.Embed`; a call that drops words must have none.
        deterministic, rngs
            As in the calls of `Dropout`.

        Raises
        ------
        ValueError
            If ``deterministic`` is None here and in the constructor, a training call has no key, or
            as in Flax.
        """
        dropout = self.dropout
        if dropout._keeps_all(deterministic):
            words: jax.Array = super().__call__(inputs, out_sharding)
            return words
        if out_sharding is not None:
            raise ValueError("out_sharding must be None if words are dropped: shard the output")
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError("Input type must be an integer or unsigned integer.")
        if self.num_embeddings == 1:  # as in Flax, every index is the word
            inputs = jnp.zeros_like(inputs)
        (weight,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype, inexact=False)
        rate = Rate.from_p(dropout.rate, "rate")
        plan = plan_embedding_dropout(weight, rate, name="embedding")
        look_up_all = partial(look_up, plan, weight, inputs)
        if rngs is None and dropout.seed is not None:
            counted: jax.Array = dropout._run_counted(look_up_all)
            return counted
        drawn: jax.Array = look_up_all(dropout._draw_key(rngs))
        return drawn


class Zoneout(Dropout):
    """Keep the old value of each unit of a recurrent state with probability rate in training.

    A call takes the new state and the old one. If deterministic, it returns their expectation.
    `unidrop.family.zoneout` has the details. Parameters, attributes and errors are as in `Dropout`,
    without ``broadcast_dims``.

    Examples
    --------
    >>> import jax
    >>> from unidrop.adapters.flax import Zoneout
    >>> module = Zoneout(0.5)
    >>> module(jax.numpy.ones(6), jax.numpy.zeros(6), rngs=jax.random.key(42))
    Array([1., 0., 0., 0., 0., 1.], dtype=float32)
    """

    _HAS_SCHEDULE = False

    def __init__(
        self,
        rate: float,
        *,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        seed: int | Key | None = None,
    ) -> None:
        super().__init__(
            rate,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
            seed=seed,
        )

    def __call__(  # type: ignore[override] # it takes two states
        self,
        new: Any,
        old: Any,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | Key | None = None,
    ) -> jax.Array:
        """Return the state after a step; parameters and errors are as in `Dropout`."""
        keeps_all = self._keeps_all(deterministic)
        states = []
        for value, name in ((new, "new"), (old, "old")):
            check_plain(type(value), name)
            state = value.get_value() if isinstance(value, nnx.Variable) else value
            states.append(as_array(state, name))
            check_lengths(states[-1], name)
        x, before = states
        plan = plan_zoneout(x, Rate.from_p(self.rate, "rate"), old=before)
        output: jax.Array
        if keeps_all:
            output = expect_zoneout(plan, x)
        else:
            output = self._run_with_key(partial(_drop, x, plan), rngs)
        return output


class WordDropout(Dropout):
    """Replace tokens by the one for unknown words in training, with probability rate.

    Parameters
    ----------
    rate : int or float
        The probability of replacing a token, in [0, 1].
    unk_id : int
        The token to replace others by.
    special_ids : sequence of int, default ()
        Tokens to keep wherever they are, such as padding and the end of a sentence.
    deterministic, rng_collection, rngs, seed
        As in `Dropout`.

    Examples
    --------
    >>> import jax
    >>> from unidrop.adapters.flax import WordDropout
    >>> module = WordDropout(0.5, unk_id=1)
    >>> module(jax.numpy.array([5, 6, 7, 8]), rngs=jax.random.key(42))
    Array([5, 1, 1, 1], dtype=int32)
    """

    _HAS_SCHEDULE = False

    def __init__(
        self,
        rate: float,
        *,
        unk_id: int,
        special_ids: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        seed: int | Key | None = None,
    ) -> None:
        super().__init__(
            rate,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
            seed=seed,
        )
        self.unk_id, self.special_ids = check_tokens(unk_id, special_ids)

    def _as_array(self, inputs: Any) -> Any:
        return as_tokens(inputs, "inputs")

    def _make_plan(self, x: jax.Array, rate: Rate) -> DropoutPlan:
        options: dict[str, Any] = {"unk_id": self.unk_id, "special_ids": self.special_ids}
        return plan_word_dropout(x, rate, name="inputs", **options)


class LayerDrop(Dropout):
    """Run modules in order, and skip each with probability rate in training.

    Skipped modules do not run: `nnx.cond` chooses. Nothing is scaled.

    Parameters
    ----------
    layers : sequence of nnx.Module
        The layers, whose outputs have the shape and the dtype of their inputs.
    rate : int or float
        The probability of skipping a layer, in [0, 1].
    deterministic, rng_collection, rngs, seed
        As in `Dropout`. One call has one key for all layers, and the decisions of
        `unidrop.family.layer_drop`.

    Examples
    --------
    >>> import jax
    >>> from unidrop.adapters.flax import LayerDrop
    >>> module = LayerDrop([lambda x: 10 * x + 1] * 6, 0.5)
    >>> module(jax.numpy.zeros(()), rngs=jax.random.key(42))
    Array(11., dtype=float32)
    """

    _HAS_SCHEDULE = False

    def __init__(
        self,
        layers: Sequence[Any],
        rate: float,
        *,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        seed: int | Key | None = None,
    ) -> None:
        super().__init__(
            rate,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
            seed=seed,
        )
        self.layers = nnx.List(layers)

    def __call__(
        self,
        inputs: Any,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | Key | None = None,
    ) -> Any:
        """Run the layers; parameters and errors are as in `Dropout`."""
        if self._keeps_all(deterministic):
            for layer in self.layers:
                inputs = layer(inputs)
            return inputs

        def run(key: Key) -> Any:
            x, count = inputs, len(self.layers)
            kept = keep_mask((count,), self.rate, as_key(key), xp=jnp)
            for number, layer in enumerate(self.layers):
                if isinstance(layer, nnx.Module):
                    x = nnx.cond(kept[number], _run_layer, _skip_layer, layer, x)
                else:  # a function has no state to return from the branch
                    x = nnx.cond(kept[number], layer, lambda x: x, x)
            return x

        return self._run_with_key(run, rngs)


def _run_layer(layer: Any, x: Any) -> Any:
    return layer(x)


def _skip_layer(layer: Any, x: Any) -> Any:
    return x


class MultiHeadAttention(_SeededModule, nnx.MultiHeadAttention):
    """Attend from queries to keys with several heads, and drop probabilities in training.

    Replaces `flax.nnx.MultiHeadAttention`, with its parameters and its state. In addition, the mask
    is ordinary dropout of the probabilities under a key, and no array holds them all. With a seed
    the module counts its calls, as `Dropout` does.

    Parameters
    ----------
    num_heads, in_features, qkv_features, out_features, num_kv_heads, in_kv_features, **options
        As in `flax.nnx.MultiHeadAttention`. ``broadcast_dropout``, True by default, shares a mask
        of shape (query length, key length) among the batch and the heads. If it is False, the mask
        has the shape (batch, heads, query length, key length).
    dropout_rate : int or float, default 0.0
        The probability of dropping a probability, in [0, 1].
    attention_fn : callable, default dot_product_attention
        A function with the arguments of `dot_product_attention`. With a seed, its ``dropout_rng``
        is a `Key`.
    rngs : nnx.Rngs
        The source of the parameters, and of the keys if there is no seed.
    keep_rngs : bool, default True
        If True, a module without a seed keeps a stream of keys for its training calls.
    seed : int or unidrop.Key, optional
        Training call n = 0, 1, 2, ... uses the key ``Key(seed).fold_in(n)``. Two modules with one
        seed have the same masks: fold each module's site into its seed, or call `assign_seeds`.

    Attributes
    ----------
    seed : unidrop.Key or None
        The key that call numbers are folded into; None without a seed.
    calls : DropoutCalls
        The number of training calls so far, as in `Dropout`.

    Raises
    ------
    TypeError
        If dropout_rate is not a Python number, or seed neither an integer nor a Key.
    ValueError
        If dropout_rate is outside [0, 1], seed outside [0, 2^64), or as in Flax.

    Examples
    --------
    >>> import jax
    >>> from flax import nnx
    >>> from unidrop import Key
    >>> from unidrop.adapters.flax import MultiHeadAttention
    >>> module = MultiHeadAttention(
    ...     2, 8, dropout_rate=0.5, deterministic=False, decode=False, rngs=nnx.Rngs(0),
    ...     seed=Key(42).fold_in("encoder/0"),
    ... )
    >>> module(jax.numpy.ones((1, 4, 8))).shape
    (1, 4, 8)
    >>> int(module.calls)
    1
    """

    _RATE = "dropout_rate"

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        dropout_rate: float = 0.0,
        attention_fn: Callable[..., jax.Array] = dot_product_attention,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
        seed: int | Key | None = None,
        **options: Any,
    ) -> None:
        Rate.from_p(dropout_rate, "dropout_rate")
        super().__init__(
            num_heads,
            in_features,
            qkv_features,
            out_features,
            num_kv_heads,
            in_kv_features,
            dropout_rate=dropout_rate,
            attention_fn=attention_fn,
            rngs=rngs,
            keep_rngs=keep_rngs and seed is None,
            **options,
        )
        self._init_seed(seed)

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | Key | None = None,
        **options: Any,
    ) -> jax.Array:
        """Apply attention, with dropout in training.

        Parameters
        ----------
        inputs_q, inputs_k, inputs_v, **options
            As in `flax.nnx.MultiHeadAttention`.
        deterministic : bool, optional
            Takes precedence over the constructor's.
        rngs : nnx.Rngs, nnx.RngStream, jax.Array or unidrop.Key, optional
            The key of this call, or the source of the key. Takes precedence over the constructor's
            and over the seed. A call with its own rngs is not counted.

        Returns
        -------
        jax.Array
            Of shape (batch..., length, out_features).

        Raises
        ------
        ValueError
            If ``deterministic`` is None here and in the constructor, a training call has no key,
            or as in Flax. A call that raises is not counted.
        """
        options["deterministic"] = deterministic
        call = partial(super().__call__, inputs_q, inputs_k, inputs_v, **options)
        if deterministic is None:
            deterministic = self.deterministic
        drops = self.dropout_rate > 0 and deterministic is not None and not deterministic
        if rngs is None and self.seed is not None and drops:
            return self._run_counted(lambda key: call(rngs=lambda: key))
        # Flax calls a stream, and so it may call a function that returns a key.
        return call(rngs=(lambda: rngs) if isinstance(rngs, jax.Array | Key) else rngs)


def _take_number(variable: DropoutCalls, rate: Rate | None) -> jax.Array:
    number: jax.Array = variable.get_value()
    counted = jnp.uint32(1)
    if isinstance(rate, ScheduledRate):
        counted = (rate.array != 0).astype(jnp.uint32)
    if isinstance(number, jax.core.Tracer):
        _check_scan(number)
    try:
        variable.set_value(number + counted)
    except TraceContextError as error:
        raise TraceContextError(f"{error}. {_NOT_CARRIED}") from None
    return number


def _check_scan(number: jax.Array) -> None:
    """Raise TraceContextError if `nnx.scan` broadcasts the call number, and so discards changes.

    It hands the module over as a new one, which may change, and forgets it. So the frames of the
    stack tell.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _SCAN:
            broadcast = frame.f_locals.get("broadcast_deque_out")
            for calls in jax.tree.leaves(broadcast, is_leaf=lambda x: isinstance(x, DropoutCalls)):
                # In another transformation inside the loop, the number has another trace.
                if isinstance(calls, DropoutCalls) and (
                    calls.get_value() is number or calls.get_value()._trace is not number._trace
                ):
                    raise TraceContextError(f"nnx.scan broadcasts a call number. {_NOT_CARRIED}")
        frame = frame.f_back


def _roll_back(number: jax.Array, variable: DropoutCalls) -> None:
    calls = variable.get_value()
    variable.set_value(jnp.where(calls == number + jnp.uint32(1), number, calls))


def _as_call_number(value: Any) -> jax.Array:
    if not isinstance(value, jax.Array):
        return jnp.asarray(checked_integer(value, "calls", bits=32), jnp.uint32)
    # An array may be traced, as a global step is, so only its dtype and shape are checked.
    _, lo = get_library(value).split(value, "calls")
    return jnp.asarray(lo)


def assign_seeds(model: M, seed: int | Key) -> M:
    """Give each dropout and attention module of a model the seed ``Key(seed).fold_in(name)``.

    The name is the path of attributes and indices from the model to the module, joined by ".", as
    in `nnx.iter_modules`: ``model.encoder.layers[2]`` has the name "encoder.layers.2". A module in
    two places has the path that comes first there. Modules that are made under `nnx.vmap` have one
    name and separate keys, ``Key(seed).fold_in(name).fold_in(i)``.

    Parameters
    ----------
    model : nnx.Module
        The model. Modules that count calls keep their call numbers.
    seed : int or unidrop.Key
        The seed of the model.

    Returns
    -------
    nnx.Module
        The model itself.

    Raises
    ------
    TypeError
        If model is not an nnx.Module, or seed is neither an integer nor a Key.
    ValueError
        If the model has no module of `unidrop.adapters.flax`, or seed is outside [0, 2^64).

    Examples
    --------
    >>> from flax import nnx
    >>> from unidrop import Key
    >>> from unidrop.adapters.flax import Dropout, assign_seeds
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), Dropout(0.5))
    >>> assign_seeds(model, 42).layers[1].seed == Key(42).fold_in("layers.1")
    True
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module, got {type(model).__name__}")
    key = seed if isinstance(seed, Key) else Key(seed)
    modules = dict(_named_modules(model))
    if not modules:
        raise ValueError("model must have a module of unidrop.adapters.flax, and it has none")
    for name, module in modules.items():
        own, stack = key.fold_in(name), _get_stack(module)
        if not stack:
            module.seed = own
            continue
        if "calls" not in vars(module):
            module.calls = DropoutCalls(jnp.zeros(stack, jnp.uint32))
        keys = jax.vmap(own.fold_in)(jnp.arange(math.prod(stack)))
        module.seed = nnx.data(jax.tree.map(lambda word, n=stack: word.reshape(n), keys))
    return model


def _warn_of_twins(module: _SeededModule) -> None:
    """Warn if modules of the model that runs have one seed and one call number.

    Modules call this once, before their first training call: a model whose modules are copies, such
    as `nnx.clone` makes, is a mistake that no output shows.
    """
    model = _find_model(module)
    if model in _CHECKED and _is_traced(module):
        return  # the module is a copy, which a transformation makes for each trace
    modules = list(_named_modules(model))
    _CHECKED.update([model, module, *(other for _, other in modules)])
    active = []
    for name, other in modules:
        rate = getattr(other, other._RATE)
        may_drop = not isinstance(rate, int | float) or rate > 0
        drops = not other.deterministic and may_drop
        if other.seed is None or other.seed.is_traced or not drops:
            continue
        stack = _get_stack(other)
        if stack:
            warnings.warn(
                f"the {math.prod(stack)} modules {name!r} have one seed, so they drop the same "
                "units: call unidrop.adapters.flax.assign_seeds(model, seed), or give each its own "
                "where nnx.vmap makes them, as in seed=Key(42).fold_in(i)",
                stacklevel=4,
            )
            return
        number = 0 if _is_traced(other) else int(other.calls.get_value())
        active.append((name, other.seed, number))
    known = not _is_traced(module)
    warn_of_equal_seeds(active, "unidrop.adapters.flax", known=known, stacklevel=4)


def _find_model(module: _SeededModule) -> Any:
    """Return the outermost module that is the ``self`` of a call on the stack."""
    model: Any = module
    for _, caller in list_callers(sys._getframe(1)):
        if isinstance(caller, nnx.Module):
            model = caller
    return model


def _named_modules(model: Any) -> Iterator[tuple[str, _SeededModule]]:
    """Yield the modules of this adapter, each once, by the path of attributes and indices."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, _SeededModule):
            yield ".".join(map(str, path)), module


def _get_stack(module: _SeededModule) -> tuple[int, ...]:
    """Return the axes of modules that are made under `nnx.vmap`; () for a single module."""
    if "calls" in vars(module):
        shape: tuple[int, ...] = module.calls.get_value().shape
        return shape
    return () if module.rngs is None else module.rngs.count.get_value().shape


def _is_traced(module: _SeededModule) -> bool:
    return isinstance(module.calls.get_value(), jax.core.Tracer)
