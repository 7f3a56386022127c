"""Call numbers: counted once for each training call, and rolled back if the call raises."""

import os
from collections.abc import Callable
from threading import Lock
from typing import Any, TypeVar

__all__ = ["COUNTING", "run_counted"]

T = TypeVar("T")

# Threads may share a layer, so reading and advancing a call number is one step. All layers share
# the lock, because users copy and pickle layers.
COUNTING = Lock()

# A thread that held the lock does not exist in a forked child, and could not release it there. The
# standard library resets its own locks in this way.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=COUNTING._at_fork_reinit)  # type: ignore[attr-defined] # not in typeshed


def run_counted(
    take_number: Callable[..., Any],
    roll_back: Callable[..., None],
    call: Callable[[Any], T],
    *state: Any,
) -> T:
    """Return ``call(number)`` for the next call number; a call that raises does not count.

    If another thread has taken a later number meanwhile, the number of the call that raised is
    skipped: two calls never share one.

    Parameters
    ----------
    take_number : callable
        Returns the call number and advances it. Receives the state.
    roll_back : callable
        Takes the number back unless a later one was taken. Receives the number and the state.
    call : callable
        The call. Receives its number.
    *state
        The objects that hold the call number.
    """
    with COUNTING:
        number = take_number(*state)
    try:
        return call(number)
    except BaseException:
        with COUNTING:
            roll_back(number, *state)
        raise
