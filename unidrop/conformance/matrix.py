"""The whole matrix: each backend in a process of its own, several of them at a time.

A backend that breaks down, hangs or exits takes nobody with it, frameworks that get into each
other's way never meet, and whoever has two cores waits half as long. A core that would have nothing
to do takes over modes of a backend that takes long.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from queue import SimpleQueue
from tempfile import TemporaryDirectory, TemporaryFile
from time import perf_counter
from typing import IO, Any

from unidrop.conformance.backend import (
    BackendNotRun,
    backend_names,
    entry_points_named,
    load_backends,
)
from unidrop.conformance.contracts import SEED, Cell
from unidrop.conformance.process import Process, ProcessEndedError, error_text
from unidrop.conformance.remote import BACKEND_ENV_VAR, get_environment
from unidrop.conformance.runner import NotApplicable, Result, cells, check_names, run_cell
from unidrop.conformance.schedule import Schedule, Work

__all__ = ["Outcome", "Progress", "get_backend_name", "run_matrix"]

Outcome = Result | NotApplicable | BackendNotRun


def get_backend_name(outcome: Outcome) -> str:
    """Return the name of the backend that an outcome is of."""
    return outcome.name if isinstance(outcome, BackendNotRun) else outcome.backend


_KNOWN: Mapping[str, type[NotApplicable | BackendNotRun]] = {
    kind.__name__: kind for kind in (NotApplicable, BackendNotRun)
}

_ENVIRONMENT: Mapping[str, str] = {
    # Threads of OpenMP that wait by spinning take the cores from the other processes.
    "OMP_WAIT_POLICY": "passive",
    # A process that is killed by a signal says where it was.
    "PYTHONFAULTHANDLER": "1",
    # Who takes a whole GPU at once leaves nothing of it to the process beside it.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    # Its threads spin too as they wait, for matrices that nothing here multiplies.
    "OPENBLAS_NUM_THREADS": "1",
    # What PyTorch compiles here is so little that compiling its headers once takes longer.
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
}

# How much is shown of what a process printed that broke down: frameworks can be talkative.
_LINES, _BYTES = 60, 1 << 16


@dataclass(frozen=True, slots=True)
class Progress:
    """What is told of a run while it runs.

    Attributes
    ----------
    begun : callable
        Told the name of a backend that has been loaded, and how many outcomes it will have.
    ran : callable
        Told the name of a backend of which there is one outcome more.
    """

    begun: Callable[[str, int], None] = lambda backend, count: None
    ran: Callable[[str], None] = lambda backend: None


def run_matrix(
    backends: Sequence[str] = (),
    contracts: Sequence[str] = (),
    *,
    jobs: int,
    timeout: float | None = None,
    seed: int = SEED,
    progress: Progress | None = None,
) -> Iterator[Outcome]:
    """Run contracts of backends, and yield what comes of each backend once that is done.

    Parameters
    ----------
    backends, contracts : sequence of str, default ()
        Their names; all if empty.
    jobs : int
        How many processes run at a time. There are more than one for a backend where others would
        have nothing to do; none does a part of a mode.
    timeout : float, optional
        Seconds after which a cell has failed, and its backend is given up.
    seed : int, default 42
        Of whatever the golden vectors do not fix.
    progress : Progress, optional
        Told of each outcome as it comes, from several threads.

    Raises
    ------
    ValueError
        If no backend or contract has a name; says which there are.
    """
    check_names(contracts)
    asked = _Asked(tuple(contracts), seed, timeout, progress or Progress())
    return _outcomes(backend_names(backends), asked, jobs)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What every process is asked for."""

    contracts: Sequence[str]
    seed: int
    timeout: float | None
    progress: Progress


@dataclass(slots=True)
class _Part:
    """What there is of one backend so far: its plan, outcomes by its numbers, and its end."""

    plan: "Sequence[tuple[str, dict[str, Any]]]" = ()
    actual: dict[int, Outcome] = field(default_factory=dict)
    broken: BackendNotRun | None = None

    def outcomes(self) -> Iterator[Outcome]:
        """Yield the outcomes in the order of the plan, and how the backend broke down, if so."""
        for number in sorted(self.actual):
            yield self.actual[number]
        if self.broken is None:
            return
        left = len(self.plan) - len(self.actual)
        rest = f"; {left} more were not run" if self.plan else ""
        yield replace(self.broken, error=self.broken.error + rest)


def _outcomes(names: Sequence[str], asked: _Asked, jobs: int) -> Iterator[Outcome]:
    done: SimpleQueue[str | BaseException] = SimpleQueue()
    # What takes long is better not begun last, and it stands late in the alphabet.
    schedule, parts = Schedule(names[::-1]), {name: _Part() for name in names}
    pool = ThreadPoolExecutor(jobs)
    with TemporaryDirectory(prefix="unidrop-", ignore_cleanup_errors=True) as compiled:
        environment = {**_ENVIRONMENT, **_kept_in(compiled)}
        workers = [_Worker(schedule, asked, parts, done, environment) for _ in range(jobs)]
        for worker in workers:
            pool.submit(worker.work)
        try:
            waiting = set(names)
            while waiting:
                name = done.get()
                if isinstance(name, BaseException):
                    raise name
                if name in waiting:
                    waiting.remove(name)
                    yield from parts[name].outcomes()
        finally:
            schedule.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.stop()


def _kept_in(folder: str) -> dict[str, str]:
    """Return what makes JAX keep all that one mode compiles for the others, for the run.

    Who has a folder for what JAX compiles has said what is kept there, and for how long.
    """
    where = "JAX_COMPILATION_CACHE_DIR"
    if where in os.environ:
        return {}
    return {where: folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


class _Worker:
    """Has one process after the other, as the schedule says."""

    def __init__(
        self,
        schedule: Schedule,
        asked: _Asked,
        parts: Mapping[str, _Part],
        done: "SimpleQueue[str | BaseException]",
        environment: Mapping[str, str],
    ) -> None:
        self._schedule = schedule
        self._asked = asked
        self._parts = parts
        self._done = done
        self._environment = environment
        self._process: Process | None = None
        self._is_stopped = False

    def work(self) -> None:
        """Do what the schedule hands out, and put the names of backends that are done, or an error.

        Some of them are put twice.
        """
        try:
            while (work := self._schedule.next()) is not None:
                with TemporaryFile() as printed:
                    self._run(work, printed)
                if self._schedule.leave(work):
                    self._done.put(work.name)
        except BaseException as error:
            self._done.put(error)

    def stop(self) -> None:
        """End the process, or don't begin it."""
        self._is_stopped = True
        self._end()

    def _run(self, work: Work, printed: IO[bytes]) -> None:
        """Load a backend, and run modes of it as long as there are any."""
        try:
            if self._plan(work, printed):
                while numbers := self._schedule.take(work):
                    if not all(self._ran(work, number, printed) for number in numbers):
                        return
        finally:
            self._end()

    def _begin(self, name: str, printed: IO[bytes], own: Mapping[str, str]) -> None:
        """Start a process for a backend, with the variables that it needs of its own."""
        target = f"{__name__}:{_Served.__name__}"
        environment = {**self._environment, BACKEND_ENV_VAR: name, **own}
        self._process = Process(f"backend {name}", target, environment, printed)
        if self._is_stopped:
            self._process.kill()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _loaded(self, name: str, printed: IO[bytes]) -> Sequence[tuple[str, dict[str, Any]]]:
        """Load a backend, and return its plan."""
        self._begin(name, printed, {})
        own: dict[str, str] = self._call("environment", name)
        if own:
            self._end()
            self._begin(name, printed, own)
        plan: Sequence[tuple[str, dict[str, Any]]] = self._call(
            "plan", name, list(self._asked.contracts), self._asked.seed
        )
        return plan

    def _plan(self, work: Work, printed: IO[bytes]) -> bool:
        """Load a backend, and plan it if no other process has; tell whether it can be run."""
        part, begin, is_first = self._parts[work.name], perf_counter(), not work.is_planned
        plan: Sequence[tuple[str, dict[str, Any]]] = ()
        try:
            plan = self._loaded(work.name, printed)
        except Exception as error:
            if is_first:
                self._break(work, error, printed)
                return False
        if is_first:
            part.plan = plan
            self._asked.progress.begun(work.name, len(plan))
            for number, (kind, planned) in enumerate(plan):
                if kind != Result.__name__:
                    self._came(work, number, _KNOWN[kind](**planned))
            self._schedule.plan(work, _modes(plan), perf_counter() - begin)
        elif plan != part.plan:
            # The first has what there is one of, or it is not the same backend each time.
            self._schedule.keep_to_one(work)
            return False
        return True

    def _ran(self, work: Work, number: int, printed: IO[bytes]) -> bool:
        """Run a cell; tell whether more can be run."""
        try:
            result = Result(**self._call("run", number))
        except Exception as error:
            _, planned = self._parts[work.name].plan[number]
            self._break(work, error, printed)
            what = {"expected": "an answer", "actual": self._how(work, error)}
            failed = Result(**planned, status="failed", seconds=0, seed=self._asked.seed, **what)
            self._came(work, number, failed)
            return False
        self._came(work, number, result)
        self._schedule.ran(work, result.seconds)
        return True

    def _came(self, work: Work, number: int, outcome: Outcome) -> None:
        part = self._parts[work.name]
        part.actual[number] = outcome
        self._asked.progress.ran(work.name)
        if len(part.actual) == len(part.plan):
            self._done.put(work.name)

    def _break(self, work: Work, error: Exception, printed: IO[bytes]) -> None:
        """Note how a backend broke down, and give it up."""
        part = self._parts[work.name]
        what = self._how(work, error), _last_lines(printed)
        part.broken = part.broken or BackendNotRun(work.name, *what)
        self._schedule.give_up(work)

    def _call(self, method: str, *args: Any) -> Any:
        assert self._process is not None
        return self._process.call(0, method, args, {}, timeout=self._asked.timeout)

    def _how(self, work: Work, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            within = f"{self._asked.timeout:g} s"
            return f"the process of backend {work.name} gave no answer within {within}"
        return str(error) if isinstance(error, ProcessEndedError) else error_text(error)


def _modes(plan: Sequence[tuple[str, Mapping[str, Any]]]) -> list[list[int]]:
    """Return the numbers of the cells of each mode that is to be run."""
    modes: defaultdict[str, list[int]] = defaultdict(list)
    for number, (kind, planned) in enumerate(plan):
        if kind == Result.__name__:
            modes[planned["mode"]].append(number)
    return list(modes.values())


def _last_lines(printed: IO[bytes]) -> str:
    size = printed.seek(0, os.SEEK_END)
    printed.seek(max(0, size - _BYTES))
    return "\n".join(printed.read().decode(errors="replace").splitlines()[-_LINES:])


class _Served:
    """One backend's part of the matrix, in the process that has the backend."""

    def __init__(self) -> None:
        self._planned: list[_Planned] = []

    def environment(self, name: str) -> dict[str, str]:
        """Return the variables that the backend needs and this process does not have."""
        try:
            return dict(get_environment(name).items() - os.environ.items())
        except BaseException as error:
            # Kept for the plan: what has failed to be imported is not to be imported again.
            own = entry_points_named(name)[0].module
            self._planned = [BackendNotRun.from_error(name, error, own=own)]
            return {}

    def plan(
        self, name: str, contracts: Sequence[str], seed: int
    ) -> list[tuple[str, dict[str, Any]]]:
        """Load the backend, and return its outcomes, where they are known before it runs."""
        self._planned = self._planned or _planned(name, contracts, seed)
        return [_described(item) for item in self._planned]

    def run(self, number: int) -> dict[str, Any]:
        """Run what is planned at a number."""
        cell = self._planned[number]
        assert isinstance(cell, Cell)
        try:
            return asdict(run_cell(cell))
        except KeyboardInterrupt as error:  # raised by the backend: nobody interrupts this process
            what = {"expected": "no error", "actual": error_text(error)}
            return asdict(Result.from_cell(cell, "failed", 0, **what))


_Planned = Cell | NotApplicable | BackendNotRun


def _planned(name: str, contracts: Sequence[str], seed: int) -> list[_Planned]:
    try:
        (backend,) = load_backends([name])
        if isinstance(backend, BackendNotRun):
            return [backend]
        return list(cells(backend, contracts, seed=seed))
    except BaseException as error:  # of what it says of itself, or an interrupt of its own
        return [BackendNotRun.from_error(name, error)]


def _described(item: _Planned) -> tuple[str, dict[str, Any]]:
    """Return what crosses between processes: what an outcome will be, and what is known of it."""
    if isinstance(item, Cell):
        return Result.__name__, item.names()
    return type(item).__name__, asdict(item)
