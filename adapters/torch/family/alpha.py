"""Alpha dropout, as in `torch.nn`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unidrop.adapters.torch.family.member import Member, run_member
from unidrop.adapters.torch.fx import call_override
from unidrop.family import plan_alpha_dropout, plan_feature_alpha_dropout
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = ["AlphaDropout", "FeatureAlphaDropout", "alpha_dropout", "feature_alpha_dropout"]


def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Apply alpha dropout, as `torch.nn.functional.alpha_dropout`.

    ``training`` is False by default, as in PyTorch. The other parameters, returns and errors are as
    in `dropout`; complex inputs raise TypeError. `unidrop.family.alpha_dropout` has the formula.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import alpha_dropout
    >>> alpha_dropout(torch.zeros(3), 0.5, training=True, key=Key(42))
    tensor([ 0.7792, -0.7792, -0.7792])
    """
    options: dict[str, Any] = {"key": key, "global_shape": global_shape, "start": start}
    options["return_mask"] = return_mask
    if not isinstance(input, Tensor):
        return call_override(alpha_dropout, input, p, training, inplace, **options)
    return run_member(plan_alpha_dropout, input, Rate.from_p(p), training, inplace, **options)


def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Apply alpha dropout to whole channels, as `torch.nn.functional.feature_alpha_dropout`.

    Channels are the second axis. Parameters, returns and errors are as in `alpha_dropout`; an input
    with fewer than two axes raises RuntimeError, as in PyTorch.
    """
    options: dict[str, Any] = {"key": key, "global_shape": global_shape, "start": start}
    options["return_mask"] = return_mask
    if not isinstance(input, Tensor):
        return call_override(feature_alpha_dropout, input, p, training, inplace, **options)
    _check_channels(input, training)
    plan = plan_feature_alpha_dropout if training else plan_alpha_dropout
    return run_member(plan, input, Rate.from_p(p), training, inplace, **options)


def _check_channels(input: Tensor, training: bool) -> None:
    """Raise as PyTorch does for a training input without channels."""
    if training and input.dim() < 2:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")


class AlphaDropout(Member, torch.nn.AlphaDropout):
    """Apply alpha dropout in training, as `torch.nn.AlphaDropout`.

    Parameters, attributes and errors are as in `Dropout`; `alpha_dropout` describes the output.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import AlphaDropout
    >>> AlphaDropout(0.5, seed=42)(torch.zeros(3))
    tensor([ 0.7792,  0.7792, -0.7792])
    """

    def _plan(self, input: Tensor) -> DropoutPlan:
        return plan_alpha_dropout(input, Rate.from_p(self.p), training=self.training, name="input")


class FeatureAlphaDropout(Member, torch.nn.FeatureAlphaDropout):
    """Apply alpha dropout to whole channels in training, as `torch.nn.FeatureAlphaDropout`.

    Parameters, attributes and errors are as in `Dropout`. An input with fewer than two axes raises
    RuntimeError.
    """

    def _plan(self, input: Tensor) -> DropoutPlan:
        _check_channels(input, self.training)
        plan = plan_feature_alpha_dropout if self.training else plan_alpha_dropout
        return plan(input, Rate.from_p(self.p), training=self.training, name="input")
