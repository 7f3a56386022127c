"""Dropout: a mask, a product and a selection.

N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever and R. Salakhutdinov, "Dropout: a simple way
to prevent neural networks from overfitting", JMLR 15 (2014). This is the inverted form, which
scales in training so that evaluation is the identity.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy

from unidrop.dispatch import find_kernels
from unidrop.dtypes import compute_dtype, dtype_name
from unidrop.key import Key, check_key
from unidrop.library import Library, get_library
from unidrop.mask import PIECE, window_mask
from unidrop.rate import Rate
from unidrop.window import Window

__all__ = ["DropoutPlan", "dropout"]


def dropout(
    x: Any,
    p: float,
    key: Key,
    *,
    training: bool = True,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Drop elements of an array with probability p and scale the rest by 1 / (1 - p).

    Parameters
    ----------
    x : array
        Any shape; float16, bfloat16, float32, float64, complex64 or complex128; of any library
        that follows the array API standard, or a TensorFlow tensor.
    p : int or float
        The probability of dropping an element, in [0, 1].
    key : Key
        The name of the mask: the same key drops the same elements in every library. One key, one
        use: fold the site and the step into it.
    training : bool, default True
        If False x is returned unchanged.
    broadcast_axes : sequence of int, default ()
        Axes along which one decision is shared, and the mask has length 1.
    global_shape, start : sequence of int, optional
        x is the block that begins at ``start`` of an array of shape ``global_shape``, and gets
        exactly that block of the whole mask. Elements of start may be 0-d integer arrays, whose
        values are not checked.
    return_mask : bool, default False
        Whether to return the mask too.

    Returns
    -------
    y : array
        Of x's shape, dtype and device. Kept elements are x times the scale, computed in float32
        (float64 for float64 and complex128) and then rounded to x's dtype; dropped ones are +0, NaN
        and infinities included. x itself where p is 0 or training is False.
    mask : array of bool
        Only with ``return_mask``: True where kept, of x's shape with 1 along ``broadcast_axes``.

    Raises
    ------
    TypeError
        If x is no array or has an integer or bool dtype, p is no Python number, or key no Key.
    ValueError
        If p is outside [0, 1], an axis does not exist, the window does not fit, or key is a batch
        of keys.

    Notes
    -----
    Where the library has a gradient, the gradient is this function of the upstream gradient, with
    the same mask, made again from the key: nothing of the size of x is kept for it.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key, dropout
    >>> dropout(numpy.ones(6, dtype="float32"), 0.5, Key(42))
    array([2., 0., 0., 0., 0., 2.], dtype=float32)
    """
    check_key(key)
    call = DropoutPlan.from_args(
        x,
        Rate.from_p(p),
        training=training,
        broadcast_axes=broadcast_axes,
        global_shape=global_shape,
        start=start,
    )
    if not call.drops:
        return (x, call.ones(x)) if return_mask else x
    if not return_mask:
        return call.drop(x, key)
    mask = call.mask(x, key)
    return call.drop(x, key, mask=mask), mask


@dataclass(frozen=True, slots=True)
class DropoutPlan:
    """A call whose arguments are valid and whose key is still to come.

    An adapter that draws a key, or counts its calls, does so after this has been made: a call
    that raises then changes no state, and one that drops nothing takes no key.

    Attributes
    ----------
    drops : bool
        Whether there is anything to do: training, at a rate above 0.
    """

    library: Library
    window: Window
    rate: Rate
    drops: bool

    @classmethod
    def from_args(
        cls,
        x: Any,
        rate: Rate,
        *,
        training: bool = True,
        broadcast_axes: Sequence[int] = (),
        global_shape: Sequence[int] | None = None,
        start: Sequence[Any] | None = None,
        name: str = "x",
    ) -> Self:
        """Validate the arguments of `dropout`, all but the key; raises what it raises.

        ``name`` is what the caller's users know the array as, for the messages.
        """
        library = get_library(x, name)
        compute_dtype(x.dtype, name)
        window = Window.from_args(library.shape(x), broadcast_axes, global_shape, start)
        drops = bool(training) and rate.p > 0
        return cls(library, window, rate, drops)

    def ones(self, x: Any) -> Any:
        """Return the mask of a call that drops nothing."""
        xp = self.library.namespace(x)
        return xp.ones(self.window.shape, dtype=xp.bool, device=self.library.device(x))

    def mask(self, x: Any, key: Key) -> Any:
        """Return the mask of a key, made as x is: traced, or at once."""
        xp, device = self.library.namespace(x), self.library.device(x)
        return window_mask(self.library, xp, self.window, self.rate, key, device, x)

    def drop(self, x: Any, key: Key, *, mask: Any = None, out: Any = None) -> Any:
        """Return the output under a key.

        Parameters
        ----------
        x : array
        key : Key
        mask : array of bool, optional
            The key's mask, if it has been made already.
        out : array, optional
            Of x's shape and dtype, or x itself: where to write, past any gradient.
        """
        if out is not None:
            return self._drop(x, key, mask, out)
        if self.library.is_traced(x):
            recorded = self.library.recorded(x, self.rate.p, key, self.window)
            if recorded is not None:
                return recorded
        return self.library.linear(
            x,
            lambda v: self._drop(v, key, mask, None),
            lambda upstream: self.drop(upstream, key),
        )

    def _drop(self, x: Any, key: Key, mask: Any, out: Any) -> Any:
        if not self.rate.keeps_nothing and 0 not in x.shape:
            kernels = find_kernels(self.library, x, key, self.window)
            if kernels is not None:
                package, memory, number, base = kernels
                return package.drop(
                    self.library, x, memory, self.window, self.rate, number, base, out
                )
            if mask is None and out is None:
                compiled = self.library.compiled(x, self.rate, key, self.window)
                if compiled is not None:
                    return compiled
        y = self.select(x, self.mask(x, key) if mask is None else mask)
        if out is None:
            return y
        self.library.assign(out, y)
        return out

    def select(self, x: Any, mask: Any) -> Any:
        """Return x times the scale where a mask is True, and +0 elsewhere."""
        return _select(self.library, self.library.namespace(x), x, mask, self.rate)


def _select(library: Library, xp: Any, x: Any, mask: Any, rate: Rate) -> Any:
    """Return x times the scale where the mask is True and +0 elsewhere, in bounded memory."""
    if rate.keeps_nothing:
        return xp.zeros_like(x)
    if library.is_traced(x):
        return _select_part(library, xp, x, mask, rate)
    if math.prod(x.shape) <= PIECE:
        return library.match_strides(_select_part(library, xp, x, mask, rate), x)
    if not library.is_mutable(xp.empty((0,))):
        return _select_and_join(library, xp, x, mask, rate)
    y = xp.empty_like(x)
    for cut in _cuts(x.shape):
        y[cut] = _select_part(library, xp, x[cut], mask[_shared(cut, mask)], rate)
    return y


def _select_and_join(library: Library, xp: Any, x: Any, mask: Any, rate: Rate) -> Any:
    """Return what `_select` does where items can't be assigned, at the price of one more output."""
    if mask.shape == x.shape and x.ndim > 1:
        x_flat, mask_flat = xp.reshape(x, (-1,)), xp.reshape(mask, (-1,))
        return xp.reshape(_select_and_join(library, xp, x_flat, mask_flat, rate), x.shape)
    axis = max(range(x.ndim), key=lambda i: x.shape[i])
    length = x.shape[axis]
    step = max(1, PIECE * length // math.prod(x.shape))
    cuts = [
        (*(slice(None),) * axis, slice(first, min(first + step, length)), ...)
        for first in range(0, length, step)
    ]
    whole = mask.shape[axis] == 1
    parts = [_select_part(library, xp, x[cut], mask if whole else mask[cut], rate) for cut in cuts]
    return xp.concat(parts, axis=axis)


def _cuts(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yield the parts of an array, of at most `PIECE` elements each, cut along its longest axes."""
    size = math.prod(shape)
    slices = [[slice(None)] for _ in shape]
    for axis in sorted(range(len(shape)), key=lambda i: -shape[i]):
        if size <= PIECE:
            break
        length, inner = shape[axis], size // shape[axis]
        step = max(1, PIECE // inner)
        slices[axis] = [slice(i, min(i + step, length)) for i in range(0, length, step)]
        size = inner * step
    return itertools.product(*slices)


def _shared(cut: tuple[slice, ...], mask: Any) -> tuple[slice, ...]:
    """Return the part of a mask for a part of an array: all of each axis that it shares."""
    pairs = zip(cut, mask.shape, strict=True)
    return tuple(slice(None) if length == 1 else part for part, length in pairs)


def _select_part(library: Library, xp: Any, x: Any, mask: Any, rate: Rate) -> Any:
    name = compute_dtype(x.dtype)
    dtype = getattr(xp, name)
    scale = rate.scale_in(name)
    zero = xp.zeros((), dtype=dtype, device=library.device(x))

    def scaled(component: Any) -> Any:
        return xp.where(mask, component * scale, zero)

    # An overflow to infinity is what the output rule asks for, and none at all where dropped.
    with numpy.errstate(over="ignore", invalid="ignore"):
        if dtype_name(x.dtype).startswith("complex"):
            y = library.complex(xp, scaled(xp.real(x)), scaled(xp.imag(x)))
        else:
            y = scaled(xp.astype(x, dtype, copy=False))
        y = xp.astype(y, x.dtype, copy=False)
    if y.dtype != x.dtype:
        raise TypeError(f"x has dtype {x.dtype}, which {xp.__name__} does not have here and now")
    return y
