"""Which process of the matrix does what next: a backend, or a mode of one that takes long.

A mode is never cut, since what is compiled there for one contract serves the next.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Condition

__all__ = ["Schedule", "Work"]


@dataclass(eq=False, slots=True)
class Work:
    """One backend's part of the matrix, and how far it is; for its schedule to change.

    Attributes
    ----------
    name : str
    modes : deque of sequences of int
        The cells of each mode that no process has taken.
    processes : int
        How many are at it.
    loading, running : float
        Seconds that it took to load, and that all cells took so far.
    ran : int
        How many cells that were.
    is_planned : bool
        Whether its cells are known.
    is_shareable : bool
        Whether another process may be loaded for it.
    """

    name: str
    modes: deque[Sequence[int]] = field(default_factory=deque)
    processes: int = 0
    loading: float = 0
    running: float = 0
    ran: int = 0
    is_planned: bool = False
    is_shareable: bool = True

    @property
    def left(self) -> float:
        """How many seconds the modes that are not taken will take, by the mean of the cells so far.

        Examples
        --------
        >>> Work("plain", deque([range(2), range(2, 5)]), running=6, ran=3).left
        10.0
        """
        return sum(map(len, self.modes)) * self.running / max(self.ran, 1)

    @property
    def pays(self) -> bool:
        """Whether one more process saves more than it takes to load the backend once more."""
        return self.is_shareable and self.left > 2 * self.loading * self.processes > 0


class Schedule:
    """Hands out the backends of a matrix to threads, each of which has one process at a time.

    Parameters
    ----------
    names : sequence of str
        The backends', in the order in which they are begun.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._new = deque(Work(name) for name in names)
        self._begun: list[Work] = []
        self._changed = Condition()

    def next(self) -> Work | None:
        """Return a backend to load: one that is not begun, or else one that takes long.

        Waits until there is one, and returns None where there will be none.
        """
        with self._changed:
            while True:
                work = self._choose()
                if work is not None:
                    work.processes += 1
                    return work
                if all(work.is_planned and not work.modes for work in self._begun):
                    return None
                self._changed.wait()

    def _choose(self) -> Work | None:
        if self._new:
            self._begun.append(self._new.popleft())
            return self._begun[-1]
        slow = [work for work in self._begun if work.pays]
        return max(slow, key=lambda work: work.left, default=None)

    def plan(self, work: Work, modes: Sequence[Sequence[int]], seconds: float) -> None:
        """Say which cells each mode has, and how long it took to load."""
        with self._changed:
            work.modes.extend(modes)
            work.loading = seconds
            work.is_planned = True
            self._changed.notify_all()

    def take(self, work: Work) -> Sequence[int]:
        """Return the cells of a mode that no process has taken; none where all have been."""
        with self._changed:
            cells = work.modes.popleft() if work.modes else ()
            self._changed.notify_all()
            return cells

    def ran(self, work: Work, seconds: float) -> None:
        """Say how long a cell took."""
        with self._changed:
            work.running += seconds
            work.ran += 1
            self._changed.notify_all()

    def keep_to_one(self, work: Work) -> None:
        """Let no other process be loaded for a backend: where that is tried, it can't be."""
        with self._changed:
            work.is_shareable = False

    def give_up(self, work: Work) -> None:
        """Hand out no more of a backend."""
        with self._changed:
            work.is_planned = True
            work.modes.clear()
            self._changed.notify_all()

    def leave(self, work: Work) -> bool:
        """Say that a process has done with a backend; tell whether it was the last."""
        with self._changed:
            work.processes -= 1
            return work.processes == 0

    def stop(self) -> None:
        """Hand out no more of anything."""
        with self._changed:
            self._new.clear()
        for work in self._begun:
            self.give_up(work)
