"""The plan: the validated arguments of a call, which lack only the key, and their execution."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

from unidrop.dispatch import fused_dropout
from unidrop.dtypes import compute_dtype
from unidrop.key import Key
from unidrop.library import get_library
from unidrop.mask import constant_mask, make_mask, portable_mask
from unidrop.output import select
from unidrop.protocols import ArrayLibrary
from unidrop.rate import KEEP_NOTHING, Rate
from unidrop.window import Window

__all__ = ["DropoutPlan"]


@dataclass(frozen=True, slots=True)
class DropoutPlan:
    """The validated arguments of a call; only the key is missing.

    An adapter makes the plan before it draws a key or counts a call. So a call that raises changes
    no state, and a call that drops nothing uses no key.

    Attributes
    ----------
    library : ArrayLibrary
        The library of the array.
    window : Window
        The block of the mask that belongs to the array.
    rate : Rate
        The probability of dropping an element, its threshold and its scale.
    drops : bool
        Whether the call drops anything: it is in training, at a rate above 0.
    """

    library: ArrayLibrary
    window: Window
    rate: Rate
    drops: bool

    #: Whether kernels and generators of a library may run the plan in place of `run_portable`.
    has_kernels: ClassVar[bool] = True

    #: Whether an element of the output depends on one element of the input and of the mask alone.
    is_elementwise: ClassVar[bool] = True

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
        """Validate the arguments of `dropout` except the key; raises as `dropout`.

        ``name`` is the name of the array in error messages.
        """
        library = get_library(x, name)
        arrays = library.arrays
        arrays.check(x, name)
        is_scheduled = rate.is_scheduled
        drops = bool(training) and (is_scheduled or rate.p > 0)
        has_axes = type(broadcast_axes) is not tuple or broadcast_axes != ()
        is_whole = not has_axes and global_shape is None and start is None
        if is_whole and not is_scheduled and not arrays.is_traced(x):
            try:
                return cls.for_whole(library, tuple(x.shape), x.dtype, rate, drops, name)
            except TypeError:  # the dtype is wrong, which raises below, or it cannot be hashed
                pass
        compute_dtype(x.dtype, name)
        window = Window.from_args(arrays.shape(x), broadcast_axes, global_shape, start)
        return cls(library, window, rate, drops)

    @classmethod
    @lru_cache(maxsize=1024)  # models call few layers with few shapes, again and again
    def for_whole(
        cls,
        library: ArrayLibrary,
        shape: tuple[int, ...],
        dtype: Any,
        rate: Rate,
        drops: bool,
        name: str,
    ) -> Self:
        """Return the plan of an array that is not traced and not part of a larger one.

        An adapter that knows these facts calls this instead of `from_args`; raises the same.
        """
        compute_dtype(dtype, name)
        return cls(library, Window.from_args(shape), rate, drops)

    def call(self, x: Any, key: Any, return_mask: bool) -> Any:
        """Return the output of a call, and its mask if ``return_mask``.

        If the call drops nothing, ``key`` may be anything; otherwise it is a `Key`.
        """
        if not self.drops:
            return (x, self.ones(x)) if return_mask else x
        if not return_mask:
            return self.apply(x, key)
        mask = self.mask(x, key)
        return self.apply(x, key, mask), mask

    def ones(self, x: Any) -> Any:
        """Return the mask of a call that drops nothing."""
        xp = self.library.arrays.namespace(x)
        device = self.library.arrays.device(x)
        return constant_mask(xp, self.window, True, device)

    @property
    def gradient(self) -> "DropoutPlan":
        """The plan that computes the gradient from the upstream gradient, under the same key."""
        return self

    def mask(self, x: Any, key: Key) -> Any:
        """Return the mask of a key for x: recorded if x is traced, otherwise computed now."""
        device = self.library.arrays.device(x)
        return make_mask(self.library, x, key, self.window, self.rate, device)

    def apply(self, x: Any, key: Key, mask: Any = None) -> Any:
        """Return the output under a key, by the operator of x's library, and so differentiable.

        ``mask`` is the mask of the key if the caller has it.
        """
        return self.library.operator.dropout(x, key, self, mask)

    def run(self, x: Any, key: Key, mask: Any = None, out: Any = None) -> Any:
        """Compute the output under a key: the values inside the operator of a library.

        ``out`` is an array of x's shape and dtype to write and return; it may be x.
        """
        y = self.run_fused(x, key, out)
        if y is not None:
            return y
        if mask is not None:
            y = self.select(x, mask)
        elif self.rate.threshold == 0 or self.is_trivial(x):
            y = self.select(x, self.mask(x, key))
        else:  # kernels that cannot run for x cannot run for its mask either
            y = self.run_portable(x, key)
        if out is None:
            return y
        self.library.buffers.copy_into(out, y)
        return out

    def run_fused(self, x: Any, key: Key, out: Any = None) -> Any | None:
        """Compute the output by fused kernels, or return None if they cannot run."""
        if self.is_trivial(x):
            return None
        return fused_dropout(self.library, x, key, self.window, self.rate, out)

    def run_portable(self, x: Any, key: Key) -> Any:
        """Compute the output of an array that is not empty by the operations of its library."""
        device = self.library.arrays.device(x)
        mask = portable_mask(self.library, x, key, self.window, self.rate, device)
        return self.select(x, mask)

    def is_trivial(self, x: Any) -> bool:
        """Return whether the output needs no generator: nothing is kept, or x is empty."""
        return self.rate.threshold == KEEP_NOTHING or 0 in x.shape

    def select(self, x: Any, mask: Any) -> Any:
        """Return x times the scale for elements in the mask, and +0 for the others."""
        return select(self.library, x, mask, self.rate)
