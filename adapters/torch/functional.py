"""The functional form of dropout for PyTorch, which `unidrop.adapters.torch` offers."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unidrop.adapters.torch.arrays import LIBRARY, is_tracing
from unidrop.adapters.torch.func import randomness
from unidrop.adapters.torch.operators import (
    as_key,
    constant,
    draw_words,
    key_tensor,
    record_draw,
)
from unidrop.dtypes import compute_dtype
from unidrop.key import Key, check_key
from unidrop.library import get_library
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate, checked_probability

__all__ = [
    "TORCHSCRIPT_MESSAGE",
    "AxesOf",
    "axes1d",
    "axes2d",
    "axes3d",
    "axes_to_record",
    "draw_to_record",
    "drop",
    "drop_drawn",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "make_plan",
    "no_axes",
    "record_drop",
]

TORCHSCRIPT_MESSAGE = (
    "unidrop's dropout does not run in torch.jit, which PyTorch has retired and which would freeze "
    "the mask: use torch.compile or torch.export, or trace in evaluation mode"
)

# From an input, and whether it is training, to the axes along which a mask is shared.
AxesOf = Callable[[Tensor, bool], Sequence[int]]


# Where a compiler must ask no more, as it then traces less.
_DROPPED = frozenset(
    (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    )
)

# Looked up here, since what is looked up for the first time can't be compiled.
for _tensor in (torch.empty(0), torch.nn.Parameter(torch.empty(0))):
    get_library(_tensor)


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
) -> Tensor:
    """During training, zero elements of the input with probability p and scale the rest.

    Parameters
    ----------
    input : torch.Tensor
        Of any shape and layout, of a floating-point or complex dtype. The mask follows logical
        indices; the output has the strides that `torch.empty_like` gives.
    p : int or float, default 0.5
        Probability of an element to be zeroed, in [0, 1].
    training : bool, default True
        Apply dropout if True; otherwise return the input.
    inplace : bool, default False
        Write the output over the input, and return it.
    key : unidrop.Key, optional
        The name of the mask. If None it is drawn from PyTorch's default generator, which
        `torch.manual_seed` seeds, so that a CPU and a GPU draw the same mask.

    Returns
    -------
    torch.Tensor
        Kept elements times ``1 / (1 - p)``. The backward pass makes the mask again from
        the key, and no tensor is kept for it.

    Raises
    ------
    TypeError
        If p is no Python number, key no Key, or the input has an integer or bool dtype.
    ValueError
        If p is outside [0, 1].

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import dropout
    >>> dropout(torch.ones(6), 0.5, key=Key(42))
    tensor([2., 0., 0., 0., 0., 2.])
    """
    return _dropout(input, p, training, inplace, key, no_axes)


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
) -> Tensor:
    """Zero whole channels of a (N, C, L) or (C, L) input with probability p.

    Parameters, returns and errors are those of `dropout`, and a RuntimeError for an input of
    another rank, as `torch.nn.functional.dropout1d` has.
    """
    return _dropout(input, p, training, inplace, key, axes1d)


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
) -> Tensor:
    """Zero whole channels of a (N, C, H, W) input with probability p.

    Parameters, returns and errors are those of `dropout`. As `torch.nn.functional.dropout2d`, it
    warns of an input of another rank, and takes a 3D one as (N, C, L).
    """
    return _dropout(input, p, training, inplace, key, axes2d)


def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
) -> Tensor:
    """Zero whole channels of a (N, C, D, H, W) or (C, D, H, W) input with probability p.

    Parameters, returns and errors are those of `dropout`. As `torch.nn.functional.dropout3d`, it
    warns of an input of another rank.
    """
    return _dropout(input, p, training, inplace, key, axes3d)


def axes1d(input: Tensor, training: bool) -> range:
    """Return the axes that `dropout1d` shares a mask along, or raise as PyTorch does."""
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {input.dim()}D input."
        )
    return _behind_channels(input, training, batched=input.dim() == 3)


def axes2d(input: Tensor, training: bool) -> range:
    """Return the axes that `dropout2d` shares a mask along, and warn as PyTorch does."""
    if input.dim() == 3:
        warnings.warn(
            "dropout2d: Received a 3D input, which is interpreted as shape (N, C, L), as "
            "torch.nn.functional.dropout2d does; use dropout1d instead.",
            stacklevel=3,
        )
    elif input.dim() != 4:
        _warn_of_rank("dropout2d", input, "3D or 4D")
    return _behind_channels(input, training, batched=True)


def axes3d(input: Tensor, training: bool) -> range:
    """Return the axes that `dropout3d` shares a mask along, and warn as PyTorch does."""
    if input.dim() not in (4, 5):
        _warn_of_rank("dropout3d", input, "4D or 5D")
    return _behind_channels(input, training, batched=input.dim() == 5)


def _behind_channels(input: Tensor, training: bool, *, batched: bool) -> range:
    """Return the axes behind batch and channels, along which `feature_dropout` shares a mask."""
    first = 2 if batched else 1
    if training and input.dim() < first:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    return range(first, input.dim())


def _warn_of_rank(function: str, input: Tensor, expected: str) -> None:
    warnings.warn(
        f"{function}: Received a {input.dim()}-D input to {function}, which is deprecated; "
        f"it provides channel-wise dropout on {expected} inputs.",
        stacklevel=4,
    )


def _dropout(
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    key: Key | None,
    get_axes: AxesOf,
) -> Tensor:
    if is_tracing():
        return _record_dropout(input, p, training, inplace, key, get_axes)
    rate = Rate.from_p(p)
    if key is not None:
        check_key(key)
    plan = make_plan(input, rate, training, get_axes)
    if plan is None:
        return input
    return drop_drawn(input, plan, inplace) if key is None else drop(input, plan, key, inplace)


def _record_dropout(
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    key: Key | None,
    get_axes: AxesOf,
) -> Tensor:
    p = checked_probability(p)
    if key is not None:
        check_key(key)
    axes = axes_to_record(input, p, training, get_axes)
    if axes is None:
        return input
    words = draw_to_record(input) if key is None else key_tensor(key)
    return record_drop(input, p, axes, words, inplace)


def make_plan(input: Tensor, rate: Rate, training: bool, get_axes: AxesOf) -> DropoutPlan | None:
    """Return the call that this is, its arguments being good; None if nothing is to be dropped."""
    if not isinstance(input, Tensor):
        raise _no_tensor(input)
    axes = get_axes(input, training)
    if not training:
        return None
    if axes == ():
        plan = DropoutPlan.for_whole(
            LIBRARY, tuple(input.shape), input.dtype, rate, rate.p > 0, "input"
        )
    else:
        plan = DropoutPlan.from_args(input, rate, broadcast_axes=axes, name="input")
    if not plan.drops:
        return None
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(TORCHSCRIPT_MESSAGE)
    return plan


def axes_to_record(
    input: Tensor, p: float, training: bool, get_axes: AxesOf
) -> Sequence[int] | None:
    """Return the axes of a call that is recorded or transformed, as `make_plan` does of others.

    The operator checks the rest, which a compiler then need not trace.
    """
    if not isinstance(input, Tensor):
        raise _no_tensor(input)
    axes = get_axes(input, training)
    if not training:
        return None
    if input.dtype not in _DROPPED:
        compute_dtype(input.dtype, "input")
    return axes if p > 0 else None


def _no_tensor(input: object) -> TypeError:
    return TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")


def no_axes(input: Tensor, training: bool) -> tuple[int, ...]:
    """Return the axes along which elementwise dropout shares its mask."""
    return ()


def drop(input: Tensor, plan: DropoutPlan, key: Key, inplace: bool) -> Tensor:
    """Drop under a key."""
    output: Tensor
    if not inplace:
        output = plan.apply(input, key)
        return output
    _check_inference(input)
    if _is_watched(input):
        # Copied by PyTorch, which then refuses what it always does, before it writes.
        return input.copy_(plan.apply(input, key))
    try:
        output = plan.run(input, key, out=input)
    except KeyboardInterrupt:
        # It is raised when all is written.
        torch.autograd.graph.increment_version(input)
        raise
    torch.autograd.graph.increment_version(input)
    return output


def record_drop(
    input: Tensor, p: float, axes: Sequence[int], words: Tensor, inplace: bool
) -> Tensor:
    """Drop under the key of a tensor of words, by an operator that is recorded or transformed."""
    output: Tensor = torch.ops.unidrop.dropout(
        input, words, constant(p), axes, random=randomness(input, words)
    )
    if not inplace:
        return output
    _check_inference(input)
    return input.copy_(output)


def _check_inference(input: Tensor) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    if input.is_inference() and not torch.is_inference_mode_enabled():
        # PyTorch would say so when it has written.
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed"
        )


def _is_watched(input: Tensor) -> bool:
    """Tell whether PyTorch is to see what is written to a tensor in place."""
    return (
        (torch.is_grad_enabled() and input.requires_grad)
        or torch.autograd.forward_ad._current_level >= 0
        or input.is_inference()
    )


def draw_to_record(input: Tensor) -> Tensor:
    """Record that a key is drawn from the default generator, and return its words."""
    randomness(input, None)  # raises before anything is drawn
    return record_draw()


def drop_drawn(input: Tensor, plan: DropoutPlan, inplace: bool) -> Tensor:
    """Drop under a key from the default generator, which a call that raises leaves as it was."""
    if not inplace:
        return drop(input, plan, as_key(draw_words()), inplace)
    state = torch.get_rng_state()
    try:
        return drop(input, plan, as_key(draw_words()), inplace)
    except RuntimeError:
        torch.set_rng_state(state)
        raise
