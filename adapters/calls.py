"""Call numbers: counted once for each training call, and rolled back if the call raises."""

from collections.abc import Callable
from typing import Any, TypeVar

from unidrop.threads import fork_guard

__all__ = ["run_counted", "run_exclusively"]

T = TypeVar("T")

# The owners of the steps that run now, the innermost last. A signal handler or a finalizer may
# begin a step in the middle of another one of the same thread.
_running: tuple[Any, ...] = ()


def run_exclusively(owner: object, step: Callable[..., T], *arguments: Any) -> T:
    """Return ``step(*arguments)``: no other step of the same owner runs meanwhile.

    Threads may share a layer, so reading and advancing a call number is one step. All layers share
    a lock, because users copy and pickle layers. A fork waits for it, so no child inherits a call
    number that another thread has half advanced.

    Raises
    ------
    RuntimeError
        If a signal handler or a finalizer interrupts a step of the same owner.
    """
    global _running
    with fork_guard:
        outer = _running
        if outer and any(other is owner for other in outer):
            raise RuntimeError(
                "a signal handler or a finalizer called a Dropout layer while the same layer took "
                "its call number: use the function with a key there"
            )
        try:
            _running = (*outer, owner)
            return step(*arguments)
        finally:
            _running = outer


def run_counted(
    take_number: Callable[..., Any],
    roll_back: Callable[..., None],
    call: Callable[[Any], T],
    owner: object,
    *state: Any,
) -> T:
    """Return ``call(number)`` for the next call number; a call that raises does not count.

    If another thread has taken a later number meanwhile, the number of the call that raised is
    skipped: two calls never share one.

    Parameters
    ----------
    take_number : callable
        Returns the call number and advances it. Receives the owner and the state.
    roll_back : callable
        Takes the number back unless a later one was taken. Receives the number, the owner and the
        state.
    call : callable
        The call. Receives its number.
    owner : object
        The object that holds the call number.
    *state
        More arguments.

    Raises
    ------
    RuntimeError
        As in `run_exclusively`.
    """
    number = run_exclusively(owner, take_number, owner, *state)
    try:
        return call(number)
    except BaseException:
        run_exclusively(owner, roll_back, number, owner, *state)
        raise
