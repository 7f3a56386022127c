"""The whole matrix: each backend in a process of its own, several of them at a time.

A backend that breaks down, hangs or exits takes nobody with it, frameworks that get into each
other's way never meet, and whoever has two cores waits half as long.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from queue import SimpleQueue
from tempfile import TemporaryFile
from typing import IO, Any

from unidrop.conformance.backend import UnavailableBackend, backend_names, load_backends
from unidrop.conformance.contracts import SEED, Cell
from unidrop.conformance.process import Process, ProcessEndedError, text_of
from unidrop.conformance.runner import Missing, Result, cells, check_names, run_cell

__all__ = ["Outcome", "backend_of", "run_matrix"]

Outcome = Result | Missing | UnavailableBackend


def backend_of(outcome: Outcome) -> str:
    """Return the name of the backend that an outcome is of."""
    return outcome.name if isinstance(outcome, UnavailableBackend) else outcome.backend


_KNOWN: Mapping[str, type[Missing | UnavailableBackend]] = {
    kind.__name__: kind for kind in (Missing, UnavailableBackend)
}

_ENVIRONMENT: Mapping[str, str] = {
    # Threads of OpenMP that wait by spinning take the cores from the other processes.
    "OMP_WAIT_POLICY": "passive",
    # A process that is killed by a signal says where it was.
    "PYTHONFAULTHANDLER": "1",
}

# How much is shown of what a process printed that broke down: frameworks can be talkative.
_LINES, _BYTES = 60, 1 << 16


def run_matrix(
    backends: Sequence[str] = (),
    contracts: Sequence[str] = (),
    *,
    jobs: int,
    timeout: float | None = None,
    seed: int = SEED,
    begun: Callable[[str, int], None] = lambda backend, count: None,
) -> Iterator[Outcome]:
    """Run contracts of backends, and yield what comes of each as it comes.

    Parameters
    ----------
    backends, contracts : sequence of str, default ()
        Their names; all if empty.
    jobs : int
        How many backends run at a time.
    timeout : float, optional
        Seconds after which a cell has failed, and its backend is given up.
    seed : int, default 42
        Of whatever the golden vectors do not fix.
    begun : callable, optional
        Told the name of each backend that has been loaded, and how many outcomes it will have.

    Raises
    ------
    ValueError
        If no backend or contract has a name; says which there are.
    """
    check_names(contracts)
    runs = [_Run(name, contracts, seed, timeout, begun) for name in backend_names(backends)]
    return _outcomes(runs, jobs)


def _outcomes(runs: "Sequence[_Run]", jobs: int) -> Iterator[Outcome]:
    outcomes: SimpleQueue[Outcome | BaseException | None] = SimpleQueue()
    pool = ThreadPoolExecutor(jobs)
    for run in runs:
        pool.submit(run.to, outcomes)
    try:
        ended = 0
        while ended < len(runs):
            outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is None:
                ended += 1
            else:
                yield outcome
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for run in runs:
            run.stop()


class _Run:
    """One backend's part of the matrix, from this end."""

    def __init__(
        self,
        name: str,
        contracts: Sequence[str],
        seed: int,
        timeout: float | None,
        begun: Callable[[str, int], None],
    ) -> None:
        self._name = name
        self._contracts = contracts
        self._seed = seed
        self._timeout = timeout
        self._begun = begun
        self._process: Process | None = None
        self._is_stopped = False

    def to(self, outcomes: "SimpleQueue[Outcome | BaseException | None]") -> None:
        """Put each outcome into a queue, an error of our own too, and at last None."""
        try:
            with TemporaryFile() as printed:
                for outcome in self._outcomes(printed):
                    outcomes.put(outcome)
        except BaseException as error:
            outcomes.put(error)
        finally:
            self.stop()
            outcomes.put(None)

    def stop(self) -> None:
        """End the backend's process, or don't begin it."""
        self._is_stopped = True
        if self._process is not None:
            self._process.kill()

    def _outcomes(self, printed: IO[bytes]) -> Iterator[Outcome]:
        target = f"{__name__}:{_Served.__name__}"
        self._process = Process(f"backend {self._name}", target, _ENVIRONMENT, printed)
        if self._is_stopped:
            return
        try:
            plan = self._call("plan", self._name, list(self._contracts), self._seed)
        except (ProcessEndedError, TimeoutError) as error:
            yield UnavailableBackend(self._name, self._how(error), _last_lines(printed))
            return
        self._begun(self._name, len(plan))
        for number, (kind, planned) in enumerate(plan):
            if kind != Result.__name__:
                yield _KNOWN[kind](**planned)
                continue
            try:
                yield Result(**self._call("run", number))
            except (ProcessEndedError, TimeoutError) as error:
                how = self._how(error)
                yield Result(**planned, status="failed", seconds=0, expected="an answer", came=how)
                left = sum(kind == Result.__name__ for kind, _ in plan[number + 1 :])
                what = f"{how}; {left} more were not run"
                yield UnavailableBackend(self._name, what, _last_lines(printed))
                return

    def _call(self, method: str, *args: Any) -> Any:
        assert self._process is not None
        return self._process.call(0, method, args, {}, timeout=self._timeout)

    def _how(self, error: Exception) -> str:
        if isinstance(error, ProcessEndedError):
            return str(error)
        return f"the process of backend {self._name} gave no answer within {self._timeout:g} s"


def _last_lines(printed: IO[bytes]) -> str:
    size = printed.seek(0, os.SEEK_END)
    printed.seek(max(0, size - _BYTES))
    return "\n".join(printed.read().decode(errors="replace").splitlines()[-_LINES:])


class _Served:
    """One backend's part of the matrix, in the process that has the backend."""

    def plan(
        self, name: str, contracts: Sequence[str], seed: int
    ) -> list[tuple[str, dict[str, Any]]]:
        """Load the backend, and return its outcomes, where they are known before it runs."""
        self._planned = _planned(name, contracts, seed)
        return [_described(item) for item in self._planned]

    def run(self, number: int) -> dict[str, Any]:
        """Run what is planned at a number."""
        cell = self._planned[number]
        assert isinstance(cell, Cell)
        try:
            return asdict(run_cell(cell))
        except KeyboardInterrupt as error:  # raised by the backend: nobody interrupts this process
            what = {"expected": "no error", "came": text_of(error)}
            return asdict(Result.of(cell, "failed", 0, **what))


_Planned = Cell | Missing | UnavailableBackend


def _planned(name: str, contracts: Sequence[str], seed: int) -> list[_Planned]:
    try:
        (backend,) = load_backends([name])
        if isinstance(backend, UnavailableBackend):
            return [backend]
        return list(cells(backend, contracts, seed=seed))
    except BaseException as error:  # of what it says of itself, or an interrupt of its own
        return [UnavailableBackend.of(name, error)]


def _described(item: _Planned) -> tuple[str, dict[str, Any]]:
    """Return what crosses between processes: what an outcome will be, and what is known of it."""
    if isinstance(item, Cell):
        return Result.__name__, item.names()
    return type(item).__name__, asdict(item)
