"""Stochastic depth, as in timm and torchvision."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from unidrop.adapters.torch.family.member import ScheduledMember, run_member
from unidrop.adapters.torch.fx import call_override
from unidrop.family import Mode, check_mode, plan_drop_path
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.schedule import make_rate

__all__ = ["DropPath", "StochasticDepth", "drop_path", "stochastic_depth"]


def drop_path(
    x: Tensor,
    drop_prob: float | Tensor = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Drop whole examples of a residual branch, as `timm.layers.drop_path`.

    Parameters
    ----------
    x : torch.Tensor
        Of shape ``(N, ...)``, with one decision for each of the N examples.
    drop_prob : int, float or 0-d torch.Tensor, default 0.0
        The probability of zeroing an example, in [0, 1]; a tensor as in `dropout`.
    training : bool, default False
        If False, x is returned unchanged.
    scale_by_keep : bool, default True
        If False, kept examples are unchanged; otherwise they are scaled by 1 / (1 - drop_prob).
    key, global_shape, start, return_mask
        As in `dropout`.

    Returns
    -------
    output : torch.Tensor
        Dropped examples are 0, even where x is NaN or infinite.
    mask : torch.Tensor of bool
        Only with ``return_mask``: of shape ``(N, 1, ..., 1)``.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; ValueError if x has no axis.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import drop_path
    >>> drop_path(torch.ones(4, 2), 0.5, training=True, key=Key(42)).tolist()
    [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    options: dict[str, Any] = {"key": key, "global_shape": global_shape, "start": start}
    options["return_mask"] = return_mask
    if not isinstance(x, Tensor):
        return call_override(drop_path, x, drop_prob, training, scale_by_keep, **options)
    rate = make_rate(drop_prob, x, "drop_prob")
    options |= {"scale_by_keep": scale_by_keep, "name": "x"}
    return run_member(plan_drop_path, x, rate, training, False, **options)


def stochastic_depth(
    input: Tensor,
    p: float | Tensor,
    mode: Mode,
    training: bool = True,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Drop examples or the whole batch, as `torchvision.ops.stochastic_depth`.

    ``mode`` is "row" for one decision for each example, or "batch" for one in all. The rest is as
    in `drop_path`.
    """
    options: dict[str, Any] = {"key": key, "global_shape": global_shape, "start": start}
    options["return_mask"] = return_mask
    if not isinstance(input, Tensor):
        return call_override(stochastic_depth, input, p, mode, training, **options)
    rate = make_rate(p, input)
    return run_member(plan_drop_path, input, rate, training, False, mode=mode, **options)


class DropPath(ScheduledMember):
    """Drop whole examples of a residual branch in training, as `timm.layers.DropPath`.

    Parameters
    ----------
    drop_prob : int, float or 0-d torch.Tensor, default 0.0
        The probability of zeroing an example, in [0, 1]; a tensor as in `Dropout`.
    scale_by_keep : bool, default True
        If False, kept examples are unchanged; otherwise they are scaled by 1 / (1 - drop_prob).
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Attributes
    ----------
    drop_prob : float or torch.Tensor
        The rate, which a schedule may set.
    seed, calls
        As in `Dropout`.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import DropPath
    >>> DropPath(0.5, seed=42)(torch.ones(4, 1)).flatten()
    tensor([2., 2., 0., 0.])
    """

    def __init__(
        self,
        drop_prob: float | Tensor = 0.0,
        scale_by_keep: bool = True,
        *,
        seed: int | Key | None = None,
    ) -> None:
        self._check_rate(drop_prob, "drop_prob")
        super().__init__(drop_prob, seed=seed)
        self.scale_by_keep = scale_by_keep

    @property
    def drop_prob(self) -> float | Tensor:
        """The probability of zeroing an example."""
        return self.p

    @drop_prob.setter
    def drop_prob(self, value: float | Tensor) -> None:
        self._check_rate(value, "drop_prob")
        self.p = cast(float, value)

    def _plan(self, input: Tensor) -> DropoutPlan:
        rate = make_rate(self.p, input, "drop_prob")
        options: dict[str, Any] = {"scale_by_keep": self.scale_by_keep, "training": self.training}
        return plan_drop_path(input, rate, name="x", **options)

    def extra_repr(self) -> str:
        """Return the text of timm, and the seed if there is one."""
        text = f"drop_prob={round(float(self.drop_prob), 3):0.3f}"
        return text if self.seed is None else f"{text}, seed={self.seed}"


class StochasticDepth(ScheduledMember):
    """Drop examples or the whole batch in training, as `torchvision.ops.StochasticDepth`.

    Parameters
    ----------
    p : int, float or 0-d torch.Tensor
        The probability of zeroing an example, in [0, 1]; a tensor as in `Dropout`.
    mode : {"row", "batch"}
        "row" decides for each example, and "batch" once for all.
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`; ValueError if mode is another one.
    """

    def __init__(self, p: float | Tensor, mode: Mode, *, seed: int | Key | None = None) -> None:
        check_mode(mode)
        super().__init__(p, seed=seed)
        self.mode = mode

    def _plan(self, input: Tensor) -> DropoutPlan:
        rate = make_rate(self.p, input)
        return plan_drop_path(input, rate, mode=self.mode, training=self.training, name="input")

    def extra_repr(self) -> str:
        """Return the text of torchvision, and the seed if there is one."""
        text = f"p={self.p}, mode={self.mode}"
        return text if self.seed is None else f"{text}, seed={self.seed}"
