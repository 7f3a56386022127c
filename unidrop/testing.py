"""Run the matrix in any pytest suite: one item for each contract, device, dtype and mode.

pytest loads this module from its entry point in every run, so the module imports the matrix only
when a decorated test is collected.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from unidrop.conformance import Backend, BackendNotRun, Cell

__all__ = ["parametrize_with_contracts"]

_MARK = "unidrop_contracts"


def parametrize_with_contracts(
    backends: "Iterable[str | Backend] | None" = None,
    *,
    contracts: Sequence[str] = (),
    where: "Callable[[Cell], bool]" = lambda cell: True,
    expected_failures: Mapping[str, str] | None = None,
) -> pytest.MarkDecorator:
    """Parametrize a test with the cells of backends: each contract, device, dtype and mode.

    The test accepts one argument, ``cell``, and calls ``cell.check()``. Items have the names of the
    matrix, such as ``output-mine-cpu-float32-eager``.

    A contract that a backend excludes with a reason is one skipped item for each mode, such as
    ``layout-mine-eager``. A contract whose capability the backend does not declare has no item. A
    backend that is named, here or by an option, but cannot run on this machine is one skipped item
    with the backend's name. A broken backend is an error.

    The option ``--unidrop-backend`` (repeatable) or the variable ``UNIDROP_BACKENDS`` (separated by
    commas) selects backends. The option ``--unidrop-seed`` or the variable ``UNIDROP_SEED`` sets
    the seed for checks without golden vectors.

    Parameters
    ----------
    backends : iterable of str or Backend, optional
        Names of registered backends, or backends. All registered backends by default.
    contracts : sequence of str, default ()
        Names of contracts. All contracts if empty.
    where : callable, optional
        Function of a cell that returns True to keep the item. A skipped item passes a cell with the
        backend's first device, and with float32 or, without it, the first dtype.
    expected_failures : mapping of str to str, optional
        Maps the name of a contract, or a pattern of item names with ``*``, to the reason why it is
        expected to fail. A pass is a failure then (``xfail(strict=True)``). A pattern that matches
        no item is an error, unless a backend cannot run here, since it may match that one.

    Examples
    --------
    In a test module of a package with a backend:

    >>> from unidrop.testing import parametrize_with_contracts
    >>> @parametrize_with_contracts(["numpy"], contracts=["mask"])
    ... def test_backend_conforms(cell):
    ...     cell.check()
    """
    if isinstance(backends, str) or isinstance(contracts, str):
        text = backends if isinstance(backends, str) else contracts
        raise TypeError(f"backends and contracts must be lists, got {text!r}")
    named = None if backends is None else tuple(backends)
    mark: pytest.MarkDecorator = getattr(pytest.mark, _MARK)(
        named, tuple(contracts), where, dict(expected_failures or {})
    )
    return mark


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the matrix."""
    group = parser.getgroup("unidrop", "the conformance matrix of unidrop")
    group.addoption(
        "--unidrop-backend",
        action="append",
        default=[],
        metavar="NAME",
        help="run this backend only; repeatable",
    )
    group.addoption(
        "--unidrop-seed",
        type=int,
        metavar="N",
        help="seed for checks without golden vectors (default: 42)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", f"{_MARK}: parametrize with the cells of the matrix")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a decorated test."""
    for mark in metafunc.definition.iter_markers(_MARK):
        metafunc.parametrize("cell", _parameters(metafunc.definition, *mark.args))


def _parameters(
    test: pytest.Item,
    named: "tuple[str | Backend, ...] | None",
    contracts: Sequence[str],
    where: "Callable[[Cell], bool]",
    expected: Mapping[str, str],
) -> list[object]:
    """Return the parameters of a decorated test."""
    from unidrop.conformance import BackendNotRun

    selected = _selected_names(test.config)
    loaded = list(_load(selected, named))
    missing = [backend for backend in loaded if isinstance(backend, BackendNotRun)]
    present = [backend for backend in loaded if not isinstance(backend, BackendNotRun)]
    items = _items(test.config, present, contracts)
    kept = [(cell, reason) for cell, reason in items if where(cell)]
    run = [cell for cell, reason in kept if reason is None]
    unused = [pattern for pattern in expected if not any(_matches(pattern, c) for c in run)]
    # A pattern may match a backend that this run does not select or that cannot run here.
    if unused and not selected and not missing:
        raise pytest.UsageError(
            f"expected_failures must match contracts or items of {test.nodeid}, got {unused}"
        )
    parameters = [_parameter(cell, reason, expected) for cell, reason in kept]
    for backend in missing:
        parameters.append(_skip(None, backend.name, f"{backend.name}: {backend.error}"))
    return parameters


def _items(
    config: pytest.Config, backends: "Iterable[Backend]", contracts: Sequence[str]
) -> "Iterator[tuple[Cell, str | None]]":
    """Yield cells to run, each with None, and cells to skip, each with the declared reason."""
    from unidrop import Key
    from unidrop.conformance import CONTRACTS, SEED, Cell, cells

    seed = config.getoption("--unidrop-seed")
    if seed is None:
        seed = os.environ.get("UNIDROP_SEED", SEED)
    try:
        Key(int(seed))
    except ValueError:
        raise pytest.UsageError(f"seed must be in [0, 2**64), got {seed!r}") from None
    seed = int(seed)
    for backend in backends:
        for item in cells(backend, contracts, seed=seed):
            if isinstance(item, Cell):
                yield item, None
                continue
            contract = CONTRACTS[item.contract]
            is_declared = not contract.member or contract.member in backend.members
            if is_declared and all(need in backend.capabilities for need in contract.needs):
                dtype = _default_dtype(backend, item.mode)
                device = backend.devices[0]
                yield Cell(contract, backend, device, dtype, item.mode, seed), item.reason


def _default_dtype(backend: "Backend", mode: str) -> str:
    """Return the dtype of contracts that run for one; a missing mode has the first mode's."""
    dtypes = backend.dtypes(mode if mode in backend.modes else backend.modes[0])
    return "float32" if "float32" in dtypes else dtypes[0]


def _selected_names(config: pytest.Config) -> set[str]:
    """Return the names of the backends that this run selects; empty selects all."""
    options: list[str] = config.getoption("--unidrop-backend")
    variable = os.environ.get("UNIDROP_BACKENDS", "").split(",")
    return set(options or filter(None, map(str.strip, variable)))


def _load(
    selected: set[str], backends: "tuple[str | Backend, ...] | None"
) -> "Iterator[Backend | BackendNotRun]":
    """Yield the selected backends; skip a missing one unless the test or the run names it."""
    from unidrop.conformance import BackendNotRun, backend_names, load_backends

    known = backend_names() if backends is None else backends
    names = [backend if isinstance(backend, str) else backend.name for backend in known]
    unknown = selected.difference(names, backend_names())
    if unknown:
        raise pytest.UsageError(f"backend must be one of {names}, got {sorted(unknown)}")
    for name, backend in zip(names, known, strict=True):
        if selected and name not in selected:
            continue
        if not isinstance(backend, str):
            yield backend
            continue
        (loaded,) = load_backends([name])
        if not isinstance(loaded, BackendNotRun):
            yield loaded
        elif not loaded.is_missing:
            raise pytest.UsageError(f"backend {name} failed to load: {loaded.error}")
        elif selected or backends is not None:
            yield loaded


def _parameter(cell: "Cell", reason: str | None, expected: Mapping[str, str]) -> object:
    if reason is None:
        return pytest.param(cell, id=str(cell), marks=_marks(expected, cell))
    return _skip(cell, f"{cell.contract.name}-{cell.backend.name}-{cell.mode}", reason)


def _skip(cell: "Cell | None", name: str, reason: str) -> object:
    return pytest.param(cell, id=name, marks=pytest.mark.skip(reason=reason))


def _matches(pattern: str, cell: "Cell") -> bool:
    return pattern == cell.contract.name or fnmatchcase(str(cell), pattern)


def _marks(expected: Mapping[str, str], cell: "Cell") -> list[pytest.MarkDecorator]:
    return [
        pytest.mark.xfail(reason=reason, strict=True)
        for pattern, reason in expected.items()
        if _matches(pattern, cell)
    ]
