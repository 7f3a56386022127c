"""The dropout functions of `torch.nn.functional`, with a key and the options of the core."""

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor

from unidrop.adapters.torch.arrays import (
    LIBRARY,
    MAY_HAVE_NAMES,
    apply_eager,
    not_dense,
    write_result,
)
from unidrop.adapters.torch.buffers import PLAIN, is_tracing, must_stay, refuse_capture
from unidrop.adapters.torch.fx import call_override
from unidrop.adapters.torch.onnx import is_exporting
from unidrop.adapters.torch.operators import (
    cached_rate,
    draw_key,
    key_tensor,
    trace_draw_words,
    trace_dropout,
)
from unidrop.adapters.torch.plain import SUPPORTED_DTYPES
from unidrop.dtypes import compute_dtype
from unidrop.key import Key, check_key
from unidrop.library import get_library
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate, checked_probability
from unidrop.schedule import make_rate
from unidrop.window import Window

__all__ = [
    "TORCHSCRIPT_MESSAGE",
    "apply_plan",
    "apply_traced",
    "axes1d",
    "axes2d",
    "axes3d",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "make_plan",
    "run_plan",
    "run_with_drawn_key",
    "trace_identity",
    "traced_call_drops",
]

TORCHSCRIPT_MESSAGE = (
    "unidrop's dropout does not run in torch.jit, which PyTorch has retired and which would freeze "
    "the mask: use torch.compile or torch.export, or trace in evaluation mode"
)

T = TypeVar("T")

_Result = Tensor | tuple[Tensor, Tensor]

# Dynamo cannot trace a first lookup, so the library of these types is looked up now.
for _tensor in (torch.empty(0), torch.nn.Parameter(torch.empty(0))):
    get_library(_tensor)


@overload
def dropout(
    input: Tensor,
    p: float | Tensor = ...,
    training: bool = ...,
    inplace: bool = ...,
    *,
    key: Key | None = ...,
    broadcast_axes: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[False] = ...,
) -> Tensor: ...
@overload
def dropout(
    input: Tensor,
    p: float | Tensor = ...,
    training: bool = ...,
    inplace: bool = ...,
    *,
    key: Key | None = ...,
    broadcast_axes: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def dropout(
    input: Tensor,
    p: float | Tensor = ...,
    training: bool = ...,
    inplace: bool = ...,
    *,
    key: Key | None = ...,
    broadcast_axes: Sequence[int] = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
    broadcast_axes: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """During training, zero elements of the input with probability p and scale the others.

    Parameters
    ----------
    input : torch.Tensor
        A dense tensor of any shape and strides; a floating-point or complex dtype. The mask follows
        logical indices.
    p : int, float or 0-d torch.Tensor, default 0.5
        The probability of zeroing an element, in [0, 1]. A tensor of float32 or float64 stands for
        its exact value, and torch.compile does not recompile if that changes. On the CPU, a value
        outside [0, 1] raises an error, and on a GPU it makes the output NaN and the mask False.
    training : bool, default True
        If False, the input is returned unchanged.
    inplace : bool, default False
        If True, the output is written to the input, which is returned.
    key : unidrop.Key, optional
        The name of the mask. If None, the function draws a key from PyTorch's default CPU
        generator, which `torch.manual_seed` seeds. So a CPU and a GPU draw the same mask.
    broadcast_axes : sequence of int, default ()
        Axes along which elements share one decision, and the mask has length 1.
    global_shape, start : sequence of int, optional
        The input is the block that begins at ``start`` of a tensor of shape ``global_shape``, and
        gets exactly that block of the whole mask. Elements of start may be 0-d integer tensors;
        their values are not checked.
    return_mask : bool, default False
        If True, the mask is returned too.

    Returns
    -------
    output : torch.Tensor
        Kept elements times ``1 / (1 - p)``, with the strides of `torch.empty_like`; the input
        itself if p is 0 or training is False. The backward pass recomputes the mask from the key,
        so autograd saves no tensor.
    mask : torch.Tensor of bool
        Only with ``return_mask``: True for kept elements, with length 1 along ``broadcast_axes``.

    Raises
    ------
    TypeError
        If p is neither a number nor such a tensor, or requires a gradient, key is not a Key, or the
        input has an integer or bool dtype, is sparse or is nested.
    ValueError
        If p is outside [0, 1], an axis does not exist, the window does not fit, or key is a batch
        of keys.

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import dropout
    >>> dropout(torch.ones(6), 0.5, key=Key(42))
    tensor([2., 0., 0., 0., 0., 2.])
    >>> dropout(torch.ones(3), 0.5, key=Key(42), global_shape=(6,), start=(3,), return_mask=True)
    (tensor([0., 0., 2.]), tensor([False, False,  True]))
    """
    if not isinstance(input, Tensor):
        options = {"key": key, "global_shape": global_shape, "start": start}
        options |= {"broadcast_axes": broadcast_axes, "return_mask": return_mask}
        return call_override(dropout, input, p, training, inplace, **options)
    axes = broadcast_axes if broadcast_axes == () else _checked_axes(input, broadcast_axes)
    return _dropout(input, p, training, inplace, key, axes, global_shape, start, return_mask)


@overload
def dropout1d(
    input: Tensor,
    p: float | Tensor = ...,
    training: bool = ...,
    inplace: bool = ...,
    *,
    key: Key | None = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[False] = ...,
) -> Tensor: ...
@overload
def dropout1d(
    input: Tensor,
    p: float | Tensor = ...,
    training: bool = ...,
    inplace: bool = ...,
    *,
    key: Key | None = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def dropout1d(
    input: Tensor,
    p: float | Tensor = ...,
    training: bool = ...,
    inplace: bool = ...,
    *,
    key: Key | None = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def dropout1d(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Zero whole channels of a (N, C, L) or (C, L) input with probability p.

    Parameters, returns and errors are as in `dropout`; the mask has length 1 along L. As
    `torch.nn.functional.dropout1d`, it raises RuntimeError for an input of another rank.
    """
    if not isinstance(input, Tensor):
        options = {"key": key, "global_shape": global_shape, "start": start}
        options["return_mask"] = return_mask
        return call_override(dropout1d, input, p, training, inplace, **options)
    axes = axes1d(input, training)
    return _dropout(input, p, training, inplace, key, axes, global_shape, start, return_mask)


@overload
def dropout2d(
    input: Tensor,
    p: float | Tensor = ...,
    training: bool = ...,
    inplace: bool = ...,
    *,
    key: Key | None = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[False] = ...,
) -> Tensor: ...
@overload
def dropout2d(
    input: Tensor,
    p: float | Tensor = ...,
    training: bool = ...,
    inplace: bool = ...,
    *,
    key: Key | None = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def dropout2d(
    input: Tensor,
    p: float | Tensor = ...,
    training: bool = ...,
    inplace: bool = ...,
    *,
    key: Key | None = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def dropout2d(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Zero whole channels of a (N, C, H, W) input with probability p.

    Parameters, returns and errors are as in `dropout`; the mask has length 1 along H and W. As
    `torch.nn.functional.dropout2d`, it warns of an input of another rank, and treats a 3D input as
    (N, C, L).
    """
    if not isinstance(input, Tensor):
        options = {"key": key, "global_shape": global_shape, "start": start}
        options["return_mask"] = return_mask
        return call_override(dropout2d, input, p, training, inplace, **options)
    axes = axes2d(input, training)
    return _dropout(input, p, training, inplace, key, axes, global_shape, start, return_mask)


@overload
def dropout3d(
    input: Tensor,
    p: float | Tensor = ...,
    training: bool = ...,
    inplace: bool = ...,
    *,
    key: Key | None = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[False] = ...,
) -> Tensor: ...
@overload
def dropout3d(
    input: Tensor,
    p: float | Tensor = ...,
    training: bool = ...,
    inplace: bool = ...,
    *,
    key: Key | None = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def dropout3d(
    input: Tensor,
    p: float | Tensor = ...,
    training: bool = ...,
    inplace: bool = ...,
    *,
    key: Key | None = ...,
    global_shape: Sequence[int] | None = ...,
    start: Sequence[Any] | None = ...,
    return_mask: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def dropout3d(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Zero whole channels of a (N, C, D, H, W) or (C, D, H, W) input with probability p.

    Parameters, returns and errors are as in `dropout`; the mask has length 1 along D, H and W.
    As `torch.nn.functional.dropout3d`, it warns of an input of another rank.
    """
    if not isinstance(input, Tensor):
        options = {"key": key, "global_shape": global_shape, "start": start}
        options["return_mask"] = return_mask
        return call_override(dropout3d, input, p, training, inplace, **options)
    axes = axes3d(input, training)
    return _dropout(input, p, training, inplace, key, axes, global_shape, start, return_mask)


def axes1d(input: Tensor, training: bool) -> Sequence[int]:
    """Return the axes along which `dropout1d` shares a mask, or raise as PyTorch does."""
    rank = input.dim()
    if rank not in (2, 3):
        raise RuntimeError(f"dropout1d: Expected 2D or 3D input, but received a {rank}D input.")
    return _axes_after_channels(rank, training, batched=rank == 3)


def axes2d(input: Tensor, training: bool) -> Sequence[int]:
    """Return the axes along which `dropout2d` shares a mask, and warn as PyTorch does."""
    rank = input.dim()
    if rank == 3:
        warnings.warn(
            "dropout2d: Received a 3D input, which is interpreted as shape (N, C, L), as "
            "torch.nn.functional.dropout2d does; use dropout1d instead.",
            stacklevel=3,
        )
    elif rank != 4:
        _warn_of_rank("dropout2d", rank, "3D or 4D")
    return _axes_after_channels(rank, training, batched=True)


def axes3d(input: Tensor, training: bool) -> Sequence[int]:
    """Return the axes along which `dropout3d` shares a mask, and warn as PyTorch does."""
    rank = input.dim()
    if rank not in (4, 5):
        _warn_of_rank("dropout3d", rank, "4D or 5D")
    return _axes_after_channels(rank, training, batched=rank == 5)


def _axes_after_channels(rank: int, training: bool, *, batched: bool) -> Sequence[int]:
    """Return the axes after batch and channels, along which `feature_dropout` shares a mask."""
    first = 2 if batched else 1
    if training and rank < first:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    return range(first, rank)


def _warn_of_rank(function: str, rank: int, expected: str) -> None:
    warnings.warn(
        f"{function}: Received a {rank}-D input to {function}, which is deprecated; "
        f"it provides channel-wise dropout on {expected} inputs.",
        stacklevel=4,
    )


def _checked_axes(input: Tensor, broadcast_axes: Sequence[int]) -> Sequence[int]:
    """Return the axes counted from the first; raises as `dropout`."""
    return Window.from_args(input.shape, broadcast_axes).broadcast_axes


def _dropout(
    input: Tensor,
    p: float | Tensor,
    training: bool,
    inplace: bool,
    key: Key | None,
    axes: Sequence[int],
    global_shape: Sequence[int] | None,
    start: Sequence[Any] | None,
    return_mask: bool,
) -> _Result:
    """Run a function of this module; ``axes`` are valid, and none of them is negative."""
    if return_mask or global_shape is not None or start is not None:
        return _dropout_of_window(
            input, p, training, inplace, key, axes, global_shape, start, return_mask
        )
    if is_tracing():
        if is_exporting():
            return _dropout_of_window(input, p, training, inplace, key, axes, None, None, False)
        return _trace_whole(input, p, training, inplace, key, axes)
    if key is not None:
        check_key(key)
    plan = make_plan(input, p, training, axes)
    if plan is None:
        return input
    if key is None:
        return run_with_drawn_key(lambda key: apply_plan(input, plan, key, inplace), input, inplace)
    return apply_plan(input, plan, key, inplace)


def _trace_whole(
    input: Tensor,
    p: float | Tensor,
    training: bool,
    inplace: bool,
    key: Key | None,
    axes: Sequence[int],
) -> Tensor:
    """Run a traced call without options, and trace as little as possible."""
    if isinstance(p, Tensor):
        options = None, None, False
        output: Any = _dropout_of_window(input, p, training, inplace, key, axes, *options)
        return cast(Tensor, output)
    p = checked_probability(p)
    if key is not None:
        check_key(key)
    if not traced_call_drops(input, p, training):
        return trace_identity(input)
    words = trace_draw_words(input) if key is None else key_tensor(key, input.device)
    return apply_traced(input, p, axes, words, inplace)


def _dropout_of_window(
    input: Tensor,
    p: float | Tensor,
    training: bool,
    inplace: bool,
    key: Key | None,
    axes: Sequence[int],
    global_shape: Sequence[int] | None,
    start: Sequence[Any] | None,
    return_mask: bool,
) -> _Result:
    """Run a call with a window or a mask, whether PyTorch traces it or not."""
    rate = make_rate(p, input)
    if key is not None:
        check_key(key)
    plan = DropoutPlan.from_args(
        input,
        rate,
        training=training,
        broadcast_axes=axes,
        global_shape=global_shape,
        start=start,
        name="input",
    )
    return run_plan(plan, input, key, inplace, return_mask)


def run_plan(
    plan: DropoutPlan, input: Tensor, key: Key | None, inplace: bool, return_mask: bool
) -> _Result:
    """Run a plan, whether PyTorch traces the call or not; draws a key if there is none."""
    if not plan.drops:
        return (input, plan.ones(input)) if return_mask else input
    if is_tracing():
        if key is None:
            key = Key._from_raw_words(trace_draw_words(input))
    elif torch._C._get_tracing_state() is not None:
        raise RuntimeError(TORCHSCRIPT_MESSAGE)

    def call(key: Key) -> _Result:
        mask = plan.mask(input, key) if return_mask else None
        output = _write(input, plan, key, mask) if inplace else plan.apply(input, key, mask)
        return output if mask is None else (output, mask)

    return run_with_drawn_key(call, input, inplace) if key is None else call(key)


@lru_cache(maxsize=1024)
def _make_plain_plan(
    shape: torch.Size, dtype: torch.dtype, p: float, axes: Sequence[int]
) -> DropoutPlan:
    """Return the plan of a dense tensor; a short key makes the lookup fast."""
    compute_dtype(dtype, "input")
    window = Window.from_args(tuple(shape), tuple(axes))
    return DropoutPlan(LIBRARY, window, Rate.from_p(p), p > 0)


def make_plan(
    input: Tensor, p: float | Tensor, training: bool, axes: Sequence[int]
) -> DropoutPlan | None:
    """Return the plan of a call that is not traced, or None if the call drops nothing."""
    is_plain = has_plain_plan = type(input) in PLAIN
    if type(p) is float:
        rate = cached_rate(p)
    else:
        rate = make_rate(p, input)
        has_plain_plan = is_plain and not rate.is_scheduled
    if not is_plain:
        get_library(input, "input")  # checks the type
    if input.layout is not torch.strided or input.is_nested or MAY_HAVE_NAMES:
        LIBRARY.arrays.check(input, "input")
    if not training:
        return None
    if has_plain_plan:
        plan = _make_plain_plan(input.shape, input.dtype, rate.p, axes)
    else:
        plan = DropoutPlan.from_args(input, rate, broadcast_axes=axes, name="input")
    if not plan.drops:
        return None
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(TORCHSCRIPT_MESSAGE)
    return plan


def traced_call_drops(input: Tensor, p: float, training: bool) -> bool:
    """Return whether a traced call drops anything; raises as `make_plan`.

    The operator checks the remaining arguments when it runs, so a compiler need not trace the
    checks.
    """
    if input.layout is not torch.strided or input.is_nested:
        raise not_dense(input, "input")
    if type(input) not in PLAIN:
        LIBRARY.arrays.check_type(type(input), "input")
    if not training:
        return False
    if input.dtype not in SUPPORTED_DTYPES:
        compute_dtype(input.dtype, "input")
    return p > 0


def trace_identity(input: Tensor) -> Tensor:
    """Return the input, by an operator if Dynamo traces the call.

    A branch of `torch.cond` must not return its input. Compilers remove the operator.
    """
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        return torch.nn.functional.dropout(input, training=False)
    return input


def apply_plan(input: Tensor, plan: DropoutPlan, key: Key, inplace: bool) -> Tensor:
    """Return dropout under a key, in a call that is not traced."""
    if inplace:
        return _write(input, plan, key, None)
    output: Tensor = apply_eager(input, key, plan)
    return output


def run_with_drawn_key(call: Callable[[Key], T], input: Tensor, inplace: bool) -> T:
    """Return ``call(key)`` for a key from the default generator.

    In place, PyTorch may refuse to write to the input. The generator then keeps its state.
    """
    if must_stay(input):
        refuse_capture(input.device)
    if not inplace:
        return call(draw_key())
    state = torch.get_rng_state()
    try:
        return call(draw_key())
    except RuntimeError:
        torch.set_rng_state(state)
        raise


def _write(input: Tensor, plan: DropoutPlan, key: Key, mask: Tensor | None) -> Tensor:
    """Write dropout over the input, and return it."""
    _check_inference(input)
    if is_tracing() or _is_observed(input):
        if not is_tracing() and type(plan) is DropoutPlan and _is_result(input):
            return write_result(input, key, plan, mask)
        # PyTorch refuses to write to some tensors, and does so before copy_ writes.
        return input.copy_(plan.apply(input, key, mask))
    try:
        plan.run(input, key, mask, out=input)
    except KeyboardInterrupt:
        # Kernels raise it after they have written the whole input.
        torch.autograd.graph.increment_version(input)
        raise
    torch.autograd.graph.increment_version(input)
    return input


def apply_traced(
    input: Tensor, p: float, axes: Sequence[int], words: Tensor, inplace: bool
) -> Tensor:
    """Return dropout under the key in a tensor of words, as one operator of a trace."""
    output = trace_dropout(input, words, p, axes)
    if not inplace:
        return output
    _check_inference(input)
    return input.copy_(output)


def _check_inference(input: Tensor) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    if input.is_inference() and not torch.is_inference_mode_enabled():
        # PyTorch raises the same error, but after it has written to the input.
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed"
        )


def _is_result(input: Tensor) -> bool:
    """Return whether autograd alone observes a tensor, and lets a call write to it."""
    return (
        (torch.is_grad_enabled() and input.requires_grad)
        and not input.is_leaf
        and not input._is_view()
        and not input.is_inference()
        and torch.autograd.forward_ad._current_level < 0
    )


def _is_observed(input: Tensor) -> bool:
    """Return whether PyTorch must see what is written to a tensor in place."""
    return (
        (torch.is_grad_enabled() and input.requires_grad)
        or torch.autograd.forward_ad._current_level >= 0
        or input.is_inference()
    )
