"""The matrix in anybody's test suite: a pytest item for each contract, dtype and mode.

pytest finds this module by its entry point, so it imports nothing before a test asks for it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from unidrop.conformance import Backend, Cell

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
    skipped with that reason; for an ability that is not declared at all there is no item. The
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
        Told a cell, whether it is an item; all are if not given.
    expected_failures : mapping of str to str, optional
        For a contract's name, or a pattern of items' names with ``*``, the reason for which it is
        expected to fail. One that passes all the same is a failure (``xfail(strict=True)``), and so
        is a pattern that names no item.

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
        backends, contracts, where, expected = mark.args
        items = _items(metafunc.config, backends, contracts)
        chosen = [(cell, reason) for cell, reason in items if where(cell)]
        found = [cell for cell, reason in chosen if reason is None]
        unused = [pattern for pattern in expected if not any(_fits(pattern, c) for c in found)]
        if unused and not _chosen(metafunc.config):
            raise pytest.UsageError(
                f"expected_failures has to name contracts or items, but {unused} are none of "
                f"{metafunc.definition.nodeid}"
            )
        metafunc.parametrize("cell", [_parameter(c, reason, expected) for c, reason in chosen])


def _items(
    config: pytest.Config, backends: "tuple[str | Backend, ...] | None", contracts: Sequence[str]
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
    for backend in _loaded(_chosen(config), backends):
        for item in cells(backend, contracts, seed=seed):
            if isinstance(item, Cell):
                yield item, None
                continue
            contract = CONTRACTS[item.contract]
            if all(need in backend.abilities for need in contract.needs):
                yield Cell(contract, backend, "", "", item.mode, seed), item.reason


def _chosen(config: pytest.Config) -> set[str]:
    """Return the names of the backends that this run is about, all if empty."""
    named: list[str] = config.getoption("--unidrop-backend")
    given = os.environ.get("UNIDROP_BACKENDS", "").split(",")
    return set(named or filter(None, map(str.strip, given)))


def _loaded(chosen: set[str], backends: "tuple[str | Backend, ...] | None") -> "Iterator[Backend]":
    from unidrop.conformance import UnavailableBackend, backend_names, load_backends

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
        if not isinstance(loaded, UnavailableBackend):
            yield loaded
        elif backends is not None or not loaded.is_missing:
            raise pytest.UsageError(f"backend {name} could not be loaded: {loaded.error}")


def _parameter(cell: "Cell", reason: str | None, expected: Mapping[str, str]) -> object:
    if reason is None:
        return pytest.param(cell, id=str(cell), marks=_marks(expected, cell))
    name = f"{cell.contract.name}-{cell.backend.name}-{cell.mode}"
    return pytest.param(cell, id=name, marks=pytest.mark.skip(reason=reason))


def _fits(pattern: str, cell: "Cell") -> bool:
    return pattern == cell.contract.name or fnmatchcase(str(cell), pattern)


def _marks(expected: Mapping[str, str], cell: "Cell") -> list[pytest.MarkDecorator]:
    return [
        pytest.mark.xfail(reason=reason, strict=True)
        for pattern, reason in expected.items()
        if _fits(pattern, cell)
    ]
