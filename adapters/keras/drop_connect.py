"""DropConnect for Keras: dropout of the weights of another layer."""

from collections.abc import Sequence
from typing import Any

import keras
from keras.src.backend.common.symbolic_scope import in_symbolic_scope
from keras.src.backend.common.variables import AutocastScope

from unidrop.adapters.keras.layers import _checked_rate, _narrow_seed, _SeededLayerMixin
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = ["DropConnect"]


@keras.saving.register_keras_serializable(package="unidrop")
class DropConnect(_SeededLayerMixin, keras.layers.Wrapper):
    """Drop weights of a layer in training.

    Keras itself has no such layer. With ``K = Key(seed).fold_in(n)``, training call n = 0, 1, 2,
    ... runs the layer with ``dropout(weight, rate, K.fold_in(name))`` in place of the weight of
    each name. Saving, seed, calls and errors are as in `Dropout`.

    Parameters
    ----------
    layer : keras.layers.Layer
        The layer, such as a `keras.layers.Dense` or a `keras.layers.LSTM`.
    rate : int or float, default 0.5
        The probability of dropping a weight, in [0, 1].
    names : str or sequence of str, default ("kernel",)
        The names of the weights to drop, such as "recurrent_kernel" of a recurrent layer.
    seed : int or unidrop.Key, optional
        As in `Dropout`.
    **kwargs
        Arguments of `keras.layers.Layer`.

    Raises
    ------
    ValueError
        As `Dropout`; when it is built, if the layer has no weight of a name, or several.

    Notes
    -----
    L. Wan et al., "Regularization of neural networks using DropConnect", ICML 2013.

    Examples
    --------
    >>> import keras
    >>> import numpy as np
    >>> from unidrop.adapters.keras import DropConnect
    >>> dense = keras.layers.Dense(4, kernel_initializer="ones")
    >>> np.asarray(DropConnect(dense, 0.5, seed=42)(np.ones((1, 1), "float32"), training=True))
    array([[2., 0., 0., 2.]], dtype=float32)
    """

    noise_shape = None

    def __init__(
        self,
        layer: Any,
        rate: float = 0.5,
        names: str | Sequence[str] = ("kernel",),
        seed: int | Key | None = None,
        **kwargs: Any,
    ) -> None:
        Rate.from_p(_checked_rate(rate), "rate")
        narrow = _narrow_seed(seed)
        super().__init__(layer, **kwargs)
        self.rate = rate
        self.names = [names] if isinstance(names, str) else list(names)
        self.supports_masking = layer.supports_masking
        if rate > 0:
            self.seed_generator = keras.random.SeedGenerator(narrow)
        self._set_seed(seed)

    def build(self, input_shape: Any = None) -> None:
        """Build the layer, and raise ValueError unless each name is the one of one weight."""
        super().build(input_shape)
        self._find_weights()

    def _find_weights(self) -> dict[str, Any]:
        """Return the weights to drop, by their names."""
        weights = self.layer.weights
        found = {name: [w for w in weights if w.name == name] for name in self.names}
        if not found or any(len(same) != 1 for same in found.values()):
            raise ValueError(
                f"names must be names of one weight each, such as {[w.name for w in weights]}, "
                f"got {self.names}"
            )
        return {name: same[0] for name, same in found.items()}

    def call(self, inputs: Any, training: bool = False, **kwargs: Any) -> Any:
        """Run the layer, with dropped weights in training."""
        if not training or self.rate == 0 or in_symbolic_scope():
            return self.layer(inputs, **kwargs)
        with AutocastScope(None):  # mixed precision narrows a weight after it is dropped
            values = {name: weight.value for name, weight in self._find_weights().items()}
        rate = Rate.from_p(self.rate, "rate")
        plans = {n: DropoutPlan.from_args(x, rate, name=n) for n, x in values.items()}

        def call(key: Key) -> Any:
            dropped = {n: plans[n].apply(x, key.fold_in(n)) for n, x in values.items()}
            return self._run_layer(dropped, inputs, kwargs)

        return self._run_with_key(keras.tree.flatten(inputs)[0], None, call)

    def _run_layer(self, dropped: dict[str, Any], inputs: Any, kwargs: dict[str, Any]) -> Any:
        """Run the layer with other values of some weights, and keep its other updates."""
        with AutocastScope(None):
            before = {id(variable): variable.value for variable in self.layer.variables}
            before |= {id(w): dropped[name] for name, w in self._find_weights().items()}
            mapping = [(variable, before[id(variable)]) for variable in self.layer.variables]
            scope = keras.StatelessScope(mapping, collect_losses=True)
        with scope:
            values = [scope.get_current_value(variable) for variable in self.layer.variables]
            outputs = self.layer(inputs, **kwargs)
        for variable, value in zip(self.layer.variables, values, strict=True):
            after = scope.get_current_value(variable)
            if after is not value:
                variable.assign(after)
        for loss in scope.losses:
            self.layer.add_loss(loss)
        return outputs

    def compute_output_spec(self, inputs: Any, training: bool = False, **kwargs: Any) -> Any:
        """Return the shape and dtype of the output."""
        return self.layer.compute_output_spec(inputs, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """Return the mask of padding of the layer."""
        return self.layer.compute_mask(inputs, previous_mask)

    def get_config(self) -> dict[str, Any]:
        """Return Keras's configuration, with the seed as an integer, as `Dropout` does."""
        return {**super().get_config(), "rate": self.rate, "names": list(self.names)}
