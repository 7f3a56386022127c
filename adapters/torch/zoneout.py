"""Zoneout for PyTorch: a function, and a module that counts its calls."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unidrop.adapters.torch.family.member import run_member
from unidrop.adapters.torch.functional import run_plan
from unidrop.adapters.torch.fx import call_override, record_module
from unidrop.adapters.torch.modules import SeededModule
from unidrop.key import Key, check_key
from unidrop.rate import Rate
from unidrop.zoneout import plan_zoneout, run_zoneout

__all__ = ["Zoneout", "zoneout"]


def zoneout(
    new: Tensor,
    old: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Keep the old value of each unit of a recurrent state with probability p.

    Parameters
    ----------
    new, old : torch.Tensor
        The state after and before a step, of one shape and dtype.
    p : int or float, default 0.5
        The probability of keeping an old value, in [0, 1].
    training : bool, default True
        If False, the expectation ``p * old + (1 - p) * new`` is returned.
    key, global_shape, start, return_mask
        As in `dropout`.

    Returns
    -------
    output, mask
        As in `unidrop.family.zoneout`.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; TypeError if the states are complex or differ in their dtypes, ValueError if
        they differ in their shapes.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import zoneout
    >>> zoneout(torch.ones(6), torch.zeros(6), 0.5, key=Key(42))
    tensor([1., 0., 0., 0., 0., 1.])
    """
    options: dict[str, Any] = {"key": key, "global_shape": global_shape, "start": start}
    options["return_mask"] = return_mask
    if not isinstance(new, Tensor):
        return call_override(zoneout, new, old, p, training, **options)
    rate = Rate.from_p(p)
    if training:
        return run_member(plan_zoneout, new, rate, True, False, name="new", old=old, **options)
    if key is not None:
        check_key(key)
    return run_zoneout(new, rate, old=old, training=False, **options)


class Zoneout(SeededModule):
    """In training, keep the old value of each unit of a recurrent state with probability p.

    A call takes the new state and the old one. Each call is one timestep with its own mask. In
    evaluation, a call returns the expectation ``p * old + (1 - p) * new``.

    Parameters
    ----------
    p : int or float, default 0.5
        The probability of keeping an old value, in [0, 1].
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`; a call raises as `zoneout`.

    Notes
    -----
    D. Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", ICLR
    2017.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import Zoneout
    >>> Zoneout(0.5, seed=42)(torch.ones(4), torch.zeros(4))
    tensor([1., 1., 0., 0.])
    """

    _check_rate = staticmethod(Rate.from_p)

    def __init__(self, p: float = 0.5, *, seed: int | Key | None = None) -> None:
        super().__init__(p, seed=seed)

    def forward(self, new: Tensor, old: Tensor) -> Any:  # type: ignore[override] # two states
        """Return the state after a step."""
        if not isinstance(new, Tensor):
            return record_module(self, new, old)
        rate = Rate.from_p(self.p)
        if not self.training or rate.p == 0:
            return run_zoneout(new, rate, None, False, old=old, training=self.training)
        plan = plan_zoneout(new, rate, old=old)
        return self.run_with_key(new, lambda key: run_plan(plan, new, key, False, False))

    def extra_repr(self) -> str:
        """Return the rate, and the seed if there is one."""
        return f"p={self.p}" if self.seed is None else f"p={self.p}, seed={self.seed}"
