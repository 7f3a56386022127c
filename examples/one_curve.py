"""Train one network in NumPy, PyTorch and Keras: one loss curve with unidrop, three without.

The three runs have the same initial weights, batches and plain SGD in float32. Only dropout can
differ, on the inputs and on the hidden units. With one key, its masks are the same everywhere, and
the three curves coincide. With each framework's own dropout they differ, although each has a seed.
The script draws both plots into a PNG. The exit status is 1 if the curves with unidrop differ.

    python examples/one_curve.py --out one_curve.png
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import combinations
from pathlib import Path

import torch._dynamo  # isort: skip - it loads Triton, which crashes if TensorFlow is there first

import keras
import numpy as np
import torch
from digits import CLASSES, PIXELS, Floats, Labels, batches, initial_parameters, load
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from numpy_dropout import (
    HIDDEN_RATE,
    INPUT_RATE,
    Array,
    Dropout,
    descend,
    keyed_dropouts,
    loss_and_gradients,
)
from PIL import Image

import unidrop.adapters.keras
import unidrop.adapters.torch
from unidrop import Key

SEED = 42
STEPS = 200
CLOSE_UP = 150, 175
HIDDEN = 64
BATCH = 64
LEARNING_RATE = 0.1
LIMIT = 1e-4

Curve = NDArray[np.float64]


def load_batches() -> Iterator[tuple[Floats, Labels]]:
    digits = load()
    return batches(digits.x_train, digits.y_train, BATCH, STEPS)


def numpy_curve(get_dropouts: Callable[[int], tuple[Dropout, Dropout]]) -> Curve:
    """Train with hand-written backpropagation. ``get_dropouts`` takes the step."""
    parameters = initial_parameters(HIDDEN)
    curve = []
    for step, (x, labels) in enumerate(load_batches()):
        loss, gradients = loss_and_gradients(parameters, x, labels, *get_dropouts(step))
        descend(parameters, gradients, LEARNING_RATE)
        curve.append(loss)
    return np.array(curve)


def torch_curve(at_input: torch.nn.Module, at_hidden: torch.nn.Module) -> Curve:
    first, second = torch.nn.Linear(PIXELS, HIDDEN), torch.nn.Linear(HIDDEN, CLASSES)
    model = torch.nn.Sequential(at_input, first, torch.nn.Tanh(), at_hidden, second)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), initial_parameters(HIDDEN), strict=True):
            parameter.copy_(torch.from_numpy(value.T))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    curve = []
    for x, labels in load_batches():
        optimizer.zero_grad()
        logits = model(torch.from_numpy(x))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return np.array(curve)


def keras_curve(at_input: keras.Layer, at_hidden: keras.Layer) -> Curve:
    model = keras.Sequential(
        [
            keras.Input((PIXELS,)),
            at_input,
            keras.layers.Dense(HIDDEN, activation="tanh"),
            at_hidden,
            keras.layers.Dense(CLASSES),
        ]
    )
    model.set_weights(initial_parameters(HIDDEN))
    model.compile(
        optimizer=keras.optimizers.SGD(LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    curve = []
    for x, labels in load_batches():
        model.reset_metrics()  # otherwise train_on_batch returns the mean loss so far
        curve.append(model.train_on_batch(x, labels))
    return np.array(curve, dtype=np.float64)


def curves_with_unidrop() -> dict[str, Curve]:
    """Train each with the same key. Fold in the site, and at each call the step."""
    key = Key(SEED)
    sites = (INPUT_RATE, key.fold_in("input")), (HIDDEN_RATE, key.fold_in("hidden"))
    return {
        "NumPy": numpy_curve(lambda step: keyed_dropouts(key, step)),
        "PyTorch": torch_curve(
            *(unidrop.adapters.torch.Dropout(p, seed=site) for p, site in sites)
        ),
        "Keras": keras_curve(*(unidrop.adapters.keras.Dropout(p, seed=site) for p, site in sites)),
    }


class RandomDropout:
    """The usual hand-written dropout in NumPy: draw a mask, and store it for the backward pass."""

    def __init__(self, p: float, rng: np.random.Generator) -> None:
        self.keep_prob = np.float32(1 - p)
        self.rng = rng

    def forward(self, x: Array) -> Array:
        """Return x with a new mask applied."""
        self.mask = self.rng.random(x.shape) < self.keep_prob
        return x * self.mask / self.keep_prob

    def backward(self, grad: Array) -> Array:
        """Return the gradient with the same mask applied."""
        return grad * self.mask / self.keep_prob


def curves_with_own_dropout() -> dict[str, Curve]:
    """Train each with its framework's own dropout, from the same seed."""
    rates = INPUT_RATE, HIDDEN_RATE
    rng = np.random.default_rng(SEED)
    numpy_dropouts = tuple(RandomDropout(p, rng) for p in rates)
    torch.manual_seed(SEED)
    return {
        "NumPy": numpy_curve(lambda _: numpy_dropouts),
        "PyTorch": torch_curve(*(torch.nn.Dropout(p) for p in rates)),
        "Keras": keras_curve(*(keras.layers.Dropout(p, seed=SEED) for p in rates)),
    }


def greatest_difference(curves: Mapping[str, Curve]) -> float:
    """Return the greatest difference at any step between any two of the curves."""
    return float(np.max([np.abs(a - b) for a, b in combinations(curves.values(), 2)]))


def check_one_curve(curves: Mapping[str, Curve]) -> None:
    """Exit with status 1 if the curves differ by more than float32 rounding."""
    difference = greatest_difference(curves)
    if not difference < LIMIT:  # NaN fails this comparison too
        sys.exit(f"the curves are not one: they differ by {difference:.1e}, more than {LIMIT:.0e}")


# Wide light lines below narrow dark ones: three curves stay visible even if they coincide.
STYLES = {
    "NumPy": {"color": "#8ecae6", "linewidth": 5.5},
    "PyTorch": {"color": "#f3722c", "linewidth": 2.4, "linestyle": (0, (3.5, 1.8))},
    "Keras": {"color": "#14213d", "linewidth": 1.5, "linestyle": (0, (1, 1.5))},
}
INK, LINES, TINT = "#1f2328", "#d0d7de", "#f3f5f7"


def draw(axes: Axes, title: str, curves: Mapping[str, Curve]) -> None:
    """Draw the curves, with an inset that enlarges some steps."""
    inset = axes.inset_axes((0.38, 0.52, 0.6, 0.45), facecolor=TINT)
    for panel in (axes, inset):
        for name, curve in curves.items():
            panel.plot(curve, label=name, solid_joinstyle="round", **STYLES[name])
        panel.grid(color=LINES, linewidth=0.6)
        panel.tick_params(colors=INK, length=0, labelsize=11)
        panel.spines[:].set_color(LINES)
    axes.axvspan(*CLOSE_UP, color=TINT, zorder=0)
    axes.set(xlim=(-1, STEPS), ylim=(0, 2.7))
    inset.set(xlim=CLOSE_UP, ylim=(0.35, 1.15), xticklabels=(), yticklabels=())

    difference = f"greatest difference at any step: {greatest_difference(curves):.2g}"
    axes.set_title(f"{title}\n", loc="left", fontsize=15, fontweight="bold", color=INK)
    axes.text(0, 1.03, difference, transform=axes.transAxes, fontsize=12.5, color=INK)
    axes.set_xlabel("training step", fontsize=12, color=INK)
    inset.text(0.02, 0.05, "steps {} to {}".format(*CLOSE_UP), transform=inset.transAxes, color=INK)


def save_plot(path: Path, ours: Mapping[str, Curve], theirs: Mapping[str, Curve]) -> None:
    figure = Figure(figsize=(10.67, 4.34), dpi=150, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.07})
    draw(left, "unidrop: one curve", ours)
    draw(right, "each framework's own: three", theirs)
    left.set_ylabel("training loss", fontsize=12, color=INK)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=12.5,
        labelcolor=INK,
        handlelength=3.5,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    image = BytesIO()
    figure.savefig(image)
    Image.open(image).convert("RGB").quantize(256).save(path, optimize=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="One network in three frameworks: one curve?")
    parser.add_argument("--out", type=Path, default="docs/images/one_curve.png", metavar="PNG")
    out = parser.parse_args(argv).out

    ours = curves_with_unidrop()
    theirs = curves_with_own_dropout()
    print("greatest difference of the loss curves")
    print(f"  with unidrop: {greatest_difference(ours):.1e}")
    print(f"  with each framework's own dropout: {greatest_difference(theirs):.1e}")
    save_plot(out, ours, theirs)
    print(f"wrote {out}")
    check_one_curve(ours)


if __name__ == "__main__":
    main()
