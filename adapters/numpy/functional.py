"""The textbook function of dropout for NumPy, under a key or a generator, and its backward pass."""

import os
import struct
from collections.abc import Sequence
from ctypes import addressof
from functools import lru_cache
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unidrop.adapters.numpy.arrays import (
    FLAGS,
    LIBRARY,
    PLAIN_FLAGS,
    check_plain,
    from_buffer,
)
from unidrop.dispatch import get_kernels
from unidrop.key import Key, check_key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.schedule import make_rate
from unidrop.window import Window

__all__ = [
    "Rng",
    "as_array",
    "check_out",
    "check_source",
    "copy_to",
    "draw_key",
    "dropout",
    "dropout_backward",
]

Rng = int | np.random.Generator | np.random.BitGenerator | np.random.SeedSequence | None

_DEFAULT_P = 0.5

_cached_rate = lru_cache(maxsize=256)(Rate.from_p)

_two_words = struct.Struct("<II")

# Of native byte order. The buffer protocol has no name for bfloat16.
_PLAIN_DTYPES = frozenset(map(np.dtype, ("f2", "f4", "f8", "c8", "c16")))


@overload
def dropout(
    x: ArrayLike,
    p: float | NDArray[Any] = ...,
    *,
    keep_prob: float | None = ...,
    key: Key | None = ...,
    rng: Rng = ...,
    training: bool = ...,
    broadcast_axes: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[False] = ...,
    out: NDArray[Any] | None = ...,
) -> NDArray[Any]: ...
@overload
def dropout(
    x: ArrayLike,
    p: float | NDArray[Any] = ...,
    *,
    keep_prob: float | None = ...,
    key: Key | None = ...,
    rng: Rng = ...,
    training: bool = ...,
    broadcast_axes: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[True],
    out: NDArray[Any] | None = ...,
) -> tuple[NDArray[Any], NDArray[np.bool]]: ...
@overload
def dropout(
    x: ArrayLike,
    p: float | NDArray[Any] = ...,
    *,
    keep_prob: float | None = ...,
    key: Key | None = ...,
    rng: Rng = ...,
    training: bool = ...,
    broadcast_axes: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: bool,
    out: NDArray[Any] | None = ...,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[np.bool]]: ...
def dropout(
    x: ArrayLike,
    p: float | NDArray[Any] = _DEFAULT_P,
    *,
    keep_prob: float | None = None,
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    out: NDArray[Any] | None = None,
) -> Any:
    """Drop elements with probability p and scale the rest by 1 / (1 - p).

    Parameters
    ----------
    x : array_like
        Any shape, of a floating-point or complex dtype.
    p : int, float or 0-d numpy.ndarray, default 0.5
        The probability of dropping an element, in [0, 1]. An array of float32 or float64 stands for
        its exact value.
    keep_prob : int or float, optional
        The textbook's spelling: the probability of keeping an element, ``p = 1 - keep_prob``. Pass
        p or keep_prob, not both.
    key : unidrop.Key, optional
        The name of the mask: the same key drops the same elements in every framework.
    rng : None, int, numpy.random.Generator, BitGenerator or SeedSequence, default None
        Source of a key if none is given, as in Scientific Python's SPEC 7: None means fresh
        entropy, an int seeds `numpy.random.default_rng`, and a generator advances by one 64-bit
        draw. A call that drops nothing draws nothing.
    training : bool, default True
        If False, x is returned unchanged.
    broadcast_axes : sequence of int, default ()
        Axes along which elements share one decision, and the mask has length 1.
    global_shape, start : sequence of int, optional
        x is the block that begins at ``start`` of an array of shape ``global_shape``, and gets
        exactly that block of the whole mask.
    return_mask : bool, default False
        If True, the mask is returned too: ``(output, mask)``.
    out : numpy.ndarray, optional
        The array to write the output to, of x's shape and dtype; may be x itself. A call that
        raises leaves it unchanged.

    Returns
    -------
    output : numpy.ndarray
        Of x's shape and dtype; ``out`` if given; x itself if p is 0 or training is False.
    mask : numpy.ndarray of bool
        Only with ``return_mask``: True for kept elements, with length 1 along ``broadcast_axes``.

    Raises
    ------
    TypeError
        If x has an integer or bool dtype, or x is a masked array, a matrix or a table. If a rate is
        neither a number nor such an array, key is not a Key, `numpy.random.default_rng` does not
        accept rng, or out is not an array.
    ValueError
        If a rate is outside [0, 1], keep_prob is given with a p that is not the default, both key
        and rng are given, an axis does not exist, the window does not fit, or out does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import dropout
    >>> output, mask = dropout(np.ones(4), keep_prob=0.5, key=Key(42), return_mask=True)
    >>> output
    array([2., 0., 0., 0.])
    >>> mask
    array([ True, False, False, False])
    """
    if (
        keep_prob is None
        and rng is None
        and global_shape is None
        and start is None
        and training is True
        and return_mask is False
        and type(broadcast_axes) is tuple
        and not broadcast_axes
    ):
        output = _run_plain(x, p, key, out)
        if output is not None:
            return output
    x = as_array(x, "x")
    rate = _get_rate(p, keep_prob, x)
    check_out(out, x)
    plan = _make_plan(x, rate, training, broadcast_axes, global_shape, start, "x")
    generator = check_source(key, rng)
    if not plan.drops:
        output = copy_to(out, x)
        return (output, plan.ones(x)) if return_mask else output
    if key is None:
        key = draw_key(generator)
    if not return_mask:
        return plan.run(x, key, None, out)
    mask = plan.mask(x, key)
    return plan.run(x, key, mask, out), mask


def dropout_backward(
    grad: ArrayLike,
    p: float | NDArray[Any] = _DEFAULT_P,
    *,
    keep_prob: float | None = None,
    key: Key | None = None,
    mask: ArrayLike | None = None,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `dropout`: drop the same elements and scale the rest.

    Parameters
    ----------
    grad : array_like
        The gradient with respect to the output, of x's shape.
    p : int, float or 0-d numpy.ndarray, default 0.5
        As in the forward call.
    keep_prob : int or float, optional
        As in the forward call.
    key : unidrop.Key, optional
        The forward call's key. Nothing else of the forward call is needed.
    mask : array_like of bool, optional
        The mask that the forward call returned. Pass key or mask, not both; a call that drops
        nothing needs neither.
    training : bool, default True
        As in the forward call.
    broadcast_axes : sequence of int, default ()
        As in the forward call.
    global_shape, start : sequence of int, optional
        As in the forward call.
    out : numpy.ndarray, optional
        The array to write the result to, of grad's shape and dtype; may be grad itself.

    Returns
    -------
    numpy.ndarray
        The gradient with respect to x, of grad's shape and dtype; grad itself if p is 0 or
        training is False.

    Raises
    ------
    TypeError
        As `dropout`; if mask is not of bool.
    ValueError
        As `dropout`; if both key and mask or neither are given, or mask does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop import Key
    >>> from unidrop.adapters.numpy import dropout_backward
    >>> dropout_backward(np.ones(4), 0.5, key=Key(42))
    array([2., 0., 0., 0.])
    """
    if (
        keep_prob is None
        and key is not None
        and mask is None
        and global_shape is None
        and start is None
        and training is True
        and type(broadcast_axes) is tuple
        and not broadcast_axes
    ):
        gradient = _run_plain(grad, p, key, out)
        if gradient is not None:
            return gradient
    grad = as_array(grad, "grad")
    rate = _get_rate(p, keep_prob, grad)
    if key is not None:
        check_key(key)
    check_out(out, grad)
    plan = _make_plan(grad, rate, training, broadcast_axes, global_shape, start, "grad")
    if plan.drops and (key is None) == (mask is None):
        raise ValueError(
            f"pass the forward call's key or its mask, got key={key!r} and mask={mask!r}"
        )
    if not plan.drops:
        return copy_to(out, grad)
    if key is not None:
        result: NDArray[Any] = plan.run(grad, key, out=out)
        return result
    return copy_to(out, plan.select(grad, _checked_mask(mask, plan.window.shape)))


def _run_plain(x: Any, p: Any, key: Key | None, out: NDArray[Any] | None) -> NDArray[Any] | None:
    """Return the output of a plain call, or None if the call needs the general route.

    In a plain call, the arrays have C order and may be written, the rate is a float that drops some
    elements and keeps some, and the words of a key are integers. Without a key, entropy is one. The
    caller has passed no other argument. For small arrays, the general route takes twice as long.
    """
    if type(x) is not np.ndarray or x.flags.num & FLAGS != PLAIN_FLAGS or type(p) is not float:
        return None
    if out is not None and (
        type(out) is not np.ndarray
        or out.flags.num & FLAGS != PLAIN_FLAGS
        or out.shape != x.shape
        or out.dtype != x.dtype
    ):
        return None
    lo = hi = 0
    if key is not None:
        if type(key) is not Key or type(key._words) is not tuple:
            return None
        lo, hi = key._words
        if type(lo) is not int or type(hi) is not int:
            return None
    package = get_kernels()
    prepared = None if package is None else _prepare_plain(package, x.shape, x.dtype, p)
    if prepared is None:
        return None
    kernel, rate = prepared
    number = int.from_bytes(os.urandom(8), "little") if key is None else hi << 32 | lo
    y = np.empty_like(x) if out is None else out
    source, target = addressof(from_buffer(x)), addressof(from_buffer(y))  # type: ignore[arg-type] # the stubs lack __buffer__
    if 0 < abs(source - target) < x.nbytes:
        return None
    kernel.run(source, target, rate, number, 0, (x, y))
    return y


@lru_cache(maxsize=1024)
def _prepare_plain(
    package: Any, shape: tuple[int, ...], dtype: Any, p: float
) -> tuple[Any, Rate] | None:
    """Return the kernel and the rate of a plain call, or None."""
    if not 0 < p < 1 or dtype not in _PLAIN_DTYPES or 0 in shape:
        return None
    rate = Rate.from_p(p)
    if rate.keeps_nothing:
        return None
    return package.prepare(dtype, shape, None, Window.from_args(shape).strides), rate


def as_array(x: ArrayLike, name: str) -> NDArray[Any]:
    """Return a plain array; raises TypeError, naming the argument, for arrays of other classes."""
    if type(x) is np.ndarray:
        return x
    check_plain(type(getattr(x, "_meta", x)), name)  # the _meta of a Dask array is like its chunks
    return np.asarray(x)


def _make_plan(
    x: NDArray[Any],
    rate: Rate,
    training: bool,
    broadcast_axes: Sequence[int],
    global_shape: Sequence[int] | None,
    start: Sequence[Any] | None,
    name: str,
) -> DropoutPlan:
    has_axes = type(broadcast_axes) is not tuple or broadcast_axes != ()
    if not has_axes and global_shape is None and start is None:
        drops = bool(training) and rate.p > 0
        return DropoutPlan.for_whole(LIBRARY, x.shape, x.dtype, rate, drops, name)
    return DropoutPlan.from_args(
        x,
        rate,
        training=training,
        broadcast_axes=broadcast_axes,
        global_shape=global_shape,
        start=start,
        name=name,
    )


def _get_rate(p: Any, keep_prob: float | None, x: NDArray[Any]) -> Rate:
    rate = _cached_rate(p) if type(p) is float else make_rate(p, x)
    if keep_prob is None:
        return rate
    if rate.p != _DEFAULT_P:
        raise ValueError(f"pass p or keep_prob, not both, got p={p} and keep_prob={keep_prob}")
    return Rate.from_keep_prob(keep_prob)


def check_source(key: Key | None, rng: Rng) -> np.random.Generator | None:
    """Return the generator that a key is drawn from, or None if there is a key or no generator."""
    if key is not None:
        check_key(key)
        if rng is not None:
            raise ValueError(f"pass key or rng, not both, got key={key!r} and rng={rng!r}")
    if rng is None:
        return None
    if isinstance(rng, bool):
        raise TypeError(f"rng must be an argument of numpy.random.default_rng, got {rng!r}")
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"rng must be an argument of numpy.random.default_rng, got {rng!r}: {error}"
        ) from None


def draw_key(generator: np.random.Generator | None) -> Key:
    """Return a key from a generator, or without one from the entropy of the system."""
    if generator is None:
        return Key._from_raw_words(_two_words.unpack(os.urandom(8)))
    return Key(int(generator.integers(0, 2**64, dtype=np.uint64)))


def check_out(out: object, x: NDArray[Any]) -> None:
    """Raise TypeError or ValueError unless an output for x can be written to ``out``."""
    if out is None:
        return
    if type(out) is not np.ndarray:
        if not isinstance(out, np.ndarray):
            raise TypeError(f"out must be a numpy.ndarray, got {type(out).__name__}")
        check_plain(type(out), "out")
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"out must have shape {x.shape} and dtype {x.dtype}, "
            f"got shape {out.shape} and dtype {out.dtype}"
        )
    if not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")


def copy_to(out: NDArray[Any] | None, result: NDArray[Any]) -> NDArray[Any]:
    """Return a result, copied to ``out`` if that is given."""
    if out is None:
        return result
    out[...] = result
    return out


def _checked_mask(mask: Any, shape: tuple[int, ...]) -> NDArray[np.bool]:
    checked: NDArray[np.bool] = as_array(mask, "mask")
    if checked.dtype != np.bool:
        raise TypeError(f"mask must be of bool, got dtype {checked.dtype}")
    if checked.shape != shape:
        raise ValueError(f"mask must have shape {shape}, got {checked.shape}")
    return checked
