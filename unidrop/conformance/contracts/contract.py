"""Define a contract and the cell that runs it: one backend, device, dtype and mode."""

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

#: The default seed of a cell.
SEED = 42

#: The shape and rate of contracts that work with any. A compiled mode compiles one program for all
#: of them. The golden outputs have this shape too.
SHAPE, RATE = (8, 8), 0.4

#: The number of steps that a compiled mode must run with one trace.
STEPS = 20


@dataclass(frozen=True, slots=True)
class Contract:
    """A named check.

    Attributes
    ----------
    name : str
    promise : str
        One sentence that is true of a backend that passes.
    check : callable
        Function of a `Cell` that raises `ContractError` if the promise is broken.
    needs : tuple of str
        Required capabilities.
    every_dtype : bool
        If True, run for each dtype of a mode; else for one.
    compiled_dtypes : collection of str
        Further dtypes to run in compiled modes, where each dtype costs a compilation.
    compiled_only : bool
        If True, run in compiled modes only.
    in_derived_modes : bool
        If False, do not run in derived modes if the wrapped mode runs the contract. Contracts that
        only test the decision about an element set this, since a wrapper does not change it.
    dtypes : collection of str
        If not empty, run for each dtype of a mode that is one of these.
    member : str
        The required member of the family, or "" if there is none.
    """

    name: str
    promise: str
    check: Callable[["Cell"], None]
    needs: tuple[str, ...]
    every_dtype: bool
    compiled_dtypes: Collection[str]
    compiled_only: bool
    in_derived_modes: bool
    dtypes: Collection[str]
    member: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One contract for one backend, device, dtype and mode.

    The seed applies to checks without golden vectors.
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
        """Return the parts of the cell's name."""
        return {
            "contract": self.contract.name,
            "backend": self.backend.name,
            "device": self.device,
            "dtype": self.dtype,
            "mode": self.mode,
        }

    @property
    def is_compiled(self) -> bool:
        """True if the mode compiles each shape and rate, so that a contract should use few."""
        return self.mode in self.backend.compiled_modes

    @property
    def capable(self) -> CapableBackend:
        """The backend, typed as one with every capability that the contract requires."""
        return cast(CapableBackend, self.backend)

    def array(self, x: NDArray[Any]) -> Any:
        """Convert a NumPy array to an array of the backend."""
        return self.backend.from_numpy(x, self.device, self.mode)

    def ones(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return a NumPy array of ones with the cell's dtype."""
        return np.ones(shape, dtype=numpy_dtype(self.dtype))

    def values(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return a NumPy array of nonzero values in [-2, 2] with the cell's dtype."""
        size = math.prod(shape)
        real = np.linspace(-2, 2, 2 * size + 2)[1::2][:size].reshape(shape)
        if self.dtype.startswith("complex"):
            return np.asarray(real + 1j * np.flip(real), dtype=self.dtype)
        return real.astype(numpy_dtype(self.dtype))

    def dropout(
        self, x: NDArray[Any], p: Any, step: int = 0, *, seed: int | None = None, **options: Any
    ) -> NDArray[Any]:
        """Apply the backend's dropout to a NumPy array and return a NumPy array."""
        seed = self.seed if seed is None else seed
        y = self.backend.dropout(self.array(x), p, seed, step, mode=self.mode, **options)
        return self.backend.to_numpy(y)

    @property
    def is_untraced(self) -> bool:
        """True if no contract has called dropout on this device in this mode yet."""
        place = self.device, self.mode
        return not any(backend is self.backend and p == place for backend, p in _traced)

    def _record_trace(self) -> None:
        if _traced and _traced[0][0] is not self.backend:
            _traced.clear()  # else the list would keep every backend alive
        if self.is_untraced and not _WITHOUT_DROPOUT.intersection(self.contract.needs):
            _traced.append((self.backend, (self.device, self.mode)))

    def keeps(
        self, shape: tuple[int, ...], p: float, step: int = 0, **options: Any
    ) -> NDArray[np.bool]:
        """Return the flags of the elements that the backend keeps in an array of ones."""
        keep: NDArray[np.bool] = self.dropout(self.ones(shape), p, step, **options) != 0
        return keep

    def diff_command(self, model: StreamModel) -> str:
        """Return the ``unidrop diff`` command that examines the backend's mask for a model."""
        names = self.names()
        del names["contract"]  # the command has no option for it
        options = " ".join(f"--{name} {shlex.quote(value)}" for name, value in names.items())
        return f"unidrop diff {options} {model.cli_arguments}"

    def key(self, step: int) -> unidrop.Key:
        """Return the cell's key for a step, by another route than `unidrop.Key.fold_in`."""
        return StreamModel(self.seed, (step,), RATE, SHAPE).key

    def check(self) -> None:
        """Run the contract; raise ContractError, or what the backend raises, if it fails."""
        try:
            self.contract.check(self)
        finally:
            self._record_trace()


# For the latest backend, each device and mode that has run a contract with dropout.
_traced: list[tuple[Backend, tuple[str, str]]] = []

# Contracts that require one of these capabilities do not call dropout.
_WITHOUT_DROPOUT = frozenset(("words", "key", "traced_key", "attention"))

#: All contracts by name, in the order of the matrix.
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
    dtypes: Collection[str] = (),
    member: str = "",
) -> Callable[[Callable[[Cell], None]], Callable[[Cell], None]]:
    """Register a check as a contract; the parameters are the attributes of `Contract`.

    Raises
    ------
    ValueError
        If ``needs`` contains an unknown capability.
    """
    if not set(needs) <= set(CAPABILITIES):
        raise ValueError(f"needs must be among {', '.join(CAPABILITIES)}, got {needs}")

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
            dtypes,
            member,
        )
        return check

    return register


def reference_result(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function of the core on the portable path, without fused kernels."""
    with unidrop.force_path("portable"):
        return function(*args, **options)


def check_model_output(
    model: StreamModel,
    actual: NDArray[Any],
    expected: NDArray[Any],
    x: NDArray[Any],
    name: str,
    diff: str = "",
) -> None:
    """Compare an output like `check_output`, and add the causes to the error.

    ``diff`` is the command that examines the mask. The error contains it if the mask is wrong.
    """
    try:
        check_output(actual, expected, x, name)
    except ContractError as error:
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            raise
        diagnosis = diagnose(model, actual, x, pairs=False)
        if diagnosis is None:
            raise
        raise error.with_causes(diagnosis.causes, diff if diagnosis.is_mask_wrong else "") from None


def require_nonempty(vectors: Sized) -> None:
    """Raise ContractError if there is nothing to compare, since any backend would pass."""
    if not vectors:
        raise ContractError("a vector to compare, with a step below step_limit", "none")
