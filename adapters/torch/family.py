"""Members of the family of dropout, under the names of `torch.nn`, timm and torchvision.

PyTorch documentation: torch.nn.AlphaDropout, torch.nn.FeatureAlphaDropout (2.13); timm:
timm.layers.DropPath (1.0); torchvision: torchvision.ops.StochasticDepth (0.28); PyTorch-NLP:
torchnlp.nn.LockedDropout (0.5).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from unidrop.adapters.torch.functional import run_plan, trace_identity
from unidrop.adapters.torch.fx import call_override
from unidrop.adapters.torch.modules import SeededModule
from unidrop.drop_block import check_block_size, plan_drop_block
from unidrop.family import (
    Mode,
    check_mode,
    plan_alpha_dropout,
    plan_drop_key,
    plan_drop_path,
    plan_feature_alpha_dropout,
    plan_locked_dropout,
)
from unidrop.gaussian import (
    NOISE_RATE,
    check_stddev,
    plan_gaussian_dropout,
    plan_gaussian_noise,
)
from unidrop.key import Key, check_key
from unidrop.permutation import check_patch_rate, check_prefix, plan_patch_dropout
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = [
    "AlphaDropout",
    "DropBlock2d",
    "DropBlock3d",
    "DropKey",
    "DropPath",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "GaussianNoise",
    "LockedDropout",
    "PatchDropout",
    "PatchDropoutWithIndices",
    "StochasticDepth",
    "alpha_dropout",
    "drop_block2d",
    "drop_block3d",
    "drop_key",
    "drop_path",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "gaussian_noise",
    "locked_dropout",
    "patch_dropout",
    "stochastic_depth",
]


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
    return _run(plan_alpha_dropout, input, Rate.from_p(p), training, inplace, **options)


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
    return _run(plan, input, Rate.from_p(p), training, inplace, **options)


def gaussian_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
) -> Any:
    """Multiply each element by a normal number of mean 1 and variance p / (1 - p).

    Parameters and errors are as in `dropout`; complex inputs raise TypeError, and a p of 1 raises
    ValueError. `unidrop.family.gaussian_dropout` has the formula. The backward pass recomputes the
    factors from the key.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import gaussian_dropout
    >>> gaussian_dropout(torch.ones(3), 0.5, key=Key(42))
    tensor([1.3708, 1.0438, 0.4998])
    """
    options: dict[str, Any] = {"key": key, "global_shape": global_shape, "start": start}
    if not isinstance(input, Tensor):
        return call_override(gaussian_dropout, input, p, training, inplace, **options)
    options["return_mask"] = False
    return _run(plan_gaussian_dropout, input, Rate.from_p(p), training, inplace, **options)


def gaussian_noise(
    input: Tensor,
    stddev: float,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
) -> Any:
    """Add a normal number of mean 0 and standard deviation stddev to each element.

    The other parameters and the errors are as in `gaussian_dropout`.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import gaussian_noise
    >>> gaussian_noise(torch.zeros(3), 0.1, key=Key(42))
    tensor([ 0.0371,  0.0044, -0.0500])
    """
    options: dict[str, Any] = {"key": key, "global_shape": global_shape, "start": start}
    if not isinstance(input, Tensor):
        return call_override(gaussian_noise, input, stddev, training, inplace, **options)
    options |= {"return_mask": False, "stddev": stddev}
    rate = Rate.from_p(NOISE_RATE)
    return _run(plan_gaussian_noise, input, rate, training, inplace, **options)


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
    return _run(plan_drop_block, input, Rate.from_p(p), training, inplace, **options)


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
    return _run(plan_drop_block, input, Rate.from_p(p), training, inplace, **options)


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
    return _run(plan_patch_dropout, x, check_patch_rate(prob, "prob"), training, False, **options)


def drop_path(
    x: Tensor,
    drop_prob: float = 0.0,
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
    drop_prob : int or float, default 0.0
        The probability of zeroing an example, in [0, 1].
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
    rate = Rate.from_p(drop_prob, "drop_prob")
    options |= {"scale_by_keep": scale_by_keep, "name": "x"}
    return _run(plan_drop_path, x, rate, training, False, **options)


def stochastic_depth(
    input: Tensor,
    p: float,
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
    return _run(plan_drop_path, input, Rate.from_p(p), training, False, mode=mode, **options)


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
    return _run(plan_drop_key, input, Rate.from_p(p), training, inplace, **options)


def locked_dropout(
    input: Tensor,
    p: float = 0.5,
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
    p : int or float, default 0.5
        The probability of zeroing a feature of a sequence, in [0, 1].
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
    return _run(plan_locked_dropout, input, Rate.from_p(p), training, False, **options)


def _get_time_axis(input: Tensor, batch_first: bool) -> int:
    """Return the axis of time, where `torch.nn.LSTM` has it."""
    if input.dim() not in (2, 3):
        raise ValueError(f"input must have 2 or 3 axes, got shape {tuple(input.shape)}")
    return 1 if batch_first and input.dim() == 3 else 0


def _run(
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


def _get_block_options(input: Tensor, block_size: int, spatial: int) -> dict[str, Any]:
    """Return the options of blocks, or raise as torchvision does for an input of another rank."""
    if input.dim() != spatial + 2:
        raise ValueError(
            f"input should be {spatial + 2} dimensional. Got {input.dim()} dimensions."
        )
    return {"block_size": block_size, "axes": tuple(range(2, spatial + 2)), "clip": True}


def _check_channels(input: Tensor, training: bool) -> None:
    """Raise as PyTorch does for a training input without channels."""
    if training and input.dim() < 2:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")


class _Member(SeededModule):
    """A module of a member, which makes the plan of each call."""

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


class AlphaDropout(_Member, torch.nn.AlphaDropout):
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


class FeatureAlphaDropout(_Member, torch.nn.FeatureAlphaDropout):
    """Apply alpha dropout to whole channels in training, as `torch.nn.FeatureAlphaDropout`.

    Parameters, attributes and errors are as in `Dropout`. An input with fewer than two axes raises
    RuntimeError.
    """

    def _plan(self, input: Tensor) -> DropoutPlan:
        _check_channels(input, self.training)
        plan = plan_feature_alpha_dropout if self.training else plan_alpha_dropout
        return plan(input, Rate.from_p(self.p), training=self.training, name="input")


class GaussianDropout(_Member):
    """In training, multiply the input by normal numbers of mean 1 and variance p / (1 - p).

    Parameters, attributes and errors are as in `Dropout`. The backward pass recomputes the factors
    from the key. `unidrop.family.gaussian_dropout` has the formula.

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import GaussianDropout
    >>> GaussianDropout(0.5, seed=42)(torch.ones(3))
    tensor([1.7105, 0.7370, 1.3253])
    """

    def _plan(self, input: Tensor) -> DropoutPlan:
        rate = Rate.from_p(self.p)
        return plan_gaussian_dropout(input, rate, training=self.training, name="input")


class GaussianNoise(_Member):
    """In training, add normal numbers of mean 0 and standard deviation stddev to the input.

    Parameters
    ----------
    stddev : int or float
        The standard deviation, at least 0. A schedule may set the attribute.
    inplace, seed
        As in `Dropout`.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`, and if stddev is not a Python number, 0 or in [2^-100, 2^127).

    Examples
    --------
    >>> import torch
    >>> from unidrop.adapters.torch import GaussianNoise
    >>> GaussianNoise(0.1, seed=42)(torch.zeros(3))
    tensor([ 0.0710, -0.0263,  0.0325])
    """

    def __init__(
        self, stddev: float, inplace: bool = False, *, seed: int | Key | None = None
    ) -> None:
        super().__init__(0.0, inplace, seed=seed)
        self.stddev = stddev

    @property
    def stddev(self) -> float:
        """The standard deviation."""
        return self.p

    @stddev.setter
    def stddev(self, value: float) -> None:
        self.p = check_stddev(value)

    def _plan(self, input: Tensor) -> DropoutPlan:
        options: dict[str, Any] = {"stddev": self.p, "training": self.training, "name": "input"}
        return plan_gaussian_noise(input, Rate.from_p(NOISE_RATE), **options)

    def extra_repr(self) -> str:
        """Return the standard deviation, and the seed if there is one."""
        text = f"stddev={self.stddev}, inplace={self.inplace}"
        return text if self.seed is None else f"{text}, seed={self.seed}"


class DropBlock2d(_Member):
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


class PatchDropout(_Member):
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


class DropPath(_Member):
    """Drop whole examples of a residual branch in training, as `timm.layers.DropPath`.

    Parameters
    ----------
    drop_prob : int or float, default 0.0
        The probability of zeroing an example, in [0, 1].
    scale_by_keep : bool, default True
        If False, kept examples are unchanged; otherwise they are scaled by 1 / (1 - drop_prob).
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Attributes
    ----------
    drop_prob : float
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
        drop_prob: float = 0.0,
        scale_by_keep: bool = True,
        *,
        seed: int | Key | None = None,
    ) -> None:
        Rate.from_p(drop_prob, "drop_prob")
        super().__init__(drop_prob, seed=seed)
        self.scale_by_keep = scale_by_keep

    @property
    def drop_prob(self) -> float:
        """The probability of zeroing an example."""
        return self.p

    @drop_prob.setter
    def drop_prob(self, value: float) -> None:
        self.p = Rate.from_p(value, "drop_prob").p

    def _plan(self, input: Tensor) -> DropoutPlan:
        rate = Rate.from_p(self.p, "drop_prob")
        options: dict[str, Any] = {"scale_by_keep": self.scale_by_keep, "training": self.training}
        return plan_drop_path(input, rate, name="x", **options)

    def extra_repr(self) -> str:
        """Return the text of timm, and the seed if there is one."""
        text = f"drop_prob={round(self.drop_prob, 3):0.3f}"
        return text if self.seed is None else f"{text}, seed={self.seed}"


class StochasticDepth(_Member):
    """Drop examples or the whole batch in training, as `torchvision.ops.StochasticDepth`.

    Parameters
    ----------
    p : int or float
        The probability of zeroing an example, in [0, 1].
    mode : {"row", "batch"}
        "row" decides for each example, and "batch" once for all.
    seed : int or unidrop.Key, optional
        As in `Dropout`.

    Raises
    ------
    TypeError, ValueError
        As `Dropout`; ValueError if mode is another one.
    """

    def __init__(self, p: float, mode: Mode, *, seed: int | Key | None = None) -> None:
        check_mode(mode)
        super().__init__(p, seed=seed)
        self.mode = mode

    def _plan(self, input: Tensor) -> DropoutPlan:
        rate = Rate.from_p(self.p)
        return plan_drop_path(input, rate, mode=self.mode, training=self.training, name="input")

    def extra_repr(self) -> str:
        """Return the text of torchvision, and the seed if there is one."""
        text = f"p={self.p}, mode={self.mode}"
        return text if self.seed is None else f"{text}, seed={self.seed}"


class DropKey(_Member):
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


class LockedDropout(_Member):
    """Apply dropout with one mask for all timesteps in training, as `torchnlp.nn.LockedDropout`.

    Parameters
    ----------
    p : int or float, default 0.5
        The probability of zeroing a feature of a sequence, in [0, 1].
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
        self, p: float = 0.5, batch_first: bool = False, *, seed: int | Key | None = None
    ) -> None:
        super().__init__(p, seed=seed)
        self.batch_first = batch_first

    def _plan(self, input: Tensor) -> DropoutPlan:
        axis = _get_time_axis(input, self.batch_first)
        rate = Rate.from_p(self.p)
        return plan_locked_dropout(input, rate, axis=axis, training=self.training, name="input")

    def extra_repr(self) -> str:
        """Return the text of PyTorch-NLP, and other arguments than its own."""
        text = f"p={self.p}" + (", batch_first=True" if self.batch_first else "")
        return text if self.seed is None else f"{text}, seed={self.seed}"
