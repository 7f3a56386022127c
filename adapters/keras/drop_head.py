"""DropHead for Keras."""

from typing import Any

import keras

from unidrop.adapters.keras.layers import _checked_schedule, _narrow_seed, _SeededLayerMixin
from unidrop.drop_head import plan_drop_head
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = ["DropHead"]


@keras.saving.register_keras_serializable(package="unidrop")
class DropHead(_SeededLayerMixin, keras.layers.Dropout):
    """Drop whole heads of attention in training.

    Keras itself has no such layer. `unidrop.family.drop_head` has the details. seed, calls and
    errors are as in `Dropout`.

    Parameters
    ----------
    rate : int or float
        The probability of dropping a head of an example, in [0, 1].
    axis : int, default -2
        The axis of heads, as in ``(batch, length, heads, features)``.
    seed : int or unidrop.Key, optional
        As in `Dropout`.
    **kwargs
        As in `Dropout`.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import DropHead
    >>> layer = DropHead(0.5, seed=42)
    >>> np.asarray(layer(np.ones((1, 2, 4, 1), "float32"), training=True))[0, :, :, 0]
    array([[2., 2., 0., 0.],
           [2., 2., 0., 0.]], dtype=float32)
    """

    def __init__(
        self, rate: float, axis: int = -2, seed: int | Key | None = None, **kwargs: Any
    ) -> None:
        super().__init__(_checked_schedule(rate), seed=_narrow_seed(seed), **kwargs)
        self.axis = axis
        self._set_seed(seed)

    def _make_plan(
        self, inputs: Any, rate: Rate, axes: tuple[int, ...], **options: Any
    ) -> DropoutPlan:
        return plan_drop_head(inputs, rate, axis=self.axis, **options)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration, with the seed as an integer."""
        config = super().get_config()
        del config["noise_shape"]
        return {**config, "axis": self.axis}
