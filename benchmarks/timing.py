"""Timing side by side: in each round every candidate runs once, in an order that rotates.

On a busy machine seconds drift. Candidates that take turns drift together, so their ratios hold
where their seconds do not; and the median over rounds ignores the rounds in which somebody else
ran. The order rotates since who runs first finds other things in the caches than who runs last.
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
    """One way to do a row's work.

    Attributes
    ----------
    name : str
    call : callable
        Does the work once. It is given the number of the call, for whoever names a mask by it.
    within : callable
        Makes the context in which a block of calls runs, outside what is timed.
    """

    name: str
    call: Callable[[int], object]
    within: Callable[[], AbstractContextManager[object]] = nullcontext


def median_seconds(
    candidates: Sequence[Candidate], *, rounds: int, block: float
) -> dict[str, float]:
    """Return the median of each candidate's seconds a call.

    Parameters
    ----------
    candidates : sequence of Candidate
    rounds : int
    block : float
        For how many seconds at least one candidate is called in each round.
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
    """Return the median of what each function returns, all of them called once in each round.

    Parameters
    ----------
    samples : mapping of str to callable
        Each takes one sample.
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
    """A candidate, called so often at a time that the clock's resolution does not matter."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.calls = 1
        self.done = 0

    def lengthen(self, seconds: float) -> None:
        """Warm up, and find how many calls take at least some seconds."""
        self.run()  # compiles, or fills caches
        while self.run() * self.calls < seconds:
            self.calls *= 2

    def run(self) -> float:
        """Return seconds a call."""
        call = self.candidate.call
        numbers = range(self.done, self.done + self.calls)
        self.done += self.calls
        with self.candidate.within():
            begin = perf_counter()
            for number in numbers:
                call(number)
            return (perf_counter() - begin) / self.calls
