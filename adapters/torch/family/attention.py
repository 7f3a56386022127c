"""Members for attention: DropKey and DropHead."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unidrop.adapters.torch.family.member import Member, ScheduledMember, run_member
from unidrop.adapters.torch.fx import call_override
from unidrop.drop_head import plan_drop_head
from unidrop.family import plan_drop_key
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.schedule import make_rate

__all__ = ["DropHead", "DropKey", "drop_head", "drop_key"]


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


def drop_head(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    axis: int = 1,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Drop whole heads of attention, which are the elements along an axis.

    The default axis is the one of outputs of shape ``(batch, heads, length, features)``, as in
    `torch.nn.functional.scaled_dot_product_attention`. `unidrop.family.drop_head` has the details.
    The other parameters, returns and errors are as in `dropout`; ValueError if the input has no
    such axis.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import drop_head
    >>> drop_head(torch.ones(2, 3, 1, 1), 0.5, key=Key(42))[:, :, 0, 0]
    tensor([[2., 0., 0.],
            [0., 0., 2.]])
    """
    options: dict[str, Any] = {"key": key, "global_shape": global_shape, "start": start}
    options["return_mask"] = return_mask
    if not isinstance(input, Tensor):
        return call_override(drop_head, input, p, training, inplace, axis, **options)
    options["axis"] = axis
    return run_member(plan_drop_head, input, make_rate(p, input), training, inplace, **options)


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


class DropHead(ScheduledMember):
    """Drop whole heads of attention in training.

    `unidrop.family.drop_head` has the details.

    Parameters
    ----------
    p : int or float, default 0.5
        The probability of dropping a head of an example, in [0, 1].
    axis : int, default 1
        The axis of heads, as in ``(batch, heads, length, features)``.
    inplace, seed
        As in `Dropout`.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`; ValueError if an input has no such axis.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import DropHead
    >>> DropHead(0.5, seed=42)(torch.ones(1, 4, 2, 1))[0, :, :, 0]
    tensor([[2., 2.],
            [2., 2.],
            [0., 0.],
            [0., 0.]])
    """

    def __init__(
        self,
        p: float | Tensor = 0.5,
        axis: int = 1,
        inplace: bool = False,
        *,
        seed: int | Key | None = None,
    ) -> None:
        super().__init__(p, inplace, seed=seed)
        self.axis = axis

    def _plan(self, input: Tensor) -> DropoutPlan:
        rate = make_rate(self.p, input)
        return plan_drop_head(input, rate, axis=self.axis, training=self.training, name="input")

    def extra_repr(self) -> str:
        """Return the parameters, and the seed if there is one."""
        text = f"p={self.p}, axis={self.axis}, inplace={self.inplace}"
        return text if self.seed is None else f"{text}, seed={self.seed}"
