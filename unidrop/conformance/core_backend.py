"""A backend whose arrays go through the core: what those of array-API libraries share."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

import unidrop
from unidrop.conformance.backend import BaseBackend
from unidrop.library import get_namespace_library
from unidrop.philox import philox

__all__ = ["FUSED", "CoreBackend", "eager_modes", "missing_eager_modes", "use_mode_path"]

#: The mode in which arrays take the fused kernels wherever those can take them.
FUSED = "fused"


def eager_modes(array: Any) -> tuple[str, ...]:
    """Return the modes of what runs at once: "eager", and "fused" if kernels take such an array."""
    return ("eager", FUSED) if unidrop.explain_path(array).name == FUSED else ("eager",)


def missing_eager_modes(array: Any) -> dict[str, str]:
    """Return the mode "fused" with the reason why kernels don't take such an array, if they don't.

    Examples
    --------
    >>> import numpy as np
    >>> with unidrop.force_path("portable"):
    ...     missing_eager_modes(np.ones(1))
    {'fused': 'unidrop.force_path says so'}
    """
    path = unidrop.explain_path(array)
    return {} if path.name == FUSED else {FUSED: path.reason}


def use_mode_path(mode: str) -> AbstractContextManager[None]:
    """Return the context in which arrays take a mode's path; eager modes are the portable one."""
    return unidrop.force_path("portable") if mode.startswith("eager") else nullcontext()


class CoreBackend(BaseBackend):
    """Calls `unidrop.dropout` eagerly; a subclass says how to reach its arrays.

    It has to define ``name``, ``xp`` (the namespace as users name it), ``dtypes`` and ``capabilities``
    (`core_capabilities` and what it adds), and may override the rest.
    """

    xp: Any

    core_capabilities: ClassVar[dict[str, str | None]] = {
        **dict.fromkeys(("broadcast_axes", "windows", "mask", "words", "key", "traced_key")),
        "traces": "it only runs eagerly",
    }

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> Any:
        """Return an array of the library."""
        return self.xp.asarray(x, device=device)

    def to_numpy(self, y: Any) -> NDArray[Any]:
        """Return a NumPy array."""
        return np.asarray(y)

    def get_device(self, y: Any) -> str:
        """Return the device's name."""
        return str(y.device)

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call the core."""
        with use_mode_path(mode):
            return unidrop.dropout(x, p, unidrop.Key(seed).fold_in(step), **options)

    def words(self, counter: Sequence[int], key: Sequence[int], *, mode: str) -> list[int]:
        """Run the generator on arrays: by the library's own where it serves masks and keys."""
        return [int(self.to_numpy(word)[0]) for word in self._words(counter, key)]

    def _words(self, counter: Sequence[int], key: Sequence[int]) -> Sequence[Any]:
        library, xp = get_namespace_library(self.xp)
        lo, hi, reserved, tag = counter
        if reserved == 0:
            return library.words.generate(xp, None, (hi, lo), 1, (key[0], key[1]), tag)
        words = library.words.arithmetic(xp, None)
        lanes = [xp.asarray([word], dtype=words.dtype) for word in counter]
        return philox((lanes[0], lanes[1], lanes[2], lanes[3]), (key[0], key[1]), words)

    def key(self, seed: int, *data: int | str) -> int:
        """Fold in Python's own integers and strings."""
        key = unidrop.Key(seed)
        for item in data:
            key = key.fold_in(item)
        return int(key)

    def traced_key(self, seed: int, step: int, *, mode: str) -> int:
        """Fold a 0-d int32 array into a key."""
        data = self.from_numpy(np.asarray(step, dtype=np.int32), self.devices[0], mode)
        lo, hi = self._folded(seed, data)
        return int(self.to_numpy(hi)) << 32 | int(self.to_numpy(lo))

    def _folded(self, seed: int, data: Any) -> Sequence[Any]:
        return unidrop.Key(seed).fold_in(data).words
