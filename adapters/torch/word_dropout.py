"""Word dropout for PyTorch: a function, and a module that counts its calls."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unidrop.adapters.torch.family.member import Member, run_member
from unidrop.adapters.torch.fx import call_override
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.word_dropout import check_tokens, plan_word_dropout

__all__ = ["WordDropout", "word_dropout"]


def word_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    unk_id: int,
    special_ids: Sequence[int] = (),
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Replace tokens by the one for unknown words with probability p.

    `unidrop.family.word_dropout` describes the tokens and the results. The other parameters are as
    in `dropout`.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import word_dropout
    >>> tokens = torch.tensor([5, 6, 7, 8, 0, 0])
    >>> word_dropout(tokens, 0.5, unk_id=1, special_ids=(0,), key=Key(42))
    tensor([5, 1, 1, 1, 0, 0])
    """
    options: dict[str, Any] = {"unk_id": unk_id, "special_ids": special_ids, "key": key}
    options |= {"global_shape": global_shape, "start": start, "return_mask": return_mask}
    if not isinstance(input, Tensor):
        return call_override(word_dropout, input, p, training, **options)
    return run_member(plan_word_dropout, input, Rate.from_p(p), training, False, **options)


class WordDropout(Member):
    """Replace tokens by the one for unknown words in training, with probability p.

    Parameters
    ----------
    p : int or float
        The probability of replacing a token, in [0, 1].
    unk_id : int
        The token to replace others by.
    special_ids : sequence of int, default ()
        Tokens to keep wherever they are, such as padding and the end of a sentence.
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`; a call raises as `unidrop.family.word_dropout`.

    Notes
    -----
    S. Bowman et al., "Generating sentences from a continuous space", CoNLL 2016.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import WordDropout
    >>> WordDropout(0.5, unk_id=1, seed=42)(torch.tensor([5, 6, 7, 8]))
    tensor([5, 6, 1, 1])
    """

    def __init__(
        self,
        p: float,
        unk_id: int,
        special_ids: Sequence[int] = (),
        *,
        seed: int | Key | None = None,
    ) -> None:
        super().__init__(p, seed=seed)
        self.unk_id, self.special_ids = check_tokens(unk_id, special_ids)

    def _plan(self, input: Tensor) -> DropoutPlan:
        options: dict[str, Any] = {"unk_id": self.unk_id, "special_ids": self.special_ids}
        options |= {"training": self.training, "name": "input"}
        return plan_word_dropout(input, Rate.from_p(self.p), **options)

    def extra_repr(self) -> str:
        """Return the parameters, and the seed if there is one."""
        text = f"p={self.p}, unk_id={self.unk_id}, special_ids={self.special_ids}"
        return text if self.seed is None else f"{text}, seed={self.seed}"
