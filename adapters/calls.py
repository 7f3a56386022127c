"""Call numbers: counted once for each training call, and rolled back if the call raises."""

from collections.abc import Callable
from threading import Lock
from typing import Any, TypeVar

__all__ = ["COUNTING", "run_counted"]

T = TypeVar("T")

# Threads may share a layer, so reading and advancing a call number is one step. All layers share
# the lock, because users copy and pickle layers.
COUNTING = Lock()


def run_counted(
    take_number: Callable[..., Any],
    roll_back: Callable[..., None],
    call: Callable[[Any], T],
    *state: Any,
) -> T:
    """Return ``call(number)`` for the next call number; a call that raises does not count.

    Parameters
    ----------
    take_number : callable
        Returns the call number and advances it. Receives the state.
    roll_back : callable
        Takes the number back. Receives the state.
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
            roll_back(*state)
        raise
