"""The matrix in anybody's test suite: a pytest item for each contract, dtype and mode.

pytest finds this module by its entry point, so it imports nothing before a test asks for it.
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
    """Run a test once for each cell of backends: each contract, device, dtype and mode.

    The test takes one argument, ``cell``, and calls ``cell.check()``. Items are named as the matrix
    names them, such as ``output-mine-cpu-float32-eager``. A contract that does not apply for a
    reason that the backend declares is one item for a mode, such as ``layout-mine-eager``, and is
    skipped with that reason; for a capability that is not declared at all there is no item. A backend
    that is named, here or by an option, and whose library is not installed or can't be run on this
    machine, is one item with its name, skipped with the reason; one that is broken is an error. The
    options ``--unidrop-backend`` (may be repeated) and ``--unidrop-seed``, or the variables
    ``UNIDROP_BACKENDS`` (with commas) and ``UNIDROP_SEED``, choose backends, and the seed of
    whatever the golden vectors do not fix.

    Parameters
    ----------
    backends : iterable of str or Backend, optional
        Names of registered backends, or backends themselves; all that are registered if None.
    contracts : sequence of str, default ()
        Names of contracts; all if empty.
    where : callable, optional
        Told a cell, whether it is an item; all are if not given. One that is skipped with a reason
        comes with the backend's first device and the dtype that contracts about one dtype take:
        float32 if there is that, else the first.
    expected_failures : mapping of str to str, optional
        For a contract's name, or a pattern of items' names with ``*``, the reason for which it is
        expected to fail. One that passes all the same is a failure (``xfail(strict=True)``), and so
        is a pattern that names no item, unless a backend can't be run here, whose it might be.

    Examples
    --------
    In a test module of a package with a backend:

    >>> from unidrop.testing import parametrize_with_contracts
    >>> @parametrize_with_contracts(["numpy"], contracts=["mask"])
    ... def test_backend_conforms(cell):
    ...     cell.check()
    """
    if isinstance(backends, str) or isinstance(contracts, str):
        raise TypeError(
            f"backends and contracts have to be lists, but got {backends or contracts!r}"
        )
    given = None if backends is None else tuple(backends)
    mark: pytest.MarkDecorator = getattr(pytest.mark, _MARK)(
        given, tuple(contracts), where, dict(expected_failures or {})
    )
    return mark


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("unidrop", "the conformance matrix of unidrop")
    group.addoption(
        "--unidrop-backend",
        action="append",
        default=[],
        metavar="NAME",
        help="run contracts of this backend only; may be repeated",
    )
    group.addoption(
        "--unidrop-seed",
        type=int,
        metavar="N",
        help="the seed of whatever the golden vectors do not fix; 42 if not given",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark."""
    config.addinivalue_line("markers", f"{_MARK}: run once for each cell of the matrix")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a decorated test its cells."""
    for mark in metafunc.definition.iter_markers(_MARK):
        metafunc.parametrize("cell", _parameters(metafunc.definition, *mark.args))


def _parameters(
    test: pytest.Item,
    named: "tuple[str | Backend, ...] | None",
    contracts: Sequence[str],
    where: "Callable[[Cell], bool]",
    expected: Mapping[str, str],
) -> list[object]:
    """Return what a decorated test is run with."""
    from unidrop.conformance import BackendNotRun

    chosen = _chosen(test.config)
    loaded = list(_loaded(chosen, named))
    missing = [backend for backend in loaded if isinstance(backend, BackendNotRun)]
    present = [backend for backend in loaded if not isinstance(backend, BackendNotRun)]
    items = _items(test.config, present, contracts)
    wanted = [(cell, reason) for cell, reason in items if where(cell)]
    found = [cell for cell, reason in wanted if reason is None]
    unused = [pattern for pattern in expected if not any(_fits(pattern, c) for c in found)]
    # What is not run now may be what a pattern names.
    if unused and not chosen and not missing:
        raise pytest.UsageError(
            f"expected_failures has to name contracts or items, but {unused} are none of "
            f"{test.nodeid}"
        )
    parameters = [_parameter(cell, reason, expected) for cell, reason in wanted]
    for backend in missing:
        reason = f"backend {backend.name} can't be run here: {backend.error}"
        parameters.append(_skipped(None, backend.name, reason))
    return parameters


def _items(
    config: pytest.Config, backends: "Iterable[Backend]", contracts: Sequence[str]
) -> "Iterator[tuple[Cell, str | None]]":
    """Yield the cells of backends, and for what does not apply a cell with the declared reason."""
    from unidrop import Key
    from unidrop.conformance import CONTRACTS, SEED, Cell, cells

    seed = config.getoption("--unidrop-seed")
    if seed is None:
        seed = os.environ.get("UNIDROP_SEED", SEED)
    try:
        Key(int(seed))
    except ValueError:
        raise pytest.UsageError(f"the seed has to be 0 <= seed < 2**64, but got {seed!r}") from None
    seed = int(seed)
    for backend in backends:
        for item in cells(backend, contracts, seed=seed):
            if isinstance(item, Cell):
                yield item, None
                continue
            contract = CONTRACTS[item.contract]
            if all(need in backend.capabilities for need in contract.needs):
                dtype = _dtype(backend, item.mode)
                device = backend.devices[0]
                yield Cell(contract, backend, device, dtype, item.mode, seed), item.reason


def _dtype(backend: "Backend", mode: str) -> str:
    """Return the dtype of contracts that are run for one; of a missing mode, the first mode's."""
    dtypes = backend.dtypes(mode if mode in backend.modes else backend.modes[0])
    return "float32" if "float32" in dtypes else dtypes[0]


def _chosen(config: pytest.Config) -> set[str]:
    """Return the names of the backends that this run is about, all if empty."""
    named: list[str] = config.getoption("--unidrop-backend")
    given = os.environ.get("UNIDROP_BACKENDS", "").split(",")
    return set(named or filter(None, map(str.strip, given)))


def _loaded(
    chosen: set[str], backends: "tuple[str | Backend, ...] | None"
) -> "Iterator[Backend | BackendNotRun]":
    """Yield backends, and what stands for those that are named and can't be run here."""
    from unidrop.conformance import BackendNotRun, backend_names, load_backends

    known = backend_names() if backends is None else backends
    names = [backend if isinstance(backend, str) else backend.name for backend in known]
    unknown = chosen.difference(names, backend_names())
    if unknown:
        raise pytest.UsageError(f"backend has to be one of {names}, but got {sorted(unknown)}")
    for name, backend in zip(names, known, strict=True):
        if chosen and name not in chosen:
            continue
        if not isinstance(backend, str):
            yield backend
            continue
        (loaded,) = load_backends([name])
        if not isinstance(loaded, BackendNotRun):
            yield loaded
        elif not loaded.is_missing:
            raise pytest.UsageError(f"backend {name} could not be loaded: {loaded.error}")
        elif chosen or backends is not None:
            yield loaded


def _parameter(cell: "Cell", reason: str | None, expected: Mapping[str, str]) -> object:
    if reason is None:
        return pytest.param(cell, id=str(cell), marks=_marks(expected, cell))
    return _skipped(cell, f"{cell.contract.name}-{cell.backend.name}-{cell.mode}", reason)


def _skipped(cell: "Cell | None", name: str, reason: str) -> object:
    return pytest.param(cell, id=name, marks=pytest.mark.skip(reason=reason))


def _fits(pattern: str, cell: "Cell") -> bool:
    return pattern == cell.contract.name or fnmatchcase(str(cell), pattern)


def _marks(expected: Mapping[str, str], cell: "Cell") -> list[pytest.MarkDecorator]:
    return [
        pytest.mark.xfail(reason=reason, strict=True)
        for pattern, reason in expected.items()
        if _fits(pattern, cell)
    ]
