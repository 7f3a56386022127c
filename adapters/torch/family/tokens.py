"""Patch dropout, as in timm."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unidrop.adapters.torch.family.member import Member, run_member
from unidrop.adapters.torch.fx import call_override
from unidrop.key import Key
from unidrop.permutation import check_patch_rate, check_prefix, plan_patch_dropout
from unidrop.plan import DropoutPlan

__all__ = ["PatchDropout", "PatchDropoutWithIndices", "patch_dropout"]


def patch_dropout(
    x: Tensor,
    prob: float = 0.5,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    training: bool = True,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_indices: bool = False,
) -> Any:
    """Remove a share prob of the tokens of each example, as `timm.layers.PatchDropout`.

    `unidrop.family.patch_dropout` describes the parameters and the results; key is as in `dropout`.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import patch_dropout
    >>> patch_dropout(torch.arange(9.0)[None], ordered=True, key=Key(42))
    tensor([[0., 1., 3., 5., 7.]])
    """
    options: dict[str, Any] = {"key": key, "global_shape": global_shape, "start": start}
    if not isinstance(x, Tensor):
        options["return_indices"] = return_indices
        arguments = prob, num_prefix_tokens, ordered, training
        return call_override(patch_dropout, x, *arguments, **options)
    options |= {"num_prefix_tokens": num_prefix_tokens, "ordered": ordered}
    options |= {"return_mask": return_indices, "name": "x"}
    rate = check_patch_rate(prob, "prob")
    return run_member(plan_patch_dropout, x, rate, training, False, **options)


class PatchDropout(Member):
    """Remove tokens of each example in training, as `timm.layers.PatchDropout`.

    Parameters
    ----------
    prob : int or float, default 0.5
        The share of tokens to remove, in [0, 1).
    num_prefix_tokens : int, default 1
        The number of first tokens to keep, such as a class token.
    ordered : bool, default False
        If True, kept tokens stay in order; otherwise their order is random.
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`; ValueError if prob is 1.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import PatchDropout
    >>> PatchDropout(0.5, ordered=True, seed=42)(torch.arange(9.0)[None])
    tensor([[0., 1., 2., 4., 7.]])
    """

    def __init__(
        self,
        prob: float = 0.5,
        num_prefix_tokens: int = 1,
        ordered: bool = False,
        *,
        seed: int | Key | None = None,
    ) -> None:
        check_patch_rate(prob, "prob")
        super().__init__(prob, seed=seed)
        self.num_prefix_tokens, self.ordered = check_prefix(num_prefix_tokens), ordered

    @property
    def prob(self) -> float:
        """The share of tokens to remove."""
        return self.p

    @prob.setter
    def prob(self, value: float) -> None:
        self.p = check_patch_rate(value, "prob").p

    def _plan(self, input: Tensor) -> DropoutPlan:
        options: dict[str, Any] = {"num_prefix_tokens": self.num_prefix_tokens, "name": "x"}
        options |= {"ordered": self.ordered, "training": self.training}
        return plan_patch_dropout(input, check_patch_rate(self.p, "prob"), **options)

    def extra_repr(self) -> str:
        """Return the parameters, and the seed if there is one."""
        text = f"prob={self.p}, num_prefix_tokens={self.num_prefix_tokens}, ordered={self.ordered}"
        return text if self.seed is None else f"{text}, seed={self.seed}"


class PatchDropoutWithIndices(PatchDropout):
    """Remove tokens, and return the indices of the others too.

    As `timm.layers.patch_dropout.PatchDropoutWithIndices`: indices do not count the prefix, and are
    None if nothing is removed. Everything else is as in `PatchDropout`.
    """

    def forward(self, input: Tensor) -> Any:
        """Return the kept tokens and their indices."""
        plan = self._make_plan(input)
        if plan is None:
            return input, None
        return self.run_with_key(input, lambda key: plan.call(input, key, True))
