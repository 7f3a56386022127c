"""The cells of the matrix: which ones a backend has, and the result of running one."""

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
    missing_member,
)
from unidrop.conformance.compare import ContractError
from unidrop.conformance.contracts import CONTRACTS, SEED, Cell, Contract
from unidrop.conformance.error_text import error_text, writable
from unidrop.conformance.family import MEMBERS

_PLAIN = re.compile(r"[\w '(),.:;=+/-]*", re.ASCII)

__all__ = ["NotApplicable", "Request", "Result", "cells", "check_names", "items", "run_cell"]


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """A contract that does not apply to a backend in a mode, and the reason."""

    contract: str
    backend: str
    mode: str
    reason: str


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a cell.

    Attributes
    ----------
    contract, backend, device, dtype, mode : str
        The names of the cell.
    status : str
        "passed" or "failed".
    seconds : float
    expected, actual : str
        Empty if it passed.
    cause : str
        The mistake that explains the failure, if one is known.
    diff : str
        The command that analyzes the mask, if that is wrong.
    details : str
        The traceback of an error.
    seed : int
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
        """The command that reruns this cell and raises its error."""
        seed = "" if self.seed == SEED else f", seed={self.seed}"
        call = (
            f"check({self.contract!r}, {self.backend!r}, device={self.device!r}, "
            f"dtype={self.dtype!r}, mode={self.mode!r}{seed})"
        )
        code = f"from unidrop.conformance import check; {call}"
        # Every shell accepts double quotes, as long as it expands nothing inside of them.
        quoted = f'"{code}"' if _PLAIN.fullmatch(code) else shlex.quote(code)
        return f"python -c {quoted}"


@dataclass(frozen=True, slots=True)
class Request:
    """Which cells of one backend to run.

    Attributes
    ----------
    backend : str
    contracts : sequence of str
        Names of contracts; all if empty.
    seed : int
    device, dtype, mode : str, optional
        Only these; all if None.
    """

    backend: str
    contracts: Sequence[str] = ()
    seed: int = SEED
    device: str | None = None
    dtype: str | None = None
    mode: str | None = None


def items(request: Request) -> Iterator[Cell | NotApplicable | BackendNotRun]:
    """Load the backend of a request, and yield its cells and the contracts that do not apply."""
    (backend,) = load_backends([request.backend])
    if isinstance(backend, BackendNotRun):
        yield backend
        return
    for item in cells(backend, request.contracts, seed=request.seed):
        is_requested = request.mode in (None, item.mode)
        if isinstance(item, Cell):
            is_requested &= request.device in (None, item.device)
            is_requested &= request.dtype in (None, item.dtype)
        if is_requested:
            yield item


def cells(
    backend: Backend, contracts: Sequence[str] = (), *, seed: int = SEED
) -> Iterator[Cell | NotApplicable]:
    """Yield the cells of a backend, mode by mode, and the contracts that do not apply.

    The cells of a mode are neighbors, so that they share compiled programs and layers.

    Parameters
    ----------
    backend : Backend
    contracts : sequence of str, default ()
        Names of contracts; all if empty.
    seed : int, default 42
        Seed for checks without golden vectors.

    Raises
    ------
    ValueError
        If a contract's name is unknown. The message lists the known ones.
    """
    check_names(contracts)
    chosen = [CONTRACTS[name] for name in contracts] or list(CONTRACTS.values())
    _check_exclusions(backend)
    for mode in backend.modes:
        for contract in chosen:
            reason = _why_not(contract, backend, mode)
            if reason is not None:
                yield NotApplicable(contract.name, backend.name, mode, reason)
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
    """Return the reason why a contract does not apply to a backend in a mode, or None."""
    for need in contract.needs:
        reason = missing_capability(backend, need, mode)
        if reason is not None:
            return reason
    if contract.member:
        reason = missing_member(backend, contract.member, mode)
        if reason is not None:
            return reason
    reason = backend.mode_exclusions.get(mode, {}).get(contract.name)
    base = backend.derived_modes.get(mode)
    if reason is not None or base is None or contract.in_derived_modes:
        return reason
    compared = _why_not(contract, backend, base) is None
    return f"it is derived from {base}, whose column has this contract" if compared else None


def _check_exclusions(backend: Backend) -> None:
    check_derived_modes(backend)
    for mode, limits in backend.mode_exclusions.items():
        known = {*CAPABILITIES, *MEMBERS, *CONTRACTS}
        unknown = [name for name in limits if name not in known]
        if unknown:
            raise ValueError(
                f"mode_exclusions of {backend.name} in mode {mode} must name capabilities, members "
                f"or contracts, got {unknown}"
            )


def run_cell(cell: Cell) -> Result:
    """Run a cell and return its result; an error of the backend is a failure."""
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
    except BaseException as error:  # including an exit
        details = writable(traceback.format_exc())
        return "failed", {"expected": "no error", "actual": error_text(error), "details": details}
    return "passed", {}


def check_names(contracts: Sequence[str]) -> None:
    """Raise ValueError for an unknown name of a contract."""
    for name in contracts:
        if name not in CONTRACTS:
            raise ValueError(f"contract must be one of {', '.join(CONTRACTS)}, got {name!r}")


def _dtypes(contract: Contract, backend: Backend, mode: str) -> Sequence[str]:
    dtypes = backend.dtypes(mode)
    one = "float32" if "float32" in dtypes else dtypes[0]
    if contract.dtypes:
        dtypes = [dtype for dtype in dtypes if dtype in contract.dtypes]
    elif not contract.every_dtype:
        return [one]
    if mode not in backend.compiled_modes:
        return dtypes
    return [dtype for dtype in dtypes if dtype == one or dtype in contract.compiled_dtypes]
