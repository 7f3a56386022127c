"""Zoneout for Keras."""

from typing import Any

import keras
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from unidrop.adapters.keras.layers import _checked_rate, _narrow_seed, _SeededLayerMixin
from unidrop.key import Key
from unidrop.rate import Rate
from unidrop.zoneout import expect_zoneout, plan_zoneout

__all__ = ["Zoneout"]


@keras.saving.register_keras_serializable(package="unidrop")
class Zoneout(_SeededLayerMixin, keras.layers.Dropout):
    """Keep the old value of each unit of a recurrent state with a frequency of ``rate``.

    Keras itself has no such layer. A call takes the new state and the old one. In inference, it
    returns the expectation ``rate * old + (1 - rate) * new``. Parameters, attributes and errors are
    as in `Dropout`, without ``noise_shape``. `unidrop.family.zoneout` has the details.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import Zoneout
    >>> new, old = np.ones((1, 4), "float32"), np.zeros((1, 4), "float32")
    >>> np.asarray(Zoneout(0.5, seed=42)(new, old, training=True))
    array([[1., 1., 0., 0.]], dtype=float32)
    """

    def __init__(self, rate: float, seed: int | Key | None = None, **kwargs: Any) -> None:
        super().__init__(_checked_rate(rate), seed=_narrow_seed(seed), **kwargs)
        self._set_seed(seed)

    def call(  # type: ignore[override] # it takes two states
        self, new: Any, old: Any, training: bool = False
    ) -> Any:
        """Return the state after a step."""
        if self.rate == 0 or in_symbolic_scope():
            return new
        rate = Rate.from_p(self.rate, "rate")
        if not training:
            return expect_zoneout(plan_zoneout(new, rate, old=old), new)
        rank, options = self._find_part(new)
        plan = plan_zoneout(new, rate, old=old, **options)
        return self._run_with_key(new, rank, lambda key: plan.apply(new, key))

    def compute_output_shape(self, new_shape: Any, old_shape: Any) -> Any:
        """Return the shape of the new state."""
        return new_shape

    def get_config(self) -> dict[str, Any]:
        """Return the configuration, with the seed as an integer."""
        config = super().get_config()
        del config["noise_shape"]
        return config
