"""Run Keras's attention layers on arrays of heads, as a layer of one vector.

The projections of the layers are identities, so that their inputs are the queries, keys and values
of all heads. One vector holds them, since the runners of `keras_modes` call layers of one input.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import keras
import numpy as np

from unidrop.adapters.keras import GroupQueryAttention, MultiHeadAttention

__all__ = ["AttentionOfVector", "pack", "unpack"]


def pack(inputs: Sequence[Any]) -> Any:
    """Return one vector with the elements of several tensors."""
    return keras.ops.concatenate([keras.ops.reshape(x, (-1,)) for x in inputs])


def unpack(packed: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Return the tensors of several shapes in a vector."""
    ends = np.cumsum([prod(shape) for shape in shapes]).tolist()
    starts = [0, *ends]
    return [
        keras.ops.reshape(packed[start:end], shape)
        for start, end, shape in zip(starts, ends, shapes, strict=False)
    ]


class AttentionOfVector(keras.layers.Layer):
    """An attention layer whose input is `pack` of queries, keys and values.

    Parameters
    ----------
    shapes : sequence of tuple of int
        Shapes of queries, keys and values, with the axes batch, head, position and feature.
    p : float
    seed : int
    mask : tensor of bool, optional
        Of shape (batch, queries, keys).
    is_causal : bool
    dtype : str
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        p: float,
        seed: int,
        mask: Any,
        is_causal: bool,
        dtype: str,
    ) -> None:
        super().__init__(dtype=dtype, autocast=False)
        self._shapes = shapes
        self._options = {"attention_mask": mask, "use_causal_mask": is_causal}
        (batch, heads, queries, features), (_, groups, keys, _), _ = shapes
        # JAX would compile random initial values for a second.
        options: dict[str, Any] = {"use_bias": False, "kernel_initializer": "zeros"}
        options |= {"dropout": p, "seed": seed, "dtype": dtype}
        if groups == heads:
            self._layer = MultiHeadAttention(heads, features, **options)
        else:
            self._layer = GroupQueryAttention(features, heads, groups, **options)
        of_keys = batch, keys, groups * features
        self._layer.build((batch, queries, heads * features), of_keys, of_keys)
        counts = heads, groups, groups
        identities = [np.eye(n * features).reshape(-1, n, features) for n in counts]
        output = np.eye(heads * features).reshape(heads, features, -1)
        self._layer.set_weights([*identities, output])
        self._layer.trainable = False
        self.built = True

    @property
    def calls(self) -> int:
        """The call number of the attention layer."""
        return self._layer.calls

    @calls.setter
    def calls(self, value: int) -> None:
        self._layer.calls = value

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Return the output, with the axes batch, head, position and feature."""
        arrays = unpack(inputs, self._shapes)
        query, key, value = (self._join_heads(x) for x in arrays)
        y = self._layer(query, value, key, training=training, **self._options)
        batch, heads, queries, features = self._shapes[0]
        y = keras.ops.reshape(y, (batch, queries, heads, features))
        return keras.ops.swapaxes(y, 1, 2)

    def _join_heads(self, x: Any) -> Any:
        batch, heads, length, features = x.shape
        return keras.ops.reshape(keras.ops.swapaxes(x, 1, 2), (batch, length, heads * features))
