"""Threads that help the caller with a large array, and forks beside other threads.

A job says by itself which of its units are still to be taken, so a helper needs nothing but the
job: it may come late, or never, and the caller finishes alone. Results do not depend on it.
"""

import logging
import operator
import os
import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import RLock, Thread
from typing import Any

__all__ = ["fork_guard", "get_num_threads", "run", "set_num_threads"]

# A first call holds this lock while it imports or compiles something, and a fork in another thread
# waits for it. Otherwise the child would inherit Python's import locks, or Numba's lock, from a
# thread that it lacks, and its own first call would wait forever. The lock is here because it must
# exist before the first import that it guards: that of `unidrop.fused`.
# Numba logs while it compiles. A fork takes locks in the reverse order of their registration, so
# `logging` must have registered its own before.
logging.getLogger(__name__)
fork_guard = RLock()

# Fewer units are finished by the time a helper wakes up.
_WORTH_CALLING = 16

# More is a mistake: threads beyond the number of CPUs never help, and each takes time to start.
_MOST_THREADS = 1024

# A finaliser or a signal's handler may make a call in the middle of another.
_lock = RLock()
_number: int | None = None
_helpers: "_Helpers | None" = None


def set_num_threads(number: int) -> None:
    """Set how many threads work on one large array, the caller's included.

    The default is the environment variable ``UNIDROP_NUM_THREADS``, or else ``OMP_NUM_THREADS``,
    or else the number of processors that the process may use. No result depends on it.

    The limit is 1024. A higher ``UNIDROP_NUM_THREADS`` raises ValueError when it is first read;
    ``OMP_NUM_THREADS``, which other libraries share, and the number of processors are clamped.

    Parameters
    ----------
    number : int
        From 1, which leaves all work to the caller's thread, to 1024. Threads beyond the number of
        processors start all the same, but don't help.

    Raises
    ------
    TypeError
        If number is no integer.
    ValueError
        If it is less than 1 or more than 1024.

    Examples
    --------
    >>> import unidrop
    >>> before = unidrop.get_num_threads()
    >>> unidrop.set_num_threads(1)
    >>> unidrop.get_num_threads()
    1
    >>> unidrop.set_num_threads(before)
    """
    global _number, _helpers
    number = _checked(number, "number")
    with _lock:
        _number, helpers, _helpers = number, _helpers, None
    if helpers is not None:
        helpers.dismiss()


def get_num_threads() -> int:
    """Return how many threads work on one large array, the caller's included."""
    global _number
    with _lock:
        if _number is None:
            _number = _default()
        return _number


def run(kernel: Callable[[Any, bool], bool], job: Any, units: int, owners: Any) -> None:
    """Run a kernel over all units of a job, and return when every one is finished.

    Parameters
    ----------
    kernel : callable
        Takes units of a job until none is left, and whether it is a helper that does so; returns
        whether all units are finished.
    job : array of int
    units : int
        How many units it has.
    owners : object
        What owns the memory that the job has addresses of. Each helper holds on to it, so that it
        outlives a caller who is interrupted.
    """
    interrupt: BaseException | None = None
    is_called = is_finished = False
    # To the end, also after an interrupt: a helper would write to an array that is used again.
    while not is_finished:
        try:
            if not is_called:
                is_called = True
                if units >= _WORTH_CALLING and get_num_threads() > 1:
                    _called().call(units - 1, kernel, job, owners)
            while not kernel(job, False):
                time.sleep(0)
            is_finished = True
        except BaseException as raised:  # a signal's handler may raise anything
            interrupt = raised
    if interrupt is not None:
        raise interrupt


class _Helpers:
    """Threads that wait for jobs, and end with the process.

    Not a `concurrent.futures.ThreadPoolExecutor`: its locks are Python's, and an interrupt that
    comes while one is held leaves a process that does not end. A `SimpleQueue` has none of those.
    """

    def __init__(self) -> None:
        self.jobs: SimpleQueue[Any] = SimpleQueue()
        self.count = 0

    def start(self, most: int) -> None:
        """Start as many threads, or as many as there can be."""
        for _ in range(most):
            thread = Thread(target=_help, args=(self.jobs,), name="unidrop", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return  # there can be no more threads, now or since the interpreter shuts down
            self.count += 1

    def call(self, most: int, *job: Any) -> None:
        """Let as many help with a job."""
        for _ in range(min(most, self.count)):
            self.jobs.put(job)

    def dismiss(self) -> None:
        """End the threads, once they have done what was asked of them before."""
        for _ in range(self.count):
            self.jobs.put(None)


def _help(jobs: "SimpleQueue[Any]") -> None:
    while (task := jobs.get()) is not None:
        kernel, job, _ = task
        kernel(job, True)
        # Not held on to while waiting for the next.
        del task, kernel, job, _


def _called() -> _Helpers:
    global _helpers
    with _lock:
        if _helpers is None:
            # Known before its threads are, so that those of an interrupted start are not lost.
            _helpers = _Helpers()
            _helpers.start(get_num_threads() - 1)
        return _helpers


def _default() -> int:
    if os.environ.get("UNIDROP_NUM_THREADS"):
        given = os.environ["UNIDROP_NUM_THREADS"].strip()
        number = int(given) if given.removeprefix("-").isdecimal() else given
        return _checked(number, "UNIDROP_NUM_THREADS")
    # Others' variable: a number, or one for each level, or what other programs are to judge.
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if first.isdecimal() and int(first) > 0:
        return min(int(first), _MOST_THREADS)
    return min(cpu_count(), _MOST_THREADS)


def cpu_count() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _checked(number: Any, name: str) -> int:
    try:
        if isinstance(number, bool):
            raise TypeError
        checked = operator.index(number)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {number!r}") from None
    if not 1 <= checked <= _MOST_THREADS:
        raise ValueError(f"{name} must be from 1 to {_MOST_THREADS}, got {checked}")
    return checked


def _forget_helpers() -> None:
    """Start without threads: a process that forks leaves them behind, and maybe the lock held."""
    global _helpers, _lock
    _helpers, _lock = None, RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)
    os.register_at_fork(
        before=fork_guard.acquire,
        after_in_parent=fork_guard.release,
        after_in_child=fork_guard.release,
    )
