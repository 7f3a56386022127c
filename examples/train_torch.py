"""PyTorch runs of every_mode.py: eager, compiled, and with activation checkpointing."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from digits import CLASSES, PIXELS, initial_parameters
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from training import HIDDEN, LEARNING_RATE, SITES, batches_from, run_modes

from unidrop.adapters.torch import Dropout


class TorchRun:
    """The network as a usual PyTorch model. ``mode`` wraps the model for its calls."""

    def __init__(self, mode: Callable[[torch.nn.Module], Callable[[Tensor], Tensor]]) -> None:
        at_input, at_hidden = (Dropout(p, seed=seed) for p, seed in SITES)
        first, second = torch.nn.Linear(PIXELS, HIDDEN), torch.nn.Linear(HIDDEN, CLASSES)
        self.model = torch.nn.Sequential(at_input, first, torch.nn.Tanh(), at_hidden, second)
        with torch.no_grad():
            parameters = zip(self.model.parameters(), initial_parameters(HIDDEN), strict=True)
            for parameter, value in parameters:
                parameter.copy_(torch.from_numpy(value.T))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)
        self.call = mode(self.model)

    def train(self, start: int, stop: int) -> list[float]:
        """Train with a usual loop."""
        losses = []
        for _, (x, labels) in zip(range(start, stop), batches_from(start), strict=False):
            self.optimizer.zero_grad()
            # A reentrant checkpoint differentiates only if its input requires a gradient.
            logits = self.call(torch.from_numpy(x).requires_grad_())
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def save(self, path: Path) -> None:
        """Save the state dictionary, which contains the call numbers."""
        torch.save(self.model.state_dict(), path)

    def load(self, path: Path) -> None:
        """Load the state dictionary."""
        self.model.load_state_dict(torch.load(path))


def compiled(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the model as one compiled graph."""
    call: Callable[[Tensor], Tensor] = torch.compile(model, fullgraph=True)
    return call


def checkpointed(model: torch.nn.Module, *, reentrant: bool) -> Callable[[Tensor], Tensor]:
    """Return a function that recomputes the model in the backward pass."""
    return lambda x: checkpoint(model, x, use_reentrant=reentrant)


def compiled_checkpointed(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """Return one compiled graph that recomputes activations in the backward pass."""
    call: Callable[[Tensor], Tensor] = torch.compile(
        checkpointed(model, reentrant=False), fullgraph=True
    )
    return call


MODES = {
    "torch eager": lambda model: model,
    "torch.compile": compiled,
    "torch checkpoint": partial(checkpointed, reentrant=False),
    "torch checkpoint reentrant": partial(checkpointed, reentrant=True),
    "torch.compile of a checkpoint": compiled_checkpointed,
}

if __name__ == "__main__":
    run_modes({name: partial(TorchRun, mode) for name, mode in MODES.items()})
