"""Word dropout for Keras."""

from collections.abc import Sequence
from typing import Any

import keras

from unidrop.adapters.keras.layers import _checked_rate, _narrow_seed, _SeededLayerMixin
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.word_dropout import check_tokens, plan_word_dropout

__all__ = ["WordDropout"]


@keras.saving.register_keras_serializable(package="unidrop")
class WordDropout(_SeededLayerMixin, keras.layers.Dropout):
    """Replace tokens by the one for unknown words in training, with a frequency of ``rate``.

    Keras itself has no such layer. It belongs between the tokens and an `Embedding`. seed, calls
    and errors are as in `Dropout`.

    Parameters
    ----------
    rate : int or float
        The probability of replacing a token, in [0, 1].
    unk_id : int
        The token to replace others by.
    special_ids : sequence of int, default ()
        Tokens to keep wherever they are, such as padding and the end of a sentence.
    seed : int or unidrop.Key, optional
        As in `Dropout`.
    **kwargs
        As in `Dropout`.

    Examples
    --------
    >>> import numpy as np
    >>> from unidrop.adapters.keras import WordDropout
    >>> layer = WordDropout(0.5, unk_id=1, seed=42)
    >>> np.asarray(layer(np.array([[5, 6, 7, 8]], "int32"), training=True))
    array([[5, 6, 1, 1]], dtype=int32)
    """

    def __init__(
        self,
        rate: float,
        unk_id: int,
        special_ids: Sequence[int] = (),
        seed: int | Key | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(_checked_rate(rate), seed=_narrow_seed(seed), **kwargs)
        self.unk_id, self.special_ids = check_tokens(unk_id, special_ids)
        self._set_seed(seed)

    def _make_plan(
        self, inputs: Any, rate: Rate, axes: tuple[int, ...], **options: Any
    ) -> DropoutPlan:
        options |= {"unk_id": self.unk_id, "special_ids": tuple(self.special_ids)}
        return plan_word_dropout(inputs, rate, **options)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration, with the seed as an integer."""
        config = super().get_config()
        del config["noise_shape"]
        return {**config, "unk_id": self.unk_id, "special_ids": list(self.special_ids)}
