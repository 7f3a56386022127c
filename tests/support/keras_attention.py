"""What the tests of Keras attention layers share: small layers, and the definition they equal."""

import keras
import numpy as np
from keras_models import BACKEND, SITE

from unidrop.adapters.keras import Attention, GroupQueryAttention, MultiHeadAttention
from unidrop.conformance.attention import attention

__all__ = [
    "LAYERS",
    "QUERY",
    "RATE",
    "VALUE",
    "apply",
    "differentiate",
    "get_own",
    "make",
    "make_model",
    "make_readable",
    "read_weights",
    "reference",
    "to_numpy",
]

RATE = 0.3
LAYERS = {
    MultiHeadAttention: lambda **options: MultiHeadAttention(4, 3, **options),
    GroupQueryAttention: lambda **options: GroupQueryAttention(3, 4, 2, **options),
    Attention: Attention,
}
to_numpy = keras.ops.convert_to_numpy
rng = np.random.default_rng(0)
QUERY, VALUE = (rng.standard_normal((2, n, 8)).astype("float32") for n in (5, 6))


def get_own(kind):
    """Return the class of Keras that one of our classes replaces."""
    return getattr(keras.layers, kind.__name__.replace("Grouped", "Group"))


def make(kind, rate=RATE, seed=SITE, **options):
    return LAYERS[kind](dropout=rate, seed=seed, **options)


def apply(layer, query, value, **options):
    """Call a layer in training, with the arguments of its class."""
    options = {"training": True, **options}
    if isinstance(layer, keras.layers.Attention):
        return layer([query, value], **options)
    return layer(query, value, **options)


def make_readable(kind, rate, length, **options):
    """Return a layer whose output has the attention weights of all heads as features."""
    if kind is Attention:
        return make(Attention, rate, **options)
    # JAX compiles random initial values for a second.
    options.update(use_bias=False, kernel_initializer="zeros", seed=SITE)
    if kind is MultiHeadAttention:
        layer = MultiHeadAttention(4, 3, length, rate, output_shape=4 * length, **options)
        heads = 4
    else:
        layer = GroupQueryAttention(length, 4, 2, rate, **options)
        heads = 2
    layer.build((2, 5, 4 * length), (2, length, length))
    query, key, *_ = layer.get_weights()
    value = np.repeat(np.eye(length)[:, None], heads, axis=1)
    layer.set_weights([query, key, value, np.eye(4 * length).reshape(4, length, -1)])
    return layer


def read_weights(layer, length):
    """Return the attention weights of a training call, of the shape (b, h, q, k) or (b, q, k)."""
    is_plain = isinstance(layer, Attention)
    query = np.zeros((2, 5, length if is_plain else 4 * length), "float32")
    value = np.stack([np.eye(length, dtype="float32")] * 2)
    output = to_numpy(keras.ops.cast(apply(layer, query, value), "float32"))
    if is_plain:
        return output
    return output.reshape(2, 5, 4, length).transpose(0, 2, 1, 3)


def reference(layer, n, upstream, **options):
    """Return the output and the gradients of QUERY and VALUE, by the materialized definition."""
    key = SITE.fold_in(n)
    if isinstance(layer, Attention):
        y, pullback = attention(QUERY, VALUE, VALUE, RATE, key, scale=1.0, **options)
        dq, dk, dv = pullback(upstream)
        return y, dq, dk + dv
    *projections, out = (np.asarray(w, "float64") for w in layer.get_weights())
    heads = [
        np.einsum("blm,mhd->bhld", x, w)
        for x, w in zip((QUERY, VALUE, VALUE), projections, strict=True)
    ]
    y, pullback = attention(*heads, RATE, key, **options)
    dq, dk, dv = (
        np.einsum("bhld,mhd->blm", gradient, w)
        for gradient, w in zip(
            pullback(np.einsum("blm,hdm->bhld", upstream, out)), projections, strict=True
        )
    )
    return np.einsum("bhld,hdm->blm", y, out), dq, dk + dv


def differentiate(call, query, value, upstream):
    """Return the gradients of a call's output times upstream, on the backend that runs."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        inputs = [tf.constant(query), tf.constant(value)]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(call(*inputs) * upstream)
        return tape.gradient(loss, inputs)
    if BACKEND == "jax":
        import jax

        return jax.grad(lambda q, v: (call(q, v) * upstream).sum(), (0, 1))(query, value)
    import torch

    inputs = [torch.tensor(x, requires_grad=True) for x in (query, value)]
    (call(*inputs) * torch.from_numpy(upstream)).sum().backward()
    return [x.grad for x in inputs]


def make_model(kind, seed=SITE):
    query, value = keras.Input((5, 8)), keras.Input((6, 8))
    layer = make(kind, seed=seed)
    model = keras.Model(
        [query, value], keras.layers.Dense(1)(apply(layer, query, value, training=None))
    )
    return model, layer
