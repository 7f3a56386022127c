"""Side-by-side timing: in each round, every candidate runs once, and the order rotates.

On a busy machine, times drift. Candidates that take turns drift together, so their ratios are
reliable even if their times are not. The median over rounds ignores rounds with other busy
processes. The order rotates, because the first candidate finds other data in the caches.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from time import perf_counter

__all__ = ["Candidate", "interleaved", "median_seconds"]


@dataclass(frozen=True)
class Candidate:
    """One candidate for the task of a row.

    Attributes
    ----------
    name : str
    call : callable
        Does the task once. Its argument is the number of the call, for the step of a key.
    within : callable
        Returns the context of a block of calls. Its time does not count.
    """

    name: str
    call: Callable[[int], object]
    within: Callable[[], AbstractContextManager[object]] = nullcontext


def median_seconds(
    candidates: Sequence[Candidate], *, rounds: int, block: float
) -> dict[str, float]:
    """Return the median time of one call of each candidate, in seconds.

    Parameters
    ----------
    candidates : sequence of Candidate
    rounds : int
    block : float
        Minimum time of each candidate in each round, in seconds.
    """
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        blocks = {candidate.name: _Block(candidate) for candidate in candidates}
        for calls in blocks.values():
            calls.lengthen(block)
        return interleaved({name: calls.run for name, calls in blocks.items()}, rounds)
    finally:
        if collects:
            gc.enable()


def interleaved(samples: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Call each function once in each round, and return the median of its results.

    Parameters
    ----------
    samples : mapping of str to callable
        Functions that return one sample.
    rounds : int
    """
    names = list(samples)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(samples[name]())
    return {name: median(values) for name, values in taken.items()}


class _Block:
    """A block of calls of a candidate, long enough for the resolution of the clock."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.calls = 1
        self.done = 0

    def lengthen(self, seconds: float) -> None:
        """Warm up, and increase the number of calls until they take ``seconds``."""
        self.run()  # compiles and fills caches
        while self.run() * self.calls < seconds:
            self.calls *= 2

    def run(self) -> float:
        """Run the block, and return the time per call in seconds."""
        call = self.candidate.call
        numbers = range(self.done, self.done + self.calls)
        self.done += self.calls
        with self.candidate.within():
            start = perf_counter()
            for number in numbers:
                call(number)
            return (perf_counter() - start) / self.calls
