"""JAX's part of the core: words, keep flags, the operator, and buffers."""

from typing import Any

import jax
import numpy as np
from jax import lax

from unidrop.adapters.jax.generator import WORDS, generate, keep_flags, keep_flags_by_loop
from unidrop.adapters.jax.primitive import drop, is_on_cpu, keep_mask
from unidrop.adapters.numpy.arrays import allocate_aligned_like, get_address, locate_array
from unidrop.dispatch import check_fused, is_forced
from unidrop.key import Key
from unidrop.philox import PhiloxBlock
from unidrop.plan import DropoutPlan
from unidrop.protocols import ArrayLibrary, Arrays, Buffer, Buffers, Operator, Words
from unidrop.rate import Rate
from unidrop.window import Window
from unidrop.words import SplitInteger, WordArithmetic

__all__ = ["LIBRARY", "as_jax_word"]


class JaxArrays(Arrays):
    """JAX arrays and tracers."""

    def check_type(self, kind: type, name: str) -> None:
        """Raise TypeError for other classes of JAX, such as sparse matrices and references."""
        if not issubclass(kind, jax.Array | jax.core.Tracer | np.ndarray):
            raise TypeError(f"{name} must be a jax.Array, got {kind.__name__}")

    def device(self, x: Any) -> None:
        """Leave placement to JAX: uncommitted arrays follow x, also under a trace."""
        return

    def is_traced(self, x: Any) -> bool:
        """Return whether x is a tracer."""
        return isinstance(x, jax.core.Tracer)

    def is_on_cpu(self, x: Any) -> bool:
        """Return whether the devices of an array are CPUs."""
        return is_on_cpu(x)

    def complex(self, xp: Any, real: Any, imag: Any) -> Any:
        """Return ``jax.lax.complex``."""
        return lax.complex(real, imag)


class JaxWords(Words):
    """Words in ``uint32``, also if JAX has 64-bit integers."""

    def arithmetic(self, xp: Any, device: Any) -> WordArithmetic:
        """Return arithmetic on ``uint32``."""
        return WORDS

    def generate(
        self, xp: Any, device: Any, first: SplitInteger, count: Any, key: tuple[Any, Any], tag: int
    ) -> PhiloxBlock:
        """Return the words of consecutive blocks, by one compiled program."""
        block: PhiloxBlock = generate(*map(as_jax_word, (*first, *key, tag)), count=count)
        return block

    def keep_flags(
        self,
        xp: Any,
        device: Any,
        first: SplitInteger,
        count: Any,
        key: tuple[Any, Any],
        threshold: int,
    ) -> Any:
        """Return whether each element is kept, flat, by one compiled program."""
        numbers = tuple(map(as_jax_word, (*first, *key, threshold)))
        # The primitive calls this in programs for the CPU alone.
        is_traced = any(isinstance(number, jax.core.Tracer) for number in numbers)
        return (keep_flags_by_loop if is_traced else keep_flags)(*numbers, count=count)

    def split(self, xp: Any, device: Any, value: Any, name: str) -> SplitInteger:
        """Return an integer as words; it may have 64 bits if the user has enabled x64."""
        if isinstance(value, tuple):
            return value
        bits = self.width(value, name)
        if bits == 64 and not jax.config.jax_enable_x64:
            return super().split(xp, device, value, name)  # raises
        return WORDS.split(value, bits)


class JaxOperator(Operator):
    """Dropout as a JAX primitive."""

    def dropout(self, x: Any, key: Key, plan: DropoutPlan, mask: Any = None) -> Any:
        """Apply dropout by the primitive."""
        if (mask is not None and not plan.rate.is_scheduled) or plan.is_trivial(x):
            return plan.run(x, key, mask)
        if is_forced("fused"):
            check_fused(LIBRARY, x, key, plan.window)
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            raise TypeError(f"x has dtype {x.dtype}, which jax.numpy does not support without x64")
        return drop(x, *_get_operands(key, plan.window), plan, is_forced("portable"))

    def traced_mask(self, like: Any, key: Key, window: Window, rate: Rate) -> Any:
        """Return the mask by the primitive, whose generator is faster."""
        check_fused(LIBRARY, like, key, window)
        return keep_mask(
            *_get_operands(key, window), DropoutPlan(LIBRARY, window, rate, drops=True)
        )


class JaxBuffers(Buffers):
    """Arrays on the first device, if that is a CPU."""

    def locate(self, x: Any) -> Buffer | str:
        """Return the buffer of an array on the first CPU device."""
        devices = x.devices()
        if devices != {jax.devices()[0]}:
            return "it is not on JAX's first device alone, and kernels would put its output there"
        if jax.devices()[0].platform != "cpu":
            return f"it is on {jax.devices()[0]}, and kernels are for the CPU"
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            return f"JAX does not support {x.dtype} without x64"
        return locate_array(np.asarray(x))

    def allocate_like(self, x: Any) -> tuple[np.ndarray[Any, Any], Buffer]:
        """Return a NumPy array, whose memory JAX can adopt."""
        y = allocate_aligned_like(np.asarray(x))
        return y, Buffer(get_address(y), None)

    def wrap(self, handle: np.ndarray[Any, Any], x: Any) -> Any:
        """Return an array in the same memory, or a copy if JAX cannot adopt it."""
        return jax.device_put(handle, x.sharding if x.committed else None)

    def from_numpy(self, mask: np.ndarray[Any, Any], device: Any) -> Any:
        """Return an array in the same memory, or a copy if JAX cannot adopt it."""
        return jax.device_put(mask)


LIBRARY = ArrayLibrary(JaxArrays(), JaxWords(), JaxOperator(), JaxBuffers())


def _get_operands(key: Key, window: Window) -> tuple[SplitInteger, list[SplitInteger]]:
    """Return the words of a key, and the words of the starts of a window that are arrays."""
    lo, hi = map(as_jax_word, key._words)
    offsets = () if window.start is None else window.offsets
    return (lo, hi), [LIBRARY.split(start, "start") for start, _ in offsets]


def as_jax_word(word: Any) -> Any:
    """Return a word in ``uint32``: JAX would treat a Python integer as signed with 32 bits."""
    if isinstance(word, int):
        return np.uint32(word)
    return word if word.dtype == np.uint32 else LIBRARY.split(word, "key")[1]
