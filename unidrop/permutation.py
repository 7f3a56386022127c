"""Random permutations of a key, and dropout of whole tokens, such as the patches of an image.

A permutation sorts words of the generator, in a separate numbering, by a stable sort. So it is
equal in every library.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy

from unidrop.arguments import checked_index
from unidrop.key import Key, check_key
from unidrop.library import get_namespace_library
from unidrop.mask import compute_window
from unidrop.plan import DropoutPlan
from unidrop.protocols import ArrayLibrary
from unidrop.rate import Rate
from unidrop.window import Window
from unidrop.words import SplitInteger

__all__ = [
    "PERMUTATION_TAG",
    "PatchPlan",
    "check_patch_rate",
    "check_prefix",
    "make_permutation",
    "patch_dropout",
    "permutation",
    "plan_patch_dropout",
]

#: The last counter word of permutations.
PERMUTATION_TAG: Final = 4


def permutation(
    shape: Sequence[int],
    key: Key,
    *,
    xp: Any = None,
    device: Any = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
) -> Any:
    """Return a random permutation of 0, 1, ..., n - 1 for each row of an array of a shape.

    Parameters
    ----------
    shape : sequence of int
        The shape, whose last length is n.
    key : Key
        The name of the permutations. Use each key once.
    xp, device
        As in `keep_mask`.
    global_shape, start : sequence of int, optional
        As in `keep_mask`; the last axis must be whole.

    Returns
    -------
    array of int
        Of the given shape.

    Raises
    ------
    TypeError, ValueError
        As `keep_mask`; ValueError if the shape has no axis, or a window cuts the last one.

    Examples
    --------
    >>> from unidrop import Key
    >>> from unidrop.family import permutation
    >>> permutation((2, 5), Key(42))
    array([[0, 4, 2, 3, 1],
           [4, 1, 3, 2, 0]])
    """
    check_key(key)
    window = Window.from_args(shape, (), global_shape, start)
    if not window.shape:
        raise ValueError("shape must have an axis to permute, got ()")
    _check_whole(window, (len(window.shape) - 1,))
    library, xp = get_namespace_library(numpy if xp is None else xp)
    return make_permutation(library, xp.zeros((0,), device=device), key, window, device)


def make_permutation(
    library: ArrayLibrary, like: Any, key: Key, window: Window, device: Any
) -> Any:
    """Return the permutations of a window on a device, traced if the array ``like`` is traced."""
    permuted = None
    if library.arrays.is_traced(like):
        permuted = library.operator.traced_permutation(like, key, window)
    return _sort_words(library, like, key, window, device) if permuted is None else permuted


def _sort_words(library: ArrayLibrary, like: Any, key: Key, window: Window, device: Any) -> Any:
    """Return permutations by the operations of the library."""
    xp = library.arrays.namespace(like)
    dtype = library.words.arithmetic(xp, device).dtype

    def compute(first: SplitInteger, count: Any) -> Any:
        lo, hi = key._words
        block = library.words.generate_runs(xp, device, first, count, (lo, hi), PERMUTATION_TAG)
        return xp.reshape(xp.stack(block, axis=-1), (-1,))

    if isinstance(window.size, int) and window.size == 0:
        words = xp.zeros(window.shape, dtype=dtype, device=device)
    else:
        words = compute_window(library, like, key, window, device, 4, compute, dtype)
    return xp.argsort(words, axis=-1, stable=True)


def _check_whole(window: Window, axes: Sequence[int]) -> None:
    """Raise ValueError if a window cuts an axis."""
    if window.global_shape is None or window.start is None:
        return
    for axis in axes:
        if window.global_shape[axis] != window.shape[axis]:
            raise ValueError(
                f"the window must not cut axis {axis}, whose elements are permuted, got "
                f"{window.shape[axis]} of {window.global_shape[axis]} elements"
            )


@dataclass(frozen=True, slots=True)
class PatchPlan(DropoutPlan):
    """A plan that keeps some tokens of each example, and returns a shorter array.

    The window is the one of the tokens that may be dropped. Where other plans have a mask, this one
    has the indices of the kept tokens.
    """

    prefix: int
    kept: int
    ordered: bool

    has_kernels: ClassVar[bool] = False
    is_elementwise: ClassVar[bool] = False

    def mask(self, x: Any, key: Key) -> Any:
        """Return the indices of kept tokens, of shape ``(N, kept)``; prefix tokens do not count."""
        xp, device = self.library.arrays.namespace(x), self.library.arrays.device(x)
        indices = make_permutation(self.library, x, key, self.window, device)[:, : self.kept]
        return xp.sort(indices, axis=-1) if self.ordered else indices

    def ones(self, x: Any) -> None:
        """Return None: a call that drops nothing has no indices."""
        return

    def apply(self, x: Any, key: Key, mask: Any = None) -> Any:
        """Return the kept tokens, by differentiable operations of x's library."""
        arrays = self.library.arrays
        xp, device = arrays.namespace(x), arrays.device(x)
        indices = self.mask(x, key) if mask is None else mask
        rows, length, *rest = arrays.shape(x)
        dtype = self.library.words.arithmetic(xp, device).dtype
        first = xp.arange(rows, dtype=dtype, device=device) * length + self.prefix
        places = xp.astype(indices, dtype) + xp.expand_dims(first, axis=-1)
        flat = xp.reshape(x, (rows * length, *rest))
        taken = xp.take(flat, xp.reshape(places, (-1,)), axis=0)
        taken = xp.reshape(taken, (rows, self.kept, *rest))
        return xp.concat([x[:, : self.prefix, ...], taken], axis=1) if self.prefix else taken

    def run(self, x: Any, key: Key, mask: Any = None, out: Any = None) -> Any:
        """Compute the output under a key."""
        return self.apply(x, key, mask)


def check_patch_rate(p: Any, name: str = "p") -> Rate:
    """Return the rate of patch dropout; raises ValueError if it is 1, which leaves nothing."""
    rate = Rate.from_p(p, name)
    if rate.p == 1:
        raise ValueError(f"dropout probability {name} must be below 1 for patch dropout, got 1")
    return rate


def check_prefix(num_prefix_tokens: Any) -> int:
    """Return a number of prefix tokens; raises TypeError and ValueError."""
    prefix = checked_index(num_prefix_tokens, "num_prefix_tokens")
    if prefix < 0:
        raise ValueError(f"num_prefix_tokens must be at least 0, got {prefix}")
    return prefix


def plan_patch_dropout(
    x: Any,
    rate: Rate,
    *,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    name: str = "x",
) -> DropoutPlan:
    """Return the plan of `patch_dropout`."""
    check_patch_rate(rate.p)
    prefix = check_prefix(num_prefix_tokens)
    options: dict[str, Any] = {"global_shape": global_shape, "start": start}
    plan = DropoutPlan.from_args(x, rate, training=training, name=name, **options)
    shape = plan.library.arrays.shape(x)
    if len(shape) < 2:
        raise ValueError(f"{name} must have axes of rows and tokens, got shape {tuple(shape)}")
    _check_whole(plan.window, range(1, len(shape)))
    if not isinstance(shape[1], int):
        raise ValueError(f"{name} must have a known length along axis 1, got {x.shape}")
    length = shape[1] - prefix
    if length < 0:
        raise ValueError(
            f"num_prefix_tokens must be at most the length along axis 1, {shape[1]}, got {prefix}"
        )
    kept = min(length, max(1, math.floor(length * (1 - rate.p))))
    window = Window.from_args((shape[0], length))
    if plan.window.global_shape is not None and plan.window.start is not None:
        whole, first = plan.window.global_shape[0], plan.window.start[0]
        window = Window.from_args((shape[0], length), (), (whole, length), (first, 0))
    drops = plan.drops and length > 0
    return PatchPlan(plan.library, window, rate, drops, prefix, kept, bool(ordered))


def patch_dropout(
    x: Any,
    p: float,
    key: Key,
    *,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_indices: bool = False,
) -> Any:
    """Remove a share p of the tokens of each example, so that the rest takes less time.

    Parameters
    ----------
    x : array
        Of shape ``(N, L, ...)``, with L tokens; dtypes and libraries as in `dropout`.
    p : int or float
        The share of tokens to remove, in [0, 1).
    key : Key
        The name of the permutations that choose the tokens. Use each key once.
    num_prefix_tokens : int, default 1
        The number of first tokens to keep, such as a class token.
    ordered : bool, default False
        If True, kept tokens stay in order; otherwise their order is random.
    training : bool, default True
        If False, x is returned unchanged.
    global_shape, start : sequence of int, optional
        As in `dropout`; a window may cut the first axis alone.
    return_indices : bool, default False
        If True, the indices of kept tokens are returned too.

    Returns
    -------
    y : array
        The prefix tokens, then ``max(1, floor((L - num_prefix_tokens) * (1 - p)))`` others, without
        scaling.
    indices : array of int, or None
        Only with ``return_indices``: of shape ``(N, kept)``; 0 is the first token after the prefix.
        None if nothing is removed.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; ValueError if p is 1, x has no axis of tokens, or fewer than the prefix.

    Notes
    -----
    Y. Liu et al., "PatchDropout: economizing vision transformers using patch dropout", WACV 2023.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key
    >>> from unidrop.family import patch_dropout
    >>> x = numpy.arange(9.0)[None, :, None]
    >>> patch_dropout(x, 0.5, Key(42), ordered=True)[0, :, 0]
    array([0., 1., 3., 5., 7.])
    """
    check_key(key)
    options: dict[str, Any] = {"num_prefix_tokens": num_prefix_tokens, "ordered": ordered}
    options |= {"training": training, "global_shape": global_shape, "start": start}
    return plan_patch_dropout(x, check_patch_rate(p), **options).call(x, key, return_indices)
