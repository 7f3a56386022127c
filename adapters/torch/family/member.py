"""What the members share: one way to run a plan, and the base of their modules."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from unidrop.adapters.torch.functional import run_plan, trace_identity
from unidrop.adapters.torch.modules import SeededModule
from unidrop.key import Key, check_key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = ["Member", "ScheduledMember", "run_member"]


def run_member(
    make_plan: Callable[..., DropoutPlan],
    input: Tensor,
    rate: Rate,
    training: bool,
    inplace: bool,
    *,
    key: Key | None,
    return_mask: bool,
    name: str = "input",
    **options: Any,
) -> Any:
    """Run a member with a valid rate."""
    if key is not None:
        check_key(key)
    plan = make_plan(input, rate, training=training, name=name, **options)
    return run_plan(plan, input, key, inplace, return_mask)


class Member(SeededModule):
    """A module of a member, which makes the plan of each call."""

    _check_rate = staticmethod(Rate.from_p)

    @abstractmethod
    def _plan(self, input: Tensor) -> DropoutPlan:
        """Return the plan of a call, traced or not."""

    def _make_plan(self, input: Tensor) -> DropoutPlan | None:
        plan = self._plan(input)
        return plan if plan.drops else None

    def _trace(self, input: Tensor) -> Tensor:
        plan = self._make_plan(input)
        if plan is None:
            return trace_identity(input)
        output: Any = run_plan(plan, input, self._trace_key(input), self.inplace, False)
        return cast(Tensor, output)


class ScheduledMember(Member):
    """A module of a member whose rate may be a tensor."""

    _check_rate = staticmethod(SeededModule._check_rate)
