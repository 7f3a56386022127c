"""Dropout in PyTorch: the two-layer classifier of many tutorials, with one import changed.

``Dropout`` replaces ``torch.nn.Dropout`` and accepts a seed. The same seed drops the same units on
a CPU, on a GPU and in every other framework. The ``state_dict`` contains the number of training
calls.

    python examples/torch_net.py
"""

import argparse
from collections.abc import Sequence

import torch
from digits import CLASSES, PIXELS, load
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from unidrop import Key
from unidrop.adapters.torch import Dropout


def train(model: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer) -> float:
    """Train for one epoch, and return the mean loss."""
    model.train()
    total = 0.0
    for x, labels in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def evaluate(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the accuracy. In evaluation, dropout is the identity."""
    model.eval()
    return (model(x).argmax(dim=1) == labels).float().mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A classifier with dropout in PyTorch.")
    parser.add_argument(
        "--epochs", type=int, default=10, help="passes through the data (default: 10)"
    )
    epochs = parser.parse_args(argv).epochs

    torch.manual_seed(0)
    x_train, y_train, x_test, y_test = map(torch.from_numpy, load())
    loader = DataLoader(TensorDataset(x_train, y_train), batch_size=64, shuffle=True)

    model = nn.Sequential(
        nn.Linear(PIXELS, 128),
        nn.ReLU(),
        Dropout(0.2, seed=Key(42).fold_in("hidden")),
        nn.Linear(128, CLASSES),
    )
    print(model)

    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for epoch in range(epochs):
        loss = train(model, loader, optimizer)
        print(f"epoch {epoch + 1:2}: loss {loss:.3f}")
    print(f"train accuracy: {evaluate(model, x_train, y_train):.3f}")
    print(f"test accuracy: {evaluate(model, x_test, y_test):.3f}")
    print(f"training calls of the dropout: {model[2].calls}")


if __name__ == "__main__":
    main()
