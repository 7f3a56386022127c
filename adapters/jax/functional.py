"""Dropout for JAX: a pure function of an array, a rate and a key, under every transformation.

A `unidrop.Key` is a pytree of two ``uint32`` words: `jax.jit`, `jax.vmap` and `jax.lax.scan` accept
and return it. Fold in the step, traced or not:

>>> import jax
>>> from unidrop import Key
>>> from unidrop.adapters.jax import dropout
>>> @jax.jit
... def forward(x, step):
...     return dropout(x, 0.5, Key(42).fold_in("encoder/0").fold_in(step))
>>> forward(jax.numpy.ones(6), 0)
Array([2., 0., 0., 2., 2., 2.], dtype=float32)

Flax has a module, `unidrop.adapters.flax.Dropout`. An Equinox module takes the key in its call:

>>> import equinox as eqx
>>> class Net(eqx.Module):
...     linear: eqx.nn.Linear
...
...     def __call__(self, x, *, key=None, inference=False):
...         x = dropout(self.linear(x), 0.5, key, deterministic=inference)
...         return jax.nn.relu(x)
>>> net = Net(eqx.nn.Linear(3, 4, key=jax.random.key(0)))
>>> loss = eqx.filter_jit(lambda net, x, step: net(x, key=Key(42).fold_in(step)).sum())
>>> gradient = eqx.filter_grad(loss)(net, jax.numpy.ones(3), 7)

In Haiku, pass the step as an argument, or pass the result of `hk.next_rng_key` as the key:

>>> import haiku as hk
>>> def net(x, step, is_training):
...     key = Key(42).fold_in("net").fold_in(step)
...     return hk.Linear(4)(dropout(x, 0.5, key, deterministic=not is_training))
>>> model = hk.without_apply_rng(hk.transform(net))
>>> params = model.init(jax.random.key(0), jax.numpy.ones(3), 0, False)
>>> y = model.apply(params, jax.numpy.ones(3), 7, True)
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import numpy as np
from jax import numpy as jnp
from jax.typing import ArrayLike

from unidrop.adapters.numpy.arrays import check_plain
from unidrop.dtypes import compute_dtype
from unidrop.key import Key, check_array_words
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.schedule import make_rate

__all__ = ["as_array", "as_key", "check_lengths", "dropout", "run"]


@overload
def dropout(
    x: ArrayLike,
    rate: float | jax.Array,
    key: Key | jax.Array | None = ...,
    *,
    deterministic: bool = ...,
    broadcast_dims: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[False] = ...,
) -> jax.Array: ...
@overload
def dropout(
    x: ArrayLike,
    rate: float | jax.Array,
    key: Key | jax.Array | None = ...,
    *,
    deterministic: bool = ...,
    broadcast_dims: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...
@overload
def dropout(
    x: ArrayLike,
    rate: float | jax.Array,
    key: Key | jax.Array | None = ...,
    *,
    deterministic: bool = ...,
    broadcast_dims: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: bool,
) -> jax.Array | tuple[jax.Array, jax.Array]: ...
def dropout(
    x: ArrayLike,
    rate: float | jax.Array,
    key: Key | jax.Array | None = None,
    *,
    deterministic: bool = False,
    broadcast_dims: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Drop elements with probability rate and scale the rest by 1 / (1 - rate).

    Parameters
    ----------
    x : jax.Array
        Any shape, of a floating-point or complex dtype. Also accepts a NumPy array, a number, and
        an object with a method ``__jax_array__``.
    rate : int, float or 0-d jax.Array
        The probability of dropping an element, in [0, 1]. An array of float32 or float64 stands for
        its exact value. It may be traced, and a traced value outside [0, 1] makes the output NaN
        and the mask False. Its gradient is 0.
    key : unidrop.Key or jax.Array
        The name of the mask: use each key once. A `Key` may be traced, as ``Key(42).fold_in(step)``
        is. A Threefry key of `jax.random`, typed or raw, is the Key of its 64 bits,
        ``Key.from_words(lo=data[1], hi=data[0])``. May be None if nothing is dropped.
    deterministic : bool, default False
        If True, x is returned unchanged.
    broadcast_dims : sequence of int, default ()
        Axes along which elements share one decision, and the mask has length 1.
    global_shape, start : sequence of int, optional
        x is the block that begins at ``start`` of an array of shape ``global_shape``, and gets
        exactly that block of the whole mask, as each device does in `jax.shard_map`. Elements of
        start may be traced.
    return_mask : bool, default False
        If True, the mask is returned too.

    Returns
    -------
    y : jax.Array
        Of x's shape and dtype. The gradient recomputes the mask from the key; under ``jit`` XLA for
        the CPU may keep the mask instead, as one bit for each element.
    mask : jax.Array of bool
        Only with ``return_mask``: True for kept elements, with length 1 along ``broadcast_dims``.

    Raises
    ------
    TypeError
        If x is not an array or has an integer or bool dtype, rate is neither a number nor such an
        array, or key is not a key.
    ValueError
        If rate is outside [0, 1], an axis does not exist, the window does not fit, or key is a
        batch of keys or of another generator than Threefry.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.jax import dropout
    >>> dropout(jax.numpy.ones(6), 0.5, Key(42))
    Array([2., 0., 0., 0., 0., 2.], dtype=float32)
    >>> dropout(jax.numpy.ones(6), 0.5, jax.random.key(42))
    Array([2., 0., 0., 0., 0., 2.], dtype=float32)
    """
    options: dict[str, Any] = {"broadcast_axes": broadcast_dims}
    options |= {"global_shape": global_shape, "start": start, "has_schedule": True}
    return run(DropoutPlan.from_args, x, rate, key, deterministic, return_mask, **options)


def run(
    make_plan: Callable[..., DropoutPlan],
    x: ArrayLike,
    rate: float | jax.Array,
    key: Any,
    deterministic: bool,
    return_mask: bool,
    *,
    has_schedule: bool = False,
    **options: Any,
) -> Any:
    """Run a function of the family; a call that drops nothing needs no key, and no lengths.

    ``has_schedule`` is whether its rate may be an array.
    """
    x = as_array(x)
    one_rate = make_rate(rate, x, "rate") if has_schedule else Rate.from_p(rate, "rate")
    if not deterministic and (one_rate.is_scheduled or one_rate.p > 0):
        check_lengths(x, "x")
    elif not _has_lengths(x):
        return (x, jnp.ones(x.shape, bool)) if return_mask else x
    plan = make_plan(x, one_rate, training=not deterministic, **options)
    return plan.call(x, as_key(key) if plan.drops else key, return_mask)


def check_lengths(x: Any, name: str) -> None:
    """Raise TypeError if a length of an array is symbolic, as `jax.export` allows."""
    if not _has_lengths(x):
        raise TypeError(
            f"{name} must have a shape of integers, got {x.shape}: masks need the lengths, so "
            "export a program for each shape"
        )


def _has_lengths(x: Any) -> bool:
    return all(type(length) is int for length in x.shape)


def as_key(key: Any, name: str = "key") -> Key:
    """Return a key of `jax.random`, or a `Key`, as a `Key`.

    Parameters
    ----------
    key : unidrop.Key or jax.Array
        As in `dropout`.
    name : str, default "key"
        The name of the argument in error messages.

    Raises
    ------
    TypeError
        If key is not a key.
    ValueError
        If key is a batch of keys, or of another generator than Threefry; names the generator.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.jax import as_key
    >>> int(as_key(jax.random.key(2**32 - 1)).words[0]) == 2**32 - 1
    True
    """
    if isinstance(key, Key):
        lo, hi = key._words
        if not type(lo) is type(hi) is int:
            check_array_words(lo, hi)
            _check_one(jnp.shape(lo), name)
        return key
    data = _get_data(key, name)
    if data is None:
        raise TypeError(
            f"{name} must be a unidrop.Key, such as Key(42).fold_in(step), or a key of jax.random, "
            f"got {key!r} of type {type(key).__name__}"
        )
    _check_one(data.shape[:-1], name)
    return Key.from_words(data[1], data[0])


def _get_data(key: Any, name: str) -> Any:
    """Return the words of a key of `jax.random`, high word first, or None for other objects."""
    if not isinstance(key, jax.Array | np.ndarray):
        return None
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        generator = str(jax.random.key_impl(key))
        _check_threefry(generator == "threefry2x32", generator, name)
        return jax.random.key_data(key)
    if key.dtype != np.uint32 or key.ndim == 0:
        return None
    _check_threefry(key.shape[-1] == 2, f"rbg or unsafe_rbg, with {key.shape[-1]} words", name)
    return jnp.asarray(key)


def _check_threefry(is_threefry: bool, generator: str, name: str) -> None:
    if not is_threefry:
        raise ValueError(
            f"{name} must be a key of threefry2x32, whose 64 bits are a unidrop.Key, got one of "
            f"{generator}: pass a unidrop.Key"
        )


def _check_one(batch: tuple[int, ...], name: str) -> None:
    if batch:
        raise ValueError(
            f"{name} must be one key, got a batch of them, of shape {batch}: apply jax.vmap to "
            "the function that calls dropout"
        )


def as_array(x: Any, name: str = "x") -> Any:
    """Return an array or a number as an array of JAX.

    Raises
    ------
    TypeError
        If x is another object, or dropout does not support its dtype; names the argument.
    """
    if isinstance(x, jax.Array):
        return x
    if hasattr(x, "__jax_array__"):
        x = x.__jax_array__()
        if isinstance(x, jax.Array):
            return x
    check_plain(type(x), name)
    if isinstance(x, np.ndarray):
        compute_dtype(x.dtype, name)
        return jnp.asarray(x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("=")))
    if isinstance(x, np.generic | int | float | complex):
        return jnp.asarray(x)
    raise TypeError(
        f"{name} must be a jax.Array, a numpy.ndarray or a number, got {type(x).__name__}"
    )
