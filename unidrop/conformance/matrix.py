"""The matrix: run the contracts of backends, several backends at a time in child processes."""

from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from tempfile import TemporaryDirectory
from time import monotonic

from unidrop.conformance.backend import BackendNotRun, backend_names
from unidrop.conformance.compare import ContractError
from unidrop.conformance.contracts import SEED, Cell
from unidrop.conformance.isolation import Child, Outcome, Progress
from unidrop.conformance.runner import NotApplicable, Request, check_names, items
from unidrop.conformance.subprocess_backend import needs_own_process

__all__ = ["check", "run_matrix"]


def run_matrix(
    backends: Sequence[str] = (),
    contracts: Sequence[str] = (),
    *,
    jobs: int,
    timeout: float | None = None,
    seed: int = SEED,
    progress: Progress | None = None,
) -> Iterator[Outcome]:
    """Run contracts of backends, and yield the outcomes of each backend when it has finished.

    Parameters
    ----------
    backends, contracts : sequence of str, default ()
        Their names; all if empty.
    jobs : int
        Number of child processes at a time. Each runs one backend.
    timeout : float, optional
        Seconds for a cell, or for loading a backend. A cell that takes longer fails, and the rest
        of its backend is not run.
    seed : int, default 42
        Seed for checks without golden vectors.
    progress : Progress, optional
        Callbacks for each outcome as it arrives.

    Raises
    ------
    ValueError
        If the name of a backend or contract is unknown. The message lists the known ones.
    """
    check_names(contracts)
    requests = [Request(name, tuple(contracts), seed) for name in backend_names(backends)]
    return _run(requests, jobs, timeout, progress or Progress())


def _run(
    requests: Sequence[Request], jobs: int, timeout: float | None, progress: Progress
) -> Iterator[Outcome]:
    # Backwards, since the slow ones happen to be last in the alphabet, and should not start last.
    waiting, children = deque(reversed(requests)), list[Child]()
    with TemporaryDirectory(prefix="unidrop-", ignore_cleanup_errors=True) as folder:
        try:
            while waiting or children:
                while waiting and len(children) < jobs:
                    request = waiting.popleft()
                    children.append(Child(request, folder, timeout=timeout, progress=progress))
                _step(children)
                for child in [child for child in children if child.is_done]:
                    children.remove(child)
                    child.kill()
                    yield from child.outcomes
        finally:
            for child in children:
                child.kill()


def _step(children: Sequence[Child]) -> None:
    """Wait for the next messages or deadline, and handle them."""
    deadline = min(child.deadline for child in children)
    left = None if deadline == float("inf") else max(0, deadline - monotonic())
    ready = wait([child.connection for child in children], left)
    for child in children:
        if child.connection in ready:
            child.receive()
        else:
            child.give_up_if_late()


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

    A backend that needs other environment variables runs in its own process. Every failure there is
    a ContractError.

    Parameters
    ----------
    contract, backend : str
        Their names in the matrix.
    device, dtype, mode : str, optional
        Only these; all if None.
    seed : int, default 42
        Seed for checks without golden vectors.

    Raises
    ------
    ContractError
        If the contract does not hold.
    ValueError
        If no cell matches. The message lists the reasons why the contract does not apply.
    ImportError
        If the backend cannot be loaded.

    Examples
    --------
    >>> check("mask", "numpy")
    """
    request = Request(backend, (contract,), seed, device, dtype, mode)
    reasons, is_found = set[str](), False
    for item in _outcomes_in_child(request) if needs_own_process(backend) else items(request):
        if isinstance(item, BackendNotRun):
            raise ImportError(f"backend {backend} could not be loaded: {item.error}")
        if isinstance(item, NotApplicable):
            reasons.add(f"{item.mode}: {item.reason}")
            continue
        is_found = True
        if isinstance(item, Cell):
            item.check()
        elif item.status == "failed":
            error = ContractError(item.expected, item.actual, cause=item.cause, diff=item.diff)
            error.add_note(item.details)
            raise error
    if not is_found:
        which = f"device={device}, dtype={dtype}, mode={mode}"
        why = f" ({'; '.join(sorted(reasons))})" if reasons else ""
        raise ValueError(f"no cell of contract {contract} and backend {backend} has {which}{why}")


def _outcomes_in_child(request: Request) -> Iterator[Outcome]:
    return _run([request], 1, None, Progress())
