"""Which cells the matrix has, and how one is run."""

import re
import shlex
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Self

from unidrop.conformance.backend import (
    CAPABILITIES,
    Backend,
    BackendNotRun,
    check_derived_modes,
    load_backends,
    missing_capability,
)
from unidrop.conformance.compare import ContractError
from unidrop.conformance.contracts import CONTRACTS, SEED, Cell, Contract
from unidrop.conformance.process import error_text, writable

_PLAIN = re.compile(r"[\w '(),.:;=+/-]*", re.ASCII)

__all__ = ["NotApplicable", "Result", "cells", "check", "check_names", "run_cell"]


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """Why a contract does not apply to a backend in a mode: what it lacks there."""

    contract: str
    backend: str
    mode: str
    reason: str


@dataclass(frozen=True, slots=True)
class Result:
    """What a cell gave: status is "passed" or "failed"; what was expected, what actual, and why.

    ``cause`` is the mistake that explains it, ``diff`` the command that says more, where there are
    such; ``details`` is where it was raised.
    """

    contract: str
    backend: str
    device: str
    dtype: str
    mode: str
    status: str
    seconds: float
    expected: str = ""
    actual: str = ""
    cause: str = ""
    diff: str = ""
    details: str = ""
    seed: int = SEED

    def __str__(self) -> str:
        return "-".join((self.contract, self.backend, self.device, self.dtype, self.mode))

    @classmethod
    def from_cell(cls, cell: Cell, status: str, seconds: float, **what: str) -> Self:
        """Return the result of a cell."""
        return cls(**cell.names(), status=status, seconds=seconds, seed=cell.seed, **what)

    @property
    def reproduce(self) -> str:
        """The one line that runs this cell again and raises what it raised."""
        seed = "" if self.seed == SEED else f", seed={self.seed}"
        call = (
            f"check({self.contract!r}, {self.backend!r}, device={self.device!r}, "
            f"dtype={self.dtype!r}, mode={self.mode!r}{seed})"
        )
        code = f"from unidrop.conformance import check; {call}"
        # Double quotes serve every shell, as long as there is nothing in them that one expands.
        quoted = f'"{code}"' if _PLAIN.fullmatch(code) else shlex.quote(code)
        return f"python -c {quoted}"


def cells(
    backend: Backend, contracts: Sequence[str] = (), *, seed: int = SEED
) -> Iterator[Cell | NotApplicable]:
    """Yield the cells of a backend, and what is missing for the others.

    Parameters
    ----------
    backend : Backend
    contracts : sequence of str, default ()
        Names of contracts; all if empty.
    seed : int, default 42
        Of whatever the golden vectors do not fix.

    Raises
    ------
    ValueError
        If a contract's name is unknown; says which are known.
    """
    check_names(contracts)
    chosen = [CONTRACTS[name] for name in contracts] or list(CONTRACTS.values())
    _check_exclusions(backend)
    for contract in chosen:
        for mode in backend.modes:
            lacking = _why_not(contract, backend, mode)
            if lacking is not None:
                yield NotApplicable(contract.name, backend.name, mode, lacking)
                continue
            if contract.compiled_only and mode not in backend.compiled_modes:
                continue
            for device in backend.devices:
                for dtype in _dtypes(contract, backend, mode):
                    yield Cell(contract, backend, device, dtype, mode, seed)
    for mode, reason in backend.missing_modes.items():
        for contract in chosen:
            yield NotApplicable(contract.name, backend.name, mode, reason)


def _why_not(contract: Contract, backend: Backend, mode: str) -> str | None:
    """Return why a contract does not apply to a backend in a mode, or None if it does."""
    for need in contract.needs:
        reason = missing_capability(backend, need, mode)
        if reason is not None:
            return reason
    reason = backend.mode_exclusions.get(mode, {}).get(contract.name)
    base = backend.derived_modes.get(mode)
    if reason is not None or base is None or contract.in_derived_modes:
        return reason
    compared = _why_not(contract, backend, base) is None
    return f"a variant of {base}, where this is compared" if compared else None


def _check_exclusions(backend: Backend) -> None:
    check_derived_modes(backend)
    for mode, limits in backend.mode_exclusions.items():
        unknown = [name for name in limits if name not in CAPABILITIES and name not in CONTRACTS]
        if unknown:
            raise ValueError(
                f"mode_exclusions of {backend.name} in mode {mode} has to name capabilities or "
                f"contracts, but got {unknown}"
            )


def run_cell(cell: Cell) -> Result:
    """Run a cell and return its result; nothing that a backend raises escapes."""
    begin = perf_counter()
    status, what = _ran(cell)
    return Result.from_cell(cell, status, perf_counter() - begin, **what)


def _ran(cell: Cell) -> tuple[str, dict[str, str]]:
    try:
        cell.check()
    except ContractError as violation:
        return "failed", {
            name: getattr(violation, name) for name in ("expected", "actual", "cause", "diff")
        }
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a backend may raise anything, or exit: that is a failure
        details = writable(traceback.format_exc())
        return "failed", {"expected": "no error", "actual": error_text(error), "details": details}
    return "passed", {}


def check(
    contract: str,
    backend: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    mode: str | None = None,
    seed: int = SEED,
) -> None:
    """Run one contract of one backend and raise what it raises.

    Parameters
    ----------
    contract, backend : str
        Their names in the matrix.
    device, dtype, mode : str, optional
        Only these; all if None.
    seed : int, default 42
        Of whatever the golden vectors do not fix.

    Raises
    ------
    ContractError
        If the contract does not hold.
    ValueError
        If no cell is named so; says what the backend lacks for the contract.
    ImportError
        If the backend cannot be loaded.

    Examples
    --------
    >>> check("mask", "numpy")
    """
    (loaded,) = load_backends([backend])
    if isinstance(loaded, BackendNotRun):
        raise ImportError(f"backend {backend} could not be loaded: {loaded.error}")
    planned = [item for item in cells(loaded, [contract], seed=seed) if mode in (None, item.mode)]
    chosen = [
        item
        for item in planned
        if isinstance(item, Cell) and device in (None, item.device) and dtype in (None, item.dtype)
    ]
    if not chosen:
        which = f"device={device}, dtype={dtype}, mode={mode}"
        reasons = {f"{i.mode}: {i.reason}" for i in planned if isinstance(i, NotApplicable)}
        why = f" ({'; '.join(sorted(reasons))})" if reasons else ""
        raise ValueError(f"no cell of contract {contract} and backend {backend} has {which}{why}")
    for cell in chosen:
        cell.check()


def check_names(contracts: Sequence[str]) -> None:
    """Raise ValueError for a name that no contract has; says which there are."""
    for name in contracts:
        if name not in CONTRACTS:
            raise ValueError(f"contract has to be one of {', '.join(CONTRACTS)}, but got {name!r}")


def _dtypes(contract: Contract, backend: Backend, mode: str) -> Sequence[str]:
    dtypes = backend.dtypes(mode)
    one = "float32" if "float32" in dtypes else dtypes[0]
    if not contract.every_dtype:
        return [one]
    if mode not in backend.compiled_modes:
        return dtypes
    return [dtype for dtype in dtypes if dtype == one or dtype in contract.compiled_dtypes]
