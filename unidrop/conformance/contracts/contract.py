"""What a contract is, and the cell in which it is run: one backend, device, dtype and mode."""

import math
import shlex
from collections.abc import Callable, Collection, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

import unidrop
from unidrop.conformance.backend import CAPABILITIES, Backend, CapableBackend
from unidrop.conformance.compare import ContractError, check_output, numpy_dtype
from unidrop.conformance.diagnosis.search import diagnose
from unidrop.conformance.diagnosis.stream_model import StreamModel

__all__ = [
    "CONTRACTS",
    "RATE",
    "SEED",
    "SHAPE",
    "STEPS",
    "Cell",
    "Contract",
    "check_model_output",
    "contract",
    "reference_result",
    "require_nonempty",
]

#: The seed of cells that are given no other.
SEED = 42

#: What contracts are of that may be of any shape and rate: a compiled mode, where each would take
#: another program, then has one for all of them. It is the golden outputs' too.
SHAPE, RATE = (8, 8), 0.4

#: How many steps a compiled mode has to take with what it traced at the first.
STEPS = 20


@dataclass(frozen=True, slots=True)
class Contract:
    """A named check with one sentence of what it promises.

    Attributes
    ----------
    name : str
    promise : str
        In one sentence.
    check : callable
        Raises `ContractError` where it does not hold.
    needs : tuple of str
        The capabilities without which it can't be run.
    every_dtype : bool
        Whether it is run for each dtype of a mode, or for one.
    compiled_dtypes : collection of str
        For which dtypes it is run in compiled modes, where each takes a compilation, beside one.
    compiled_only : bool
        Whether it is about compiled modes.
    in_derived_modes : bool
        Whether it is run in a mode that is a variant of another, in which it is: not if it only
        looks closer at what decides about an element, in which a variant has no part.
    """

    name: str
    promise: str
    check: Callable[["Cell"], None]
    needs: tuple[str, ...]
    every_dtype: bool
    compiled_dtypes: Collection[str]
    compiled_only: bool
    in_derived_modes: bool


@dataclass(frozen=True, slots=True)
class Cell:
    """One contract for one backend, device, dtype and mode.

    The seed is that of whatever the golden vectors do not fix.
    """

    contract: Contract
    backend: Backend
    device: str
    dtype: str
    mode: str
    seed: int = SEED

    def __str__(self) -> str:
        return "-".join(self.names().values())

    def names(self) -> dict[str, str]:
        """Return what names the cell."""
        return {
            "contract": self.contract.name,
            "backend": self.backend.name,
            "device": self.device,
            "dtype": self.dtype,
            "mode": self.mode,
        }

    @property
    def is_compiled(self) -> bool:
        """Whether the mode compiles each shape and rate, so that a contract looks at fewer."""
        return self.mode in self.backend.compiled_modes

    @property
    def able(self) -> CapableBackend:
        """The backend, seen as one that has the capabilities which the contract needs."""
        return cast(CapableBackend, self.backend)

    def array(self, x: NDArray[Any]) -> Any:
        """Return a NumPy array as the backend's."""
        return self.backend.from_numpy(x, self.device, self.mode)

    def ones(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return ones of the cell's dtype, as NumPy's."""
        return np.ones(shape, dtype=numpy_dtype(self.dtype))

    def values(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return ordinary values of the cell's dtype between -2 and 2, none of them 0."""
        size = math.prod(shape)
        real = np.linspace(-2, 2, 2 * size + 2)[1::2][:size].reshape(shape)
        if self.dtype.startswith("complex"):
            return np.asarray(real + 1j * np.flip(real), dtype=self.dtype)
        return real.astype(numpy_dtype(self.dtype))

    def dropout(
        self, x: NDArray[Any], p: Any, step: int = 0, *, seed: int | None = None, **options: Any
    ) -> NDArray[Any]:
        """Run the backend's dropout on a NumPy array and return NumPy's."""
        seed = self.seed if seed is None else seed
        y = self.backend.dropout(self.array(x), p, seed, step, mode=self.mode, **options)
        return self.backend.to_numpy(y)

    @property
    def is_fresh(self) -> bool:
        """Whether no contract that calls dropout has been run in the mode, so none is traced."""
        where = self.device, self.mode
        return not any(at is self.backend and of == where for at, of in _used)

    def _note(self) -> None:
        if _used and _used[0][0] is not self.backend:
            _used.clear()  # or they would live for ever
        if self.is_fresh and not _OF_WORDS.intersection(self.contract.needs):
            _used.append((self.backend, (self.device, self.mode)))

    def keeps(
        self, shape: tuple[int, ...], p: float, step: int = 0, **options: Any
    ) -> NDArray[np.bool]:
        """Return which elements the backend keeps."""
        kept: NDArray[np.bool] = self.dropout(self.ones(shape), p, step, **options) != 0
        return kept

    def diff(self, recipe: StreamModel) -> str:
        """Return the command that says where the cell's mask of a recipe is wrong, and why."""
        where = self.names()
        del where["contract"]  # any may have asked for the mask
        named = " ".join(f"--{name} {shlex.quote(of)}" for name, of in where.items())
        return f"unidrop diff {named} {recipe.arguments}"

    def key(self, step: int) -> unidrop.Key:
        """Return the key of a step of the cell's seed."""
        return unidrop.Key(self.seed).fold_in(step)

    def check(self) -> None:
        """Run the contract, and raise ContractError or what else there is where it fails."""
        try:
            self.contract.check(self)
        finally:
            self._note()


# Of the last backend, on which devices and in which modes contracts have called dropout.
_used: list[tuple[Backend, tuple[str, str]]] = []

# What contracts need that call no dropout.
_OF_WORDS = frozenset(("words", "key", "traced_key"))

#: All contracts by their names, in the order in which they are shown.
CONTRACTS: dict[str, Contract] = {}


def contract(
    name: str,
    promise: str,
    needs: tuple[str, ...] = (),
    *,
    every_dtype: bool = False,
    compiled_dtypes: Collection[str] = (),
    compiled_only: bool = False,
    in_derived_modes: bool = True,
) -> Callable[[Callable[[Cell], None]], Callable[[Cell], None]]:
    """Register the check of a contract, whose attributes are those of `Contract`.

    Raises
    ------
    ValueError
        If it needs what is no capability.
    """
    if not set(needs) <= set(CAPABILITIES):
        raise ValueError(f"needs has to name capabilities, but got {needs}")

    def register(check: Callable[[Cell], None]) -> Callable[[Cell], None]:
        CONTRACTS[name] = Contract(
            name,
            promise,
            check,
            needs,
            every_dtype,
            compiled_dtypes,
            compiled_only,
            in_derived_modes,
        )
        return check

    return register


def reference_result(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call the core on its portable path, which no kernel has a part in."""
    with unidrop.force_path("portable"):
        return function(*args, **options)


def check_model_output(
    recipe: StreamModel,
    actual: NDArray[Any],
    expected: NDArray[Any],
    x: NDArray[Any],
    what: str,
    diff: str = "",
) -> None:
    """Compare an output as `check_output` does; an error says which mistake explains it.

    ``diff`` is the command that says more where it is the mask that is wrong.
    """
    try:
        check_output(actual, expected, x, what)
    except ContractError as error:
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            raise
        diagnosis = diagnose(recipe, actual, x, pairs=False)
        if diagnosis is None:
            raise
        raise error.explained(diagnosis.causes, diff if diagnosis.is_of_mask else "") from None


def require_nonempty(chosen: Sized) -> None:
    """Raise ContractError where there is nothing to compare: that would hold of anything."""
    if not chosen:
        raise ContractError(
            "something to compare, such as a golden vector of a step it takes", "none"
        )
