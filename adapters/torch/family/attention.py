"""Members for attention: DropKey."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unidrop.adapters.torch.family.member import Member, run_member
from unidrop.adapters.torch.fx import call_override
from unidrop.family import plan_drop_key
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = ["DropKey", "drop_key"]


def drop_key(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Set scores of attention to minus infinity with probability p, before the softmax.

    `unidrop.family.drop_key` has the details. Parameters, returns and errors are as in `dropout`;
    complex inputs raise TypeError.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import drop_key
    >>> drop_key(torch.ones(6), 0.5, key=Key(42))
    tensor([1., -inf, -inf, -inf, -inf, 1.])
    """
    options: dict[str, Any] = {"key": key, "global_shape": global_shape, "start": start}
    options |= {"broadcast_axes": broadcast_axes, "return_mask": return_mask}
    if not isinstance(input, Tensor):
        return call_override(drop_key, input, p, training, inplace, **options)
    return run_member(plan_drop_key, input, Rate.from_p(p), training, inplace, **options)


class DropKey(Member):
    """Set scores of attention to minus infinity in training, before the softmax.

    Parameters, attributes and errors are as in `Dropout`; complex inputs raise TypeError.
    `unidrop.family.drop_key` has the details.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import DropKey
    >>> DropKey(0.5, seed=42)(torch.ones(4))
    tensor([1., 1., -inf, -inf])
    """

    def _plan(self, input: Tensor) -> DropoutPlan:
        return plan_drop_key(input, Rate.from_p(self.p), training=self.training, name="input")
