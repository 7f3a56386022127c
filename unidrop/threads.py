"""Worker threads for large arrays, and a lock for forks.

A task counts its own work items, so a worker needs nothing but the task. A worker may start late or
never: the caller then computes all work items alone. No result depends on it.
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

# A first call holds this lock while it imports or compiles something, a layer while it takes its
# call number, and a fork in another thread waits for it. Otherwise the child would inherit Python's
# import locks, or LLVM's lock, from a thread that does not exist there, and its own first call
# would wait forever. This module holds the lock because it loads before `unidrop.fused`, the first
# import under guard.
# A fork acquires locks in the reverse order of their registration, so `logging`, which a first call
# may import, must register its own lock first.
logging.getLogger(__name__)
fork_guard = RLock()

# A larger number is a mistake: threads beyond the number of CPUs never help, and start slowly.
_MAX_THREADS = 1024

# A finalizer or a signal handler may make a call in the middle of another call.
_lock = RLock()
_num_threads: int | None = None
_forks = 0  # of this process and of those that it is a child of
_pool: "_WorkerPool | None" = None


def set_num_threads(number: int) -> None:
    """Set the number of threads that process one large array, including the calling thread.

    The default is the environment variable ``UNIDROP_NUM_THREADS``, else ``OMP_NUM_THREADS``, else
    the number of CPUs that the process may use. No result depends on it.

    The limit is 1024. A higher ``UNIDROP_NUM_THREADS`` raises ValueError at its first use. A higher
    number from ``OMP_NUM_THREADS``, which other libraries share, or of CPUs counts as 1024.

    Parameters
    ----------
    number : int
        From 1, which leaves all work to the calling thread, to 1024. Threads beyond the number of
        CPUs start too, but do not help.

    Raises
    ------
    TypeError
        If number is not an integer.
    ValueError
        If number is less than 1 or more than 1024.

    Examples
    --------
    >>> import unidrop
    >>> before = unidrop.get_num_threads()
    >>> unidrop.set_num_threads(1)
    >>> unidrop.get_num_threads()
    1
    >>> unidrop.set_num_threads(before)
    """
    global _num_threads, _pool
    number = _check_number(number, "number")
    with _lock:
        _num_threads, pool, _pool = number, _pool, None
    if pool is not None:
        pool.stop()


def get_num_threads() -> int:
    """Return the number of threads that process one large array, including the calling thread."""
    global _num_threads
    with _lock:
        if _num_threads is None:
            _num_threads = _get_default()
        return _num_threads


def run(kernel: Callable[[int, bool], int], task: int, work_items: int, keep_alive: Any) -> bool:
    """Run a kernel on all work items of a task, and return True when all of them are finished.

    A signal handler may fork meanwhile. The child has no workers, so it returns False if a worker
    had claimed a work item.

    Parameters
    ----------
    kernel : callable
        Computes work items of a task until all are claimed. Its second argument is True in
        a worker. Returns whether all work items are finished.
    task : int
        The address of the task.
    work_items : int
        The number of work items of the task.
    keep_alive : object
        The owners of the task, and of the memory whose addresses are in it. Each worker holds a
        reference, so the memory outlives an interrupted caller.
    """
    interrupt: BaseException | None = None
    is_submitted = False
    forks = _forks
    # Finish even after an interrupt: otherwise a worker would write to an array in use again.
    while True:
        try:
            if not is_submitted:
                is_submitted = True
                if get_num_threads() > 1:
                    _get_pool().submit(work_items - 1, kernel, task, keep_alive)
            while not (is_finished := kernel(task, False)) and forks == _forks:
                time.sleep(0)
            break
        except BaseException as raised:  # a signal handler may raise anything
            interrupt = raised
    if interrupt is not None:
        raise interrupt
    return bool(is_finished)


class _WorkerPool:
    """Threads that wait for tasks, and end with the process.

    Not a `concurrent.futures.ThreadPoolExecutor`: its locks are Python objects, and an interrupt
    while a thread holds one can keep the process from ending. A `SimpleQueue` has no such locks.
    """

    def __init__(self) -> None:
        self.queue: SimpleQueue[Any] = SimpleQueue()
        self.size = 0

    def start(self, count: int) -> None:
        """Start a number of threads, or fewer if the system refuses more."""
        for _ in range(count):
            thread = Thread(target=_work, args=(self.queue,), name="unidrop", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return  # the system refuses threads, or the interpreter shuts down
            self.size += 1

    def submit(self, most: int, *call: Any) -> None:
        """Pass a kernel, its task and its memory to a number of workers at most."""
        for _ in range(min(most, self.size)):
            self.queue.put(call)

    def stop(self) -> None:
        """End the threads after the tasks that they have received before."""
        for _ in range(self.size):
            self.queue.put(None)


def _work(queue: "SimpleQueue[Any]") -> None:
    while (call := queue.get()) is not None:
        kernel, task, _ = call
        kernel(task, True)
        # Drop all references before waiting for the next task.
        del call, kernel, task, _


def _get_pool() -> _WorkerPool:
    global _pool
    with _lock:
        if _pool is None:
            # Assign the pool before its threads start: an interrupted start must not lose them.
            _pool = _WorkerPool()
            _pool.start(get_num_threads() - 1)
        return _pool


def _get_default() -> int:
    if os.environ.get("UNIDROP_NUM_THREADS"):
        given = os.environ["UNIDROP_NUM_THREADS"].strip()
        number = int(given) if given.removeprefix("-").isdecimal() else given
        return _check_number(number, "UNIDROP_NUM_THREADS")
    # OpenMP's variable: a number, or one for each level. Leave invalid values to OpenMP.
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if first.isdecimal() and int(first) > 0:
        return min(int(first), _MAX_THREADS)
    return min(cpu_count(), _MAX_THREADS)


def cpu_count() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_number(number: Any, name: str) -> int:
    try:
        if isinstance(number, bool):
            raise TypeError
        checked = operator.index(number)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {number!r}") from None
    if not 1 <= checked <= _MAX_THREADS:
        raise ValueError(f"{name} must be from 1 to {_MAX_THREADS}, got {checked}")
    return checked


def _reset_after_fork() -> None:
    """Forget the pool and its lock: a child has no threads, and a parent's thread may hold it."""
    global _pool, _lock, _forks
    _pool, _lock = None, RLock()
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
    os.register_at_fork(
        before=fork_guard.acquire,
        after_in_parent=fork_guard.release,
        after_in_child=fork_guard.release,
    )
