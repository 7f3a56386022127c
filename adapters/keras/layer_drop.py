"""LayerDrop for Keras."""

from collections.abc import Sequence
from typing import Any

import keras
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from unidrop.adapters.keras.layers import _narrow_seed, _SeededLayerMixin
from unidrop.key import Key
from unidrop.library import get_library
from unidrop.mask import make_mask
from unidrop.rate import Rate
from unidrop.window import Window

__all__ = ["LayerDrop"]


@keras.saving.register_keras_serializable(package="unidrop")
class LayerDrop(_SeededLayerMixin, keras.layers.Layer):
    """Run layers in order, and skip each with a frequency of ``rate`` in training.

    Keras itself has no such layer. The output of a skipped layer is replaced by its input. The
    layer still runs, so that its weights, call numbers and statistics are equal in eager and
    compiled training: nothing is faster. Its gradients are 0.

    Parameters
    ----------
    layers : list of keras.layers.Layer
        The layers, whose outputs have the shape and the dtype of their inputs.
    rate : int or float
        The probability of skipping a layer, in [0, 1].
    seed : int or unidrop.Key, optional
        As in `Dropout`. Training call n has the decisions of `unidrop.family.layer_drop` under the
        key ``Key(seed).fold_in(n)``.
    **kwargs
        As in `Dropout`.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`; ValueError if a layer changes the shape or the dtype.

    Examples
    --------
    >>> import keras
    >>> import numpy as np
    >>> from unidrop.adapters.keras import LayerDrop
    >>> layers = [keras.layers.Rescaling(10, n) for n in range(1, 5)]
    >>> layer = LayerDrop(layers, 0.5, seed=42)
    >>> np.asarray(layer(np.zeros((1, 1), "float32"), training=True))
    array([[12.]], dtype=float32)
    """

    def __init__(
        self,
        layers: Sequence[Any],
        rate: float,
        seed: int | Key | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.rate = Rate.from_p(rate, "rate").p
        if self.rate > 0:
            self.seed_generator = keras.random.SeedGenerator(_narrow_seed(seed))
        self.layers = list(layers)
        self.supports_masking = True
        self._set_seed(seed)

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Run the layers."""
        if not training or self.rate == 0 or in_symbolic_scope():
            for layer in self.layers:
                inputs = layer(inputs)
            return inputs
        rate = Rate.from_p(self.rate, "rate")
        library = get_library(inputs, "inputs")

        def run(key: Key) -> Any:
            device = library.arrays.device(inputs)
            window = Window.from_args((len(self.layers),))
            kept = make_mask(library, inputs, key, window, rate, device)
            outputs = inputs
            for number, layer in enumerate(self.layers):
                candidate = layer(outputs)
                _check_equal(layer, candidate, outputs)
                outputs = keras.ops.where(kept[number], candidate, outputs)
            return outputs

        return self._run_with_key(inputs, None, run)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration, with the layers, and the seed as an integer."""
        config = super().get_config()
        layers = [keras.saving.serialize_keras_object(layer) for layer in self.layers]
        return {"layers": layers, "rate": self.rate, **config}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make a layer of its configuration."""
        layers = [keras.saving.deserialize_keras_object(layer) for layer in config["layers"]]
        return super().from_config({**config, "layers": layers})


def _check_equal(layer: Any, outputs: Any, inputs: Any) -> None:
    """Raise ValueError if a layer changes the shape or the dtype."""
    if tuple(outputs.shape) != tuple(inputs.shape) or outputs.dtype != inputs.dtype:
        raise ValueError(
            f"layers must keep the shape and the dtype of their inputs, {tuple(inputs.shape)} and "
            f"{inputs.dtype}, got {layer.name!r} with {tuple(outputs.shape)} and {outputs.dtype}"
        )
