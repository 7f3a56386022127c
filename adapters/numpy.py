"""Dropout for NumPy: the textbook's function, with ``rng=`` or a key."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unidrop.key import Key, check_key
from unidrop.plan import DropoutPlan
from unidrop.protocols import ArrayLibrary, Buffer, Buffers
from unidrop.rate import Rate

__all__ = ["LIBRARY", "aligned_like", "dropout", "dropout_backward", "get_address", "locate_array"]

Rng = int | np.random.Generator | np.random.BitGenerator | np.random.SeedSequence | None

_DEFAULT_P = 0.5

# What TensorFlow and XLA ask of memory that they are to use: a line of the cache.
_ALIGNMENT = 64


def dropout(
    x: ArrayLike,
    p: float = _DEFAULT_P,
    *,
    keep_prob: float | None = None,
    key: Key | None = None,
    rng: Rng = None,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    return_mask: bool = False,
    out: NDArray[Any] | None = None,
) -> Any:
    """Drop elements with probability p and scale the rest by 1 / (1 - p).

    Parameters
    ----------
    x : array_like
        Any shape, of a floating-point or complex dtype.
    p : int or float, default 0.5
        The probability of dropping an element, in [0, 1].
    keep_prob : int or float, optional
        The textbook's spelling: the probability of keeping one, ``p = 1 - keep_prob``. Give
        either.
    key : unidrop.Key, optional
        The name of the mask. The same key drops the same elements in every framework.
    rng : None, int, numpy.random.Generator, BitGenerator or SeedSequence, default None
        Where to draw a key from if none is given, as in Scientific Python's SPEC 7: None means
        fresh entropy, an int seeds `numpy.random.default_rng`, and a generator is advanced by one
        64-bit draw. Nothing is drawn where nothing can be dropped.
    training : bool, default True
        If False x is returned unchanged.
    broadcast_axes : sequence of int, default ()
        Axes along which one decision is shared.
    return_mask : bool, default False
        Whether to return the mask too: ``(output, mask)``.
    out : numpy.ndarray, optional
        Where to write the output, of x's shape and dtype; may be x itself. Untouched if an
        argument is wrong.

    Returns
    -------
    output : numpy.ndarray
        Of x's shape and dtype; ``out`` if given; x itself if p is 0 or training is False.
    mask : numpy.ndarray of bool
        Only with ``return_mask``: True where kept, with length 1 along ``broadcast_axes``.

    Raises
    ------
    TypeError
        If x has an integer or bool dtype, a rate is no Python number, key no Key, rng nothing
        that `numpy.random.default_rng` takes, or out no array.
    ValueError
        If a rate is outside [0, 1], keep_prob is given with a p that is not the default, both key
        and rng are given, an axis does not exist, or out does not fit.

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
    x = np.asarray(x)
    rate = _get_rate(p, keep_prob)
    if key is not None:
        check_key(key)
        if rng is not None:
            raise ValueError(f"give either key or rng, got key={key!r} and rng={rng!r}")
    _check_out(out, x)
    plan = _make_plan(x, rate, training, broadcast_axes, "x")
    generator = _get_generator(rng) if key is None else None
    if not plan.drops:
        output, mask = _written(out, x), plan.ones(x)
    else:
        key = _drawn(generator) if key is None else key
        mask = plan.mask(x, key) if return_mask else None
        output = plan.run(x, key, mask, out)
    return (output, mask) if return_mask else output


def dropout_backward(
    grad: ArrayLike,
    p: float = _DEFAULT_P,
    *,
    keep_prob: float | None = None,
    key: Key | None = None,
    mask: ArrayLike | None = None,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    out: NDArray[Any] | None = None,
) -> Any:
    """Return the gradient of `dropout`: the same elements dropped, the rest scaled.

    Parameters
    ----------
    grad : array_like
        The gradient with respect to the output, of x's shape.
    p : int or float, default 0.5
        As in the forward call.
    keep_prob : int or float, optional
        As in the forward call.
    key : unidrop.Key, optional
        The forward call's key; nothing else must be kept from it.
    mask : array_like of bool, optional
        Or the mask that the forward call returned. Give one of the two, unless nothing was
        dropped.
    training : bool, default True
        As in the forward call.
    broadcast_axes : sequence of int, default ()
        As in the forward call.
    out : numpy.ndarray, optional
        Where to write the result, of grad's shape and dtype; may be grad itself.

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
    grad = np.asarray(grad)
    rate = _get_rate(p, keep_prob)
    if key is not None:
        check_key(key)
    _check_out(out, grad)
    plan = _make_plan(grad, rate, training, broadcast_axes, "grad")
    if plan.drops and (key is None) == (mask is None):
        raise ValueError(
            f"give the forward call's key or its mask, got key={key!r} and mask={mask!r}"
        )
    if not plan.drops:
        return _written(out, grad)
    if key is not None:
        return plan.run(grad, key, out=out)
    return _written(out, plan.select(grad, _checked_mask(mask, plan.window.shape)))


def _make_plan(
    x: NDArray[Any], rate: Rate, training: bool, broadcast_axes: Sequence[int], name: str
) -> DropoutPlan:
    if broadcast_axes == ():
        drops = bool(training) and rate.p > 0
        return DropoutPlan.for_whole(LIBRARY, x.shape, x.dtype, rate, drops, name)
    return DropoutPlan.from_args(
        x, rate, training=training, broadcast_axes=broadcast_axes, name=name
    )


def _get_rate(p: float, keep_prob: float | None) -> Rate:
    rate = Rate.from_p(p)
    if keep_prob is None:
        return rate
    if rate.p != _DEFAULT_P:
        raise ValueError(f"give either p or keep_prob, got p={p} and keep_prob={keep_prob}")
    return Rate.from_keep_prob(keep_prob)


def _get_generator(rng: Rng) -> np.random.Generator:
    if isinstance(rng, bool):
        raise TypeError(f"rng must be what default_rng takes, and no bool, got {rng!r}")
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        raise type(error)(f"rng must be what default_rng takes, got {rng!r}: {error}") from None


def _drawn(generator: Any) -> Key:
    return Key(int(generator.integers(0, 2**64, dtype=np.uint64)))


def _check_out(out: object, x: NDArray[Any]) -> None:
    if out is None:
        return
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a numpy.ndarray, got {type(out).__name__}")
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f"out must have shape {x.shape} and dtype {x.dtype}, "
            f"got shape {out.shape} and dtype {out.dtype}"
        )
    if not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")


def _written(out: NDArray[Any] | None, result: NDArray[Any]) -> NDArray[Any]:
    """Return a result, in ``out`` if that is given."""
    if out is None:
        return result
    out[...] = result
    return out


def _checked_mask(mask: Any, shape: tuple[int, ...]) -> NDArray[np.bool]:
    checked: NDArray[np.bool] = np.asarray(mask)
    if checked.dtype != np.bool:
        raise TypeError(f"mask must be of bool, got dtype {checked.dtype}")
    if checked.shape != shape:
        raise ValueError(f"mask must have shape {shape}, got {checked.shape}")
    return checked


class NumPyBuffers(Buffers):
    """Plain NumPy arrays, memory-mapped ones included; subclasses use the portable path."""

    def locate(self, x: Any) -> Buffer | str:
        """Return the buffer of a plain array of native, aligned elements."""
        if type(x) is not np.ndarray and type(x) is not np.memmap:
            return f"a {type(x).__name__} is not a plain numpy.ndarray"
        return locate_array(x)

    def allocate_like(self, x: Any) -> tuple[Any, Buffer]:
        """Return an empty array, in the memory order of x."""
        y = np.empty_like(x, subok=False)
        return y, Buffer(get_address(y), _get_steps(y))


LIBRARY = ArrayLibrary(buffers=NumPyBuffers())


def locate_array(x: np.ndarray[Any, Any]) -> Buffer | str:
    """Return where a NumPy array lies, or why a kernel can't read it there."""
    if not x.dtype.isnative:
        return "it is not in this machine's byte order"
    flags = x.flags
    if not flags.aligned:
        return "its elements are not aligned"
    if flags.c_contiguous:
        return Buffer(get_address(x), None)
    if any(step % x.itemsize for step in x.strides):
        return "its elements are not aligned"
    return Buffer(get_address(x), _get_steps(x))


def aligned_like(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an empty array of x's shape and dtype, in memory that other libraries can share."""
    room = np.empty(x.nbytes + _ALIGNMENT, dtype=np.uint8)
    first = -get_address(room) % _ALIGNMENT
    aligned: np.ndarray[Any, Any]
    aligned = room[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
    return aligned


def get_address(x: np.ndarray[Any, Any]) -> int:
    """Return the address of a NumPy array's first element."""
    address: int = x.__array_interface__["data"][0]
    return address


def _get_steps(x: np.ndarray[Any, Any]) -> tuple[int, ...] | None:
    if x.flags.c_contiguous:
        return None
    return tuple(step // x.itemsize for step in x.strides)
