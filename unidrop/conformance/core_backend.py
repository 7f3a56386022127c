"""Share the code of backends that call the core, such as array API libraries."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

import unidrop
from unidrop import family
from unidrop.conformance.backend import BaseBackend
from unidrop.conformance.family import MEMBERS
from unidrop.dispatch import forbid_plain_calls
from unidrop.library import get_namespace_library
from unidrop.philox import philox

__all__ = ["FUSED", "GENERAL", "CoreBackend", "eager_modes", "missing_eager_modes", "use_mode_path"]

#: The mode that uses the fused kernels for every array that they support.
FUSED = "fused"

#: The mode that calls them as for any array, where an adapter has a shorter way for plain ones.
GENERAL = "fused-general"


def eager_modes(array: Any) -> tuple[str, ...]:
    """Return the modes without compilation: "eager", and "fused" if kernels support the array."""
    return ("eager", FUSED) if unidrop.explain_path(array).name == FUSED else ("eager",)


def missing_eager_modes(array: Any) -> dict[str, str]:
    """Map the mode "fused" to the reason if kernels do not support the array; else return {}.

    Examples
    --------
    >>> import numpy as np
    >>> with unidrop.force_path("portable"):
    ...     missing_eager_modes(np.ones(1))
    {'fused': 'unidrop.force_path forces it'}
    """
    path = unidrop.explain_path(array)
    return {} if path.name == FUSED else {FUSED: path.reason}


def use_mode_path(mode: str) -> AbstractContextManager[None]:
    """Return a context that forces the portable path in eager modes, and the general call."""
    if mode.startswith("eager"):
        return unidrop.force_path("portable")
    return forbid_plain_calls() if mode == GENERAL else nullcontext()


def _call(x: Any, p: Any, key: unidrop.Key, *, member: str = "dropout", **options: Any) -> Any:
    """Call `unidrop.dropout`, or another member of the family."""
    function = unidrop.dropout if member == "dropout" else getattr(family, member)
    return function(x, p, key, **options)


class CoreBackend(BaseBackend):
    """A backend that calls `unidrop.dropout` eagerly; a subclass converts its arrays.

    A subclass must define ``name``, ``xp`` (the namespace that users import), and ``capabilities``
    (`core_capabilities` and its own). It may override every other member, such as ``dtypes``.
    """

    xp: Any
    members: Mapping[str, str | None] = MappingProxyType(dict.fromkeys(MEMBERS))

    core_capabilities: ClassVar[dict[str, str | None]] = {
        **dict.fromkeys(("broadcast_axes", "windows", "mask", "family")),
        **dict.fromkeys(("words", "key", "traced_key")),
        **dict.fromkeys(
            ("attention", "attention_gradient", "attention_windows"),
            "unidrop has no attention for this library",
        ),
        "traces": "no mode compiles",
    }

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Convert with the namespace's ``asarray``."""
        return self.xp.asarray(x, device=device)

    def to_numpy(self, y: Any) -> NDArray[Any]:
        """Convert with `numpy.asarray`."""
        return np.asarray(y)

    def get_device(self, y: Any) -> str:
        """Return the device as a string."""
        return str(y.device)

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call `unidrop.dropout` on the mode's path."""
        with use_mode_path(mode):
            return _call(x, p, unidrop.Key(seed).fold_in(step), **options)

    def words(self, counter: Sequence[int], key: Sequence[int], *, mode: str) -> list[int]:
        """Run the generator on arrays, as masks and keys do."""
        return [int(self.to_numpy(word)[0]) for word in self._run_generator(counter, key)]

    def _run_generator(self, counter: Sequence[int], key: Sequence[int]) -> Sequence[Any]:
        """Run the library's generator; it only supports counters of masks and keys."""
        library, xp = get_namespace_library(self.xp)
        lo, hi, reserved, tag = counter
        if reserved == 0:
            return library.words.generate(xp, None, (hi, lo), 1, (key[0], key[1]), tag)
        words = library.words.arithmetic(xp, None)
        lanes = [xp.asarray([word], dtype=words.dtype) for word in counter]
        return philox((lanes[0], lanes[1], lanes[2], lanes[3]), (key[0], key[1]), words)

    def key(self, seed: int, *data: int | str) -> int:
        """Fold in Python integers and strings."""
        key = unidrop.Key(seed)
        for item in data:
            key = key.fold_in(item)
        return int(key)

    def traced_key(self, seed: int, step: int, *, mode: str) -> int:
        """Fold a 0-d int32 array into a key."""
        data = self.from_numpy(np.asarray(step, dtype=np.int32), self.devices[0], mode)
        lo, hi = self._fold_in(seed, data)
        return int(self.to_numpy(hi)) << 32 | int(self.to_numpy(lo))

    def _fold_in(self, seed: int, data: Any) -> Sequence[Any]:
        """Return the words of a key, as arrays if data is one."""
        return unidrop.Key(seed).fold_in(data).words
