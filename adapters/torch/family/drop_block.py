"""Dropped blocks of feature maps, as in torchvision."""

from typing import Any

from torch import Tensor

from unidrop.adapters.torch.family.member import Member, run_member
from unidrop.adapters.torch.fx import call_override
from unidrop.drop_block import check_block_size, plan_drop_block
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = ["DropBlock2d", "DropBlock3d", "drop_block2d", "drop_block3d"]


def drop_block2d(
    input: Tensor,
    p: float,
    block_size: int,
    inplace: bool = False,
    eps: float = 1e-06,
    training: bool = True,
    *,
    key: Key | None = None,
    return_mask: bool = False,
) -> Any:
    """Drop square blocks of feature maps, as `torchvision.ops.drop_block2d`.

    Parameters
    ----------
    input : torch.Tensor
        Of shape (N, C, H, W).
    p : int or float
        The share of elements to drop, in [0, 1]. Blocks overlap, so the share is a little smaller.
    block_size : int
        The length of a block, or the smallest of H and W if that is smaller.
    inplace, training, key, return_mask
        As in `dropout`.
    eps : float, default 1e-06
        Ignored: the count of kept elements, which scales them, is exact.

    Returns
    -------
    output, mask
        As in `dropout`; the mask is of the input's shape.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; ValueError if the input has another rank, or block_size is below 1.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import drop_block2d
    >>> drop_block2d(torch.ones(1, 1, 4, 5), 0.3, 2, key=Key(42))[0, 0]
    tensor([[1.2500, 1.2500, 1.2500, 1.2500, 1.2500],
            [0.0000, 0.0000, 1.2500, 1.2500, 1.2500],
            [0.0000, 0.0000, 1.2500, 1.2500, 1.2500],
            [1.2500, 1.2500, 1.2500, 1.2500, 1.2500]])
    """
    options: dict[str, Any] = {"key": key, "return_mask": return_mask}
    if not isinstance(input, Tensor):
        arguments = p, block_size, inplace, eps, training
        return call_override(drop_block2d, input, *arguments, **options)
    options |= _get_block_options(input, block_size, 2)
    return run_member(plan_drop_block, input, Rate.from_p(p), training, inplace, **options)


def drop_block3d(
    input: Tensor,
    p: float,
    block_size: int,
    inplace: bool = False,
    eps: float = 1e-06,
    training: bool = True,
    *,
    key: Key | None = None,
    return_mask: bool = False,
) -> Any:
    """Drop cubic blocks of feature maps, as `torchvision.ops.drop_block3d`.

    The input is of shape (N, C, D, H, W). Everything else is as in `drop_block2d`.
    """
    options: dict[str, Any] = {"key": key, "return_mask": return_mask}
    if not isinstance(input, Tensor):
        arguments = p, block_size, inplace, eps, training
        return call_override(drop_block3d, input, *arguments, **options)
    options |= _get_block_options(input, block_size, 3)
    return run_member(plan_drop_block, input, Rate.from_p(p), training, inplace, **options)


def _get_block_options(input: Tensor, block_size: int, spatial: int) -> dict[str, Any]:
    """Return the options of blocks, or raise as torchvision does for an input of another rank."""
    if input.dim() != spatial + 2:
        raise ValueError(
            f"input should be {spatial + 2} dimensional. Got {input.dim()} dimensions."
        )
    return {"block_size": block_size, "axes": tuple(range(2, spatial + 2)), "clip": True}


class DropBlock2d(Member):
    """Drop square blocks of feature maps in training, as `torchvision.ops.DropBlock2d`.

    Parameters
    ----------
    p : int or float
        The share of elements to drop, in [0, 1].
    block_size : int
        The length of a block.
    inplace, seed
        As in `Dropout`.
    eps : float, default 1e-06
        Ignored: the count of kept elements, which scales them, is exact.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`; ValueError if block_size is below 1, or an input has another rank.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import DropBlock2d
    >>> DropBlock2d(0.3, 2, seed=42)(torch.ones(1, 1, 3, 3))[0, 0]
    tensor([[1.8000, 1.8000, 1.8000],
            [1.8000, 0.0000, 0.0000],
            [1.8000, 0.0000, 0.0000]])
    """

    _SPATIAL = 2

    def __init__(
        self,
        p: float,
        block_size: int,
        inplace: bool = False,
        eps: float = 1e-06,
        *,
        seed: int | Key | None = None,
    ) -> None:
        super().__init__(p, inplace, seed=seed)
        self.block_size, self.eps = check_block_size(block_size), eps

    def _plan(self, input: Tensor) -> DropoutPlan:
        options = _get_block_options(input, self.block_size, self._SPATIAL)
        rate = Rate.from_p(self.p)
        return plan_drop_block(input, rate, training=self.training, name="input", **options)

    def extra_repr(self) -> str:
        """Return the text of torchvision, and the seed if there is one."""
        text = f"p={self.p}, block_size={self.block_size}, inplace={self.inplace}"
        return text if self.seed is None else f"{text}, seed={self.seed}"


class DropBlock3d(DropBlock2d):
    """Drop cubic blocks of feature maps in training, as `torchvision.ops.DropBlock3d`.

    Inputs are of shape (N, C, D, H, W). Everything else is as in `DropBlock2d`.
    """

    _SPATIAL = 3
