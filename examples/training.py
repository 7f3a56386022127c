"""Shared by the runs of every_mode.py: the network's constants, its batches, the command line.

A process trains with one framework, in each of the framework's modes:

    python train_torch.py start FOLDER     # train 50 steps, and save the state after 25
    python train_torch.py resume FOLDER    # load this state, and train from step 25 to step 50

Both print the losses as JSON, by mode name.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Protocol

from digits import Floats, Labels, batches, load

from unidrop import Key

__all__ = [
    "BATCH",
    "HALF",
    "HIDDEN",
    "LEARNING_RATE",
    "SITES",
    "STEPS",
    "Run",
    "batches_from",
    "run_modes",
]

STEPS, HALF = 50, 25
HIDDEN, BATCH = 64, 64
LEARNING_RATE = 0.1

#: The rate and the key of each dropout. Each call folds its number into the key.
SITES = ((0.2, Key(42).fold_in("input")), (0.5, Key(42).fold_in("hidden")))


class Run(Protocol):
    """A network in training, in one mode of its framework."""

    def train(self, start: int, stop: int) -> list[float]:
        """Train from one step to another, and return the loss of each step."""

    def save(self, path: Path) -> None:
        """Save the state in the framework's usual way."""

    def load(self, path: Path) -> None:
        """Load the saved state."""


def batches_from(start: int) -> Iterator[tuple[Floats, Labels]]:
    """Yield the batches from step ``start`` on, the same in every run."""
    digits = load()
    # Keras accepts a generator, but not an ``islice``.
    yield from islice(batches(digits.x_train, digits.y_train, BATCH, STEPS), start, None)


def run_modes(modes: Mapping[str, Callable[[], Run]]) -> None:
    """Run the part that the command line selects, and print the losses of each mode."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("start", "resume"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    train = _start if arguments.part == "start" else _resume
    losses = {name: train(build(), arguments.folder / name) for name, build in modes.items()}
    print(json.dumps(losses))


def _start(run: Run, path: Path) -> list[float]:
    losses = run.train(0, HALF)
    run.save(path)
    return losses + run.train(HALF, STEPS)


def _resume(run: Run, path: Path) -> list[float]:
    run.load(path)
    return run.train(HALF, STEPS)
