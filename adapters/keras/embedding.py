"""Embedding dropout for Keras.

Keras documentation: keras.layers.Embedding (Keras 3).
"""

from typing import Any

import keras
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from unidrop.adapters.keras.layers import _STATE, _checked_rate, _narrow_seed, _SeededLayerMixin
from unidrop.embedding import look_up, plan_embedding_dropout
from unidrop.key import Key
from unidrop.rate import Rate

__all__ = ["Embedding"]


@keras.saving.register_keras_serializable(package="unidrop")
class Embedding(_SeededLayerMixin, keras.layers.Embedding):
    """Look up embeddings of words, and drop words everywhere in training.

    Replaces `keras.layers.Embedding`, whose weights it loads. A dropped word is 0 in all places of
    a batch, and others are scaled by ``1 / (1 - rate)``. Training call n = 0, 1, 2, ... drops the
    rows of the matrix that ``keep_mask((input_dim, output_dim), rate, Key(seed).fold_in(n),
    broadcast_axes=(1,))`` drops. `unidrop.family.embedding_dropout` has the details.

    Parameters
    ----------
    input_dim, output_dim : int
        The number of words, and of features.
    *args, **kwargs
        Further arguments of `keras.layers.Embedding`, such as ``mask_zero``.
    rate : int or float, default 0.0
        The probability of dropping a word, in [0, 1].
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Attributes
    ----------
    seed, calls
        As in `Dropout`.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`; ValueError in a training call of a quantized layer, at a rate above 0.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import Embedding
    >>> layer = Embedding(4, 1, embeddings_initializer="ones", rate=0.5, seed=42)
    >>> np.asarray(layer(np.array([[0, 1, 2, 3, 0]]), training=True))[0, :, 0]
    array([2., 2., 0., 0., 2.], dtype=float32)
    """

    noise_shape = None

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        *args: Any,
        rate: float = 0.0,
        seed: int | Key | None = None,
        **kwargs: Any,
    ) -> None:
        Rate.from_p(_checked_rate(rate), "rate")
        narrow = _narrow_seed(seed)
        super().__init__(input_dim, output_dim, *args, **kwargs)
        self.rate = rate
        if rate > 0:
            self._tracker.unlock()  # which the argument `weights` has locked
            self.seed_generator = keras.random.SeedGenerator(narrow)
            if self.built:
                self._tracker.lock()
        self._set_seed(seed)

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Look up words, and drop some in training."""
        look_up_all = super(_SeededLayerMixin, self).call
        if not training or self.rate == 0 or in_symbolic_scope():
            return look_up_all(inputs)
        if keras.backend.standardize_dtype(inputs.dtype) not in ("int32", "int64"):
            inputs = keras.ops.cast(inputs, "int32")
        inputs = keras.ops.where(inputs < 0, inputs + self.input_dim, inputs)
        weight = keras.ops.convert_to_tensor(self.embeddings)
        plan = plan_embedding_dropout(weight, Rate.from_p(self.rate, "rate"), name="embeddings")
        outputs = self._run_with_key(inputs, None, lambda key: look_up(plan, weight, inputs, key))
        return keras.ops.cast(outputs, self.compute_dtype)

    def quantized_call(self, inputs: Any, training: bool = False) -> Any:
        """Look up words in a quantized matrix, which is not for training."""
        if training and self.rate > 0:
            raise ValueError("a quantized layer cannot drop words: set its rate to 0 for training")
        return super().quantized_call(inputs)

    def compute_output_spec(self, inputs: Any, training: bool = False) -> Any:
        """Return the shape and dtype of the output."""
        return super().compute_output_spec(inputs)

    def get_config(self) -> dict[str, Any]:
        """Return Keras's configuration, with the seed as an integer, as `Dropout` does."""
        return {**super().get_config(), "rate": self.rate}

    def load_own_variables(self, store: Any) -> None:
        """Load the matrix, and the call number if there is one."""
        super().load_own_variables(store)
        # A store is not iterable: it has keys() alone.
        weights = {name: store[name] for name in store.keys() if name != _STATE}  # noqa: SIM118
        keras.layers.Embedding.load_own_variables(self, weights)
