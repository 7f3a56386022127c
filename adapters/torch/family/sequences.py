"""Members for recurrent layers: locked dropout, as in PyTorch-NLP."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unidrop.adapters.torch.family.member import ScheduledMember, run_member
from unidrop.adapters.torch.fx import call_override
from unidrop.family import plan_locked_dropout
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.schedule import make_rate

__all__ = ["LockedDropout", "locked_dropout"]


def locked_dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    batch_first: bool = False,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Apply dropout with one mask for all timesteps of a sequence: variational dropout.

    Parameters
    ----------
    input : torch.Tensor
        Sequences as in `torch.nn.LSTM`: (L, N, H), or (N, L, H) with batch_first, or (L, H).
    p : int, float or 0-d torch.Tensor, default 0.5
        The probability of zeroing a feature of a sequence, in [0, 1]; a tensor as in `dropout`.
    training : bool, default True
        If False, the input is returned unchanged.
    batch_first : bool, default False
        If True, the batch is the first of three axes.
    key, global_shape, start, return_mask
        As in `dropout`.

    Returns
    -------
    output, mask
        As in `dropout`; the mask has length 1 along the axis of time.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; ValueError if the input has neither two nor three axes.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import locked_dropout
    >>> locked_dropout(torch.ones(2, 1, 6), 0.5, key=Key(42))[:, 0]
    tensor([[2., 0., 0., 0., 0., 2.],
            [2., 0., 0., 0., 0., 2.]])
    """
    options: dict[str, Any] = {"key": key, "global_shape": global_shape, "start": start}
    options["return_mask"] = return_mask
    if not isinstance(input, Tensor):
        return call_override(locked_dropout, input, p, training, batch_first, **options)
    options["axis"] = _get_time_axis(input, batch_first)
    return run_member(plan_locked_dropout, input, make_rate(p, input), training, False, **options)


def _get_time_axis(input: Tensor, batch_first: bool) -> int:
    """Return the axis of time, where `torch.nn.LSTM` has it."""
    if input.dim() not in (2, 3):
        raise ValueError(f"input must have 2 or 3 axes, got shape {tuple(input.shape)}")
    return 1 if batch_first and input.dim() == 3 else 0


class LockedDropout(ScheduledMember):
    """Apply dropout with one mask for all timesteps in training, as `torchnlp.nn.LockedDropout`.

    Parameters
    ----------
    p : int, float or 0-d torch.Tensor, default 0.5
        The probability of zeroing a feature of a sequence, in [0, 1]; a tensor as in `Dropout`.
    batch_first : bool, default False
        If True, inputs have the shape (N, L, H), and otherwise (L, N, H), as in `torch.nn.LSTM`.
        (L, H) has no batch.
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`; ValueError if an input has neither two nor three axes.

    Notes
    -----
    S. Merity et al., "Regularizing and optimizing LSTM language models", ICLR 2018.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import LockedDropout
    >>> LockedDropout(0.5, seed=42)(torch.ones(2, 1, 4))[:, 0]
    tensor([[2., 2., 0., 0.],
            [2., 2., 0., 0.]])
    """

    def __init__(
        self, p: float | Tensor = 0.5, batch_first: bool = False, *, seed: int | Key | None = None
    ) -> None:
        super().__init__(p, seed=seed)
        self.batch_first = batch_first

    def _plan(self, input: Tensor) -> DropoutPlan:
        axis = _get_time_axis(input, self.batch_first)
        rate = make_rate(self.p, input)
        return plan_locked_dropout(input, rate, axis=axis, training=self.training, name="input")

    def extra_repr(self) -> str:
        """Return the text of PyTorch-NLP, and other arguments than its own."""
        text = f"p={self.p}" + (", batch_first=True" if self.batch_first else "")
        return text if self.seed is None else f"{text}, seed={self.seed}"
