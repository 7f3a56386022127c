"""Train one transformer block in PyTorch, JAX and Keras: one loss curve with unidrop.

The runs have the same initial weights, batches and SGD in float32. Only the dropout of attention
weights can differ. With one key, its mask is the same everywhere, although Keras stores the
attention weights, and the other two compute them block by block. With each framework's own dropout
the losses differ, although each has a seed. The exit status is 1 if the losses with unidrop differ.

    python examples/attention.py
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from one_curve import Curve, check_one_curve, greatest_difference  # isort: skip - loads torch first

import jax
import keras
import numpy as np
import torch
from digits import CLASSES, Floats, Labels
from flax import nnx
from torch.nn import functional
from training import batches_from

import unidrop.adapters.flax
import unidrop.adapters.keras
import unidrop.adapters.torch
from unidrop import Key

SEED, RATE, LEARNING_RATE = 42, 0.3, 0.2
TOKENS, WIDTH, HEADS, HIDDEN = 8, 16, 2, 32
SITE = Key(SEED).fold_in("attention")


def load_batches() -> Iterator[tuple[Floats, Labels]]:
    """Yield batches of digits. A token is a row of 8 pixels, and 8 numbers for its position."""
    for x, labels in batches_from(0):
        positions = np.broadcast_to(np.eye(TOKENS, dtype=x.dtype), (len(x), TOKENS, TOKENS))
        yield np.concatenate([x.reshape(positions.shape), positions], axis=-1), labels


def initial_weights() -> list[Floats]:
    """Return the weights of query, key, value, output, two hidden layers and the classifier."""
    shapes = [(WIDTH, WIDTH)] * 4 + [(WIDTH, HIDDEN), (HIDDEN, WIDTH), (WIDTH, CLASSES)]
    rng = np.random.default_rng(0)
    return [rng.normal(scale=n**-0.5, size=(n, m)).astype(np.float32) for n, m in shapes]


def torch_curve(layer: Callable[..., torch.nn.MultiheadAttention], **seed: Key) -> Curve:
    attention = layer(WIDTH, HEADS, RATE, bias=False, batch_first=True, **seed)
    sizes = (WIDTH, HIDDEN), (HIDDEN, WIDTH), (WIDTH, CLASSES)
    dense = [torch.nn.Linear(*size, bias=False) for size in sizes]
    parameters = list(torch.nn.ModuleList([attention, *dense]).parameters())
    weights = initial_weights()
    with torch.no_grad():
        for parameter, w in zip(parameters, [np.hstack(weights[:3]), *weights[3:]], strict=True):
            parameter.copy_(torch.from_numpy(w.T))
    optimizer, curve = torch.optim.SGD(parameters, lr=LEARNING_RATE), []
    for batch in load_batches():
        x, labels = map(torch.from_numpy, batch)
        y = functional.layer_norm(x, (WIDTH,))
        x = x + attention(y, y, y, need_weights=False)[0]
        # tanh is smooth: at the kink of ReLU, rounding would decide between two gradients.
        x = x + dense[1](dense[0](functional.layer_norm(x, (WIDTH,))).tanh())
        loss = functional.cross_entropy(dense[2](x.mean(1)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return np.array(curve)


def jax_curve(attend: Callable[..., jax.Array], get_key: Callable[[Any], Any]) -> Curve:
    """Train a pure function. ``get_key`` returns the key of a step."""
    normalize = partial(jax.nn.standardize, epsilon=1e-5)

    @jax.jit
    def descend(weights: list[Any], x: Any, labels: Any, step: Any) -> tuple[list[Any], Any]:
        def get_loss(weights: list[Any]) -> Any:
            heads = ((normalize(x) @ w).reshape(*x.shape[:2], HEADS, -1) for w in weights[:3])
            attended = attend(
                *heads, dropout_rate=RATE, dropout_rng=get_key(step), broadcast_dropout=False
            )
            y = x + attended.reshape(x.shape) @ weights[3]
            y = y + jax.numpy.tanh(normalize(y) @ weights[4]) @ weights[5]
            scores = jax.nn.log_softmax(y.mean(1) @ weights[6])
            return -jax.numpy.take_along_axis(scores, labels[:, None], axis=1).mean()

        loss, gradients = jax.value_and_grad(get_loss)(weights)
        return [w - LEARNING_RATE * g for w, g in zip(weights, gradients, strict=True)], loss

    weights, curve = initial_weights(), []
    for step, (x, labels) in enumerate(load_batches()):
        weights, loss = descend(weights, x, labels, step)
        curve.append(float(loss))
    return np.array(curve)


def keras_curve(layer: Callable[..., keras.layers.MultiHeadAttention], seed: int | Key) -> Curve:
    attention = layer(HEADS, WIDTH // HEADS, dropout=RATE, use_bias=False, seed=seed)
    dense = partial(keras.layers.Dense, use_bias=False)
    normalize = partial(keras.layers.LayerNormalization, epsilon=1e-5, center=False, scale=False)
    x = inputs = keras.Input((TOKENS, WIDTH))
    y = normalize()(x)
    x = x + attention(y, y)
    x = x + dense(WIDTH)(dense(HIDDEN, "tanh")(normalize()(x)))
    model = keras.Model(inputs, dense(CLASSES)(keras.ops.mean(x, axis=1)))
    weights = zip(initial_weights(), model.weights, strict=True)
    model.set_weights([w.reshape(weight.shape) for w, weight in weights])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(LEARNING_RATE), loss)
    curve = []
    for x, labels in load_batches():
        model.reset_metrics()  # otherwise train_on_batch returns the mean loss so far
        curve.append(model.train_on_batch(x, labels))
    return np.array(curve, dtype=np.float64)


def main() -> None:
    torch.set_num_threads(1)  # more threads are slower for arrays this small
    ours = {
        "PyTorch": torch_curve(unidrop.adapters.torch.MultiheadAttention, seed=SITE),
        "JAX": jax_curve(unidrop.adapters.flax.dot_product_attention, SITE.fold_in),
        "Keras": keras_curve(unidrop.adapters.keras.MultiHeadAttention, SITE),
    }
    torch.manual_seed(SEED)
    jax_key = jax.random.key(SEED)
    theirs = {
        "PyTorch": torch_curve(torch.nn.MultiheadAttention),
        "JAX": jax_curve(nnx.dot_product_attention, partial(jax.random.fold_in, jax_key)),
        "Keras": keras_curve(keras.layers.MultiHeadAttention, SEED),
    }
    print("      with unidrop               each framework's own dropout")
    print("step" + "".join(f"{name:>9}" for name in (*ours, *theirs)))
    for step, losses in enumerate(zip(*ours.values(), *theirs.values(), strict=True)):
        if step % 7 == 0:
            print(f"{step:4}" + "".join(f"{loss:9.5f}" for loss in losses))
    print("greatest difference of the losses at any step")
    print(f"  with unidrop: {greatest_difference(ours):.1e}")
    print(f"  with each framework's own dropout: {greatest_difference(theirs):.1e}")
    check_one_curve(ours)


if __name__ == "__main__":
    main()
