"""The operators ``torch.ops.unidrop``, as which compilers and exporters of PyTorch trace dropout.

Requirements this design meets:

* Dropout is one operator with a key. So a compiler saves the key for the backward pass, not a mask,
  and compiles no arithmetic on words. The operator chooses the path of its tensor when it runs.
* An operator with an effect, to advance a call number or to draw from the generator, declares that
  it writes to a tensor. So compilers neither remove nor merge nor reorder such operators.
* Compilers never recompute such an operator under activation checkpointing: they save its output.

A key is an int64 tensor ``[lo, hi]``. In a trace it is on the device of the tensor that it drops
elements of, so that a CUDA graph may contain the operator: it reads nothing from the CPU. Operators
that do read the CPU have a tag that keeps them out of CUDA graphs.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from unidrop.adapters.calls import run_exclusively
from unidrop.adapters.torch import inductor
from unidrop.adapters.torch.buffers import (
    BUFFERS,
    as_int64,
    is_tracing,
    must_stay,
    refuse_capture,
    to_device,
)
from unidrop.adapters.torch.checkpoint import CheckpointLog, current_log
from unidrop.adapters.torch.func import is_functionalizing, randomness
from unidrop.adapters.torch.plain import SUPPORTED_DTYPES, run_plain
from unidrop.adapters.torch.state import add_calls, advance, get_number
from unidrop.dispatch import get_device_kernels
from unidrop.dtypes import integer_bits
from unidrop.gaussian import NormalPlan
from unidrop.key import Key
from unidrop.mask import keep_mask
from unidrop.permutation import permutation
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.schedule import ScheduledRate, make_rate
from unidrop.words import MASK32
from unidrop.zoneout import ComplementPlan

__all__ = [
    "as_constant",
    "as_key",
    "cached_rate",
    "draw_key",
    "fold_on_device",
    "get_rate",
    "int_tensor",
    "key_tensor",
    "next_call_number",
    "next_call_words",
    "own_scale",
    "pack_words",
    "rate_argument",
    "read_start",
    "rollback_call",
    "trace_call_key",
    "trace_draw_words",
    "trace_dropout",
    "uncount",
]

# The operator that draws a key declares that it writes to this tensor, which orders the draws.
_DRAW_ORDER = torch.zeros((), dtype=torch.int64)

# Tensors to draw words into; an operation that makes a new one takes longer than the draw.
_DRAWN: list[tuple[Tensor, memoryview]] = []

# The rate of a float. Dynamo warns about caches, so only calls that it does not trace use this one.
cached_rate = lru_cache(maxsize=256)(Rate.from_p)

_CPU = torch.device("cpu")

_get_dispatch_mode = torch._C._get_dispatch_mode
_DispatchMode = torch._C._TorchDispatchModeKey
_DispatchKey = torch._C.DispatchKey

# An operator that reads the CPU would read it once, at the capture. PyTorch 2.6 lacks the tag.
_READS_CPU = [tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) is not None else []

_library = torch.library.Library("unidrop", "DEF")
_library.define(
    "dropout(Tensor x, Tensor key, float p, int[] broadcast_axes, SymInt[]? global_shape=None, "
    "Tensor? start=None, Tensor? random=None, float? scale=None, float[]? normal=None, "
    "Tensor? rate=None, bool complement=False) -> Tensor"
)
_library.define(
    "keep_mask(Tensor key, float p, SymInt[] shape, int[] broadcast_axes, "
    "SymInt[]? global_shape=None, Tensor? start=None, *, Device device, Tensor? rate=None) "
    "-> Tensor"
)
_library.define(
    "permutation(Tensor key, SymInt[] shape, SymInt[]? global_shape=None, Tensor? start=None, "
    "Tensor? random=None, *, Device device) -> Tensor"
)
_library.define("integers(SymInt[] values, *, Device device) -> Tensor", tags=_READS_CPU)
_library.define("stack_integers(Tensor[] values) -> Tensor")
_library.define("pack_key(Tensor lo, Tensor hi) -> Tensor")
_library.define("fold_in(Tensor key, Tensor data, int tag=1) -> Tensor")
_library.define("copy_rate(Tensor rate) -> Tensor")
_library.define("next_call(Tensor(a!) calls) -> Tensor")
_library.define("call_key(Tensor(a!) calls, Tensor key, Tensor? rate=None) -> Tensor")
_library.define("draw_key(Tensor(a!) order, *, Device device) -> Tensor", tags=_READS_CPU)


def key_tensor(key: Key, device: torch.device = _CPU) -> Tensor:
    """Return the words of a key as a tensor on a device."""
    return pack_words(key._words, device)


def pack_words(words: Any, device: torch.device) -> Tensor:
    """Return ``(lo, hi)`` as a tensor on a device; words may be a tensor of both."""
    return move(words, device) if isinstance(words, Tensor) else int_tensor(words, device)


def move(numbers: Tensor, device: torch.device) -> Tensor:
    """Move numbers to a device, unless the trace of an export would then name the device."""
    if numbers.device == device or torch.compiler.is_exporting():
        return numbers
    return numbers.to(device)


def int_tensor(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Return integers, or 0-d tensors of them, as one tensor on a device."""
    if torch.compiler.is_dynamo_compiling():
        return _trace_int_tensor(numbers, device)
    if any(isinstance(n, Tensor) for n in numbers):
        return torch.stack([_as_scalar(n, device) for n in numbers])
    return to_device(torch.tensor(numbers, dtype=torch.int64, device="cpu"), device)


def _as_scalar(number: Any, device: torch.device) -> Tensor:
    """Return an integer as a 0-d tensor; unlike a copy from the CPU, a fill waits for nothing."""
    if isinstance(number, Tensor):
        return number.to(device, torch.int64)
    return torch.full((), number, dtype=torch.int64, device=device)


def _trace_int_tensor(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Run `int_tensor` by operators, because compilers generate no kernels for them."""
    ops = torch.ops.unidrop
    if not any(isinstance(n, Tensor) for n in numbers):
        integers: Tensor = ops.integers(numbers, device=device)
        return integers
    stack: Tensor = ops.stack_integers(
        [
            n.to(device) if isinstance(n, Tensor) else ops.integers([n], device=device).reshape(())
            for n in numbers
        ]
    )
    return stack


def trace_dropout(
    x: Tensor,
    words: Tensor,
    p: float | Tensor,
    broadcast_axes: Sequence[int],
    global_shape: Sequence[int] | None = None,
    start: Tensor | None = None,
    *,
    scale: float | None = None,
    normal: Sequence[float] | None = None,
    complement: bool = False,
) -> Tensor:
    """Return dropout under the key in a tensor of words, as one operator of a trace.

    ``scale`` is the scale of kept elements if it is not the one of p. ``normal`` is the mean and
    the standard deviation of normal factors, if those replace the mask. With ``complement``, the
    output has what dropout drops, and zeros elsewhere.
    """
    number, rate = (0.0, p) if isinstance(p, Tensor) else (as_constant(p), None)
    output: Tensor = torch.ops.unidrop.dropout(
        x,
        move(words, x.device),
        number,
        broadcast_axes,
        global_shape,
        start,
        random=randomness(x, words),
        scale=None if scale is None else as_constant(scale),
        normal=None if normal is None else [as_constant(number) for number in normal],
        rate=rate,
        complement=complement,
    )
    return output


def as_constant(p: float) -> float:
    """Return a rate as a compile-time constant, so that torch.compile recompiles if it changes.

    Dynamo treats a float that has changed as a variable. Inductor then freezes the first value in
    the arguments of an operator inside a checkpointed region.
    """
    return float.fromhex(p.hex())


def own_scale(rate: Rate) -> float | None:
    """Return the scale of a rate, or None if it is the one of its p."""
    if rate.is_scheduled:
        return rate.scale
    return None if rate == Rate.from_p(rate.p) else rate.scale


def rate_argument(rate: Rate) -> float | Tensor:
    """Return p for an operator: a number, or the tensor of a scheduled rate.

    A compiled program gets a copy that it saves. The user may set the rate of the next call before
    the backward pass of this one.
    """
    if not isinstance(rate, ScheduledRate):
        return rate.p
    array: Tensor = rate.array
    if torch.compiler.is_dynamo_compiling() and not torch._C._are_functorch_transforms_active():
        array = torch.ops.unidrop.copy_rate(array)
    return array


def get_rate(p: float, scale: float | None) -> Rate:
    """Return the rate of the arguments of an operator."""
    rate = cached_rate(p)
    return rate if scale is None else rate.with_scale(scale)


def as_key(words: Tensor) -> Key:
    """Return the key of a tensor of words, with a value if reading it waits for no device."""
    if must_stay(words):
        return Key._from_raw_words(words)
    lo, hi = words.tolist()
    return Key._from_raw_words((lo & MASK32, hi & MASK32))


def next_call_number(calls: Tensor, log: CheckpointLog | None, *, read: bool = True) -> Any:
    """Return a call number and advance it; a recomputation replays the original number.

    The number is a tensor if it is not to be read, or if reading it would wait for a device. The
    caller uses `run_exclusively`.
    """
    number: Any
    if log is not None and log.replays:
        number = log.replay()
        # The layer was on another device then, and `next_call_words` took the number.
        return number[2] if isinstance(number, Tensor) and number.shape == (3,) else number
    if read and calls.is_cpu and calls.dim() == 1:
        number = advance(calls)
    else:
        number = get_number(calls).clone()
        add_calls(calls, 1)
    if log is not None:
        log.append(number)
    return number


def rollback_call(number: Any, calls: Tensor, log: CheckpointLog | None) -> None:
    """Undo `next_call_number` for a call that raised, unless a later number was taken."""
    if log is None or not log.replays:
        is_last = get_number(calls) == number + 1
        add_calls(calls, -is_last.to(torch.int64))
    if log is not None:
        log.rollback()


def next_call_words(calls: Tensor, key: Tensor, log: CheckpointLog | None) -> Tensor:
    """Run `next_call_number` on a device, and return ``[lo, hi, number]``: the call's key too.

    Nothing waits for the device, and a CUDA graph that contains this advances the number at each
    replay.
    """
    if log is not None and log.replays:
        replayed = log.replay()
        if isinstance(replayed, Tensor) and replayed.shape == (3,):
            return replayed
        # The layer was on the CPU then.
        return _fold_number(calls, key, as_int64(replayed, calls.device))
    package = get_device_kernels(BUFFERS, calls)
    if package is not None and calls.shape == (2,) and calls.is_contiguous():
        taken = torch.empty((3,), dtype=torch.int64, device=calls.device)
        with BUFFERS.use_device(calls):
            package.next_key(calls, key.to(calls.device).contiguous(), taken)
    else:
        taken = _fold_number(calls, key, next_call_number(calls, None, read=False))
    if log is not None:
        log.append(taken)
    return taken


def _fold_number(calls: Tensor, key: Tensor, number: Tensor) -> Tensor:
    """Return ``[lo, hi, number]`` by PyTorch's operations, or by the kernel that folds."""
    lo, hi = Key._from_raw_words(key.to(calls.device)).fold_in(number).words
    return torch.stack([lo, hi, number])


def fold_on_device(words: Any, data: Tensor, tag: int) -> Tensor | None:
    """Return the words of a key after folding in a step on a GPU, or None if no kernel can."""
    package = get_device_kernels(BUFFERS, data)
    if package is None:
        return None
    folded = torch.empty((2,), dtype=torch.int64, device=data.device)
    gathered: Any = BUFFERS.gather(words, data)
    if gathered is None:
        lo, hi = words.tolist() if isinstance(words, Tensor) else map(int, words)
        gathered = lo & MASK32, hi & MASK32
    with BUFFERS.use_device(data):
        package.fold_in(gathered, as_int64(data, data.device), tag, folded)
    return folded


def draw_words() -> Tensor:
    """Draw the words of a key from the default generator, on the CPU: no device waits for them.

    A recomputation replays the original words, but draws too: `torch.utils.checkpoint` may have
    restored the generator's state, and later draws must find the generator advanced.
    """
    words: Tensor = _generate_words()
    log = current_log()
    if log is not None and log.replays:
        words = log.replay()  # what was appended below
    elif log is not None:
        log.append(words)
    return words


def draw_key() -> Key:
    """Draw a key as `draw_words` does, for a call that is not traced."""
    if current_log() is not None:
        return as_key(draw_words())
    # A thread or a signal handler that draws meanwhile takes another tensor.
    drawn = _DRAWN.pop() if _DRAWN else _make_drawn()
    words, view = drawn
    words.random_(1 << 32)
    key = Key._from_raw_words((view[0], view[1]))
    _DRAWN.append(drawn)
    return key


def _make_drawn() -> tuple[Tensor, memoryview]:
    """Return a tensor to draw words into, and a view that reads them without an operation."""
    with torch.inference_mode(False):
        words = torch.empty((2,), dtype=torch.int64, device="cpu")
        array: Any = words.numpy()
        return words, memoryview(array)


def trace_draw_words(x: Tensor) -> Tensor:
    """Run `draw_words` as one operator of the trace that x belongs to.

    torch.export accepts no state beyond the module's, and a FakeTensorMode accepts no real tensor.
    Both preserve the order of random operations, so they trace `torch.randint` instead.
    """
    randomness(x, None)  # raises before anything is drawn
    if is_functionalizing():
        return draw_words()
    if torch.compiler.is_exporting():
        return _generate_words()
    if (
        not torch.compiler.is_dynamo_compiling()
        and _get_dispatch_mode(_DispatchMode.FAKE) is not None
    ):
        return _generate_words()
    words: Tensor = torch.ops.unidrop.draw_key(_DRAW_ORDER, device=x.device)
    return words


def _generate_words() -> Tensor:
    return torch.randint(1 << 32, (2,), dtype=torch.int64, device="cpu")


def uncount(calls: Tensor, rate: Tensor) -> None:
    """Take back the number of a call whose rate is 0, without reading the rate."""
    add_calls(calls, -(rate == 0).to(calls.device, torch.int64))


def trace_call_key(calls: Tensor, words: Tensor, rate: Tensor | None = None) -> Tensor:
    """Advance a call number in a trace, and return the words of the key of the call.

    One operator does both, on the device of the call number. `torch.func.functionalize` accepts no
    operator that advances a number, so there PyTorch's own does. A call does not count if its
    ``rate``, a scheduled one, is 0.
    """
    folded: Tensor
    words = move(words, calls.device)
    if is_functionalizing():
        is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(calls)
        # torch.func refuses to advance a tensor that the function does not receive.
        with nullcontext() if is_wrapped else torch._C._DisableFuncTorch():
            is_observed = is_wrapped or torch._C._len_torch_dispatch_stack() > 0
            take = partial(next_call_number, read=not is_observed)
            taken = run_exclusively(calls, take, calls, current_log())
            if rate is not None:
                uncount(calls, rate)
        folded = torch.ops.unidrop.fold_in(words, torch.as_tensor(taken))
    else:
        folded = torch.ops.unidrop.call_key(calls, words, rate)
    return folded


@_disable_dynamo
def _dropout(
    x: Tensor,
    key: Tensor,
    p: float,
    broadcast_axes: Sequence[int],
    global_shape: Sequence[int] | None = None,
    start: Tensor | None = None,
    random: Tensor | None = None,
    scale: float | None = None,
    normal: Sequence[float] | None = None,
    rate: Tensor | None = None,
    complement: bool = False,
) -> Tensor:
    if rate is None:
        one_rate = get_rate(p, scale)
    else:
        one_rate = make_rate(rate.detach(), x)
        one_rate = one_rate if scale is None else one_rate.with_scale(scale)
    plan = DropoutPlan.from_args(
        x,
        one_rate,
        broadcast_axes=tuple(broadcast_axes),
        global_shape=global_shape,
        start=read_start(start),
    )
    if normal is not None:
        plan = NormalPlan.from_plan(plan, *normal)
    if complement:
        plan = ComplementPlan.from_plan(plan)
    if not (must_stay(key) and (start is None or must_stay(start))):
        refuse_capture(x.device)
    if not plan.drops:  # the present value of a scheduled rate is 0
        return x.clone()
    output: Tensor = plan.apply(x, as_key(key))
    return output


@_disable_dynamo
def _keep_mask(
    key: Tensor,
    p: float,
    shape: Sequence[int],
    broadcast_axes: Sequence[int],
    global_shape: Sequence[int] | None = None,
    start: Tensor | None = None,
    *,
    device: torch.device,
    rate: Tensor | None = None,
) -> Tensor:
    mask: Tensor = keep_mask(
        shape,
        p if rate is None else rate.detach(),
        as_key(key),
        xp=torch,
        device=device,
        broadcast_axes=broadcast_axes,
        global_shape=global_shape,
        start=read_start(start),
    )
    return mask


@_disable_dynamo
def _permutation(
    key: Tensor,
    shape: Sequence[int],
    global_shape: Sequence[int] | None = None,
    start: Tensor | None = None,
    random: Tensor | None = None,
    *,
    device: torch.device,
) -> Tensor:
    options: dict[str, Any] = {"global_shape": global_shape, "start": read_start(start)}
    permuted: Tensor = permutation(shape, as_key(key), xp=torch, device=device, **options)
    return permuted


def read_start(start: Tensor | None) -> Sequence[Any] | None:
    """Return the start of a window: as integers if reading them waits for no device."""
    if start is None:
        return None
    starts: Sequence[Any] = start.unbind() if must_stay(start) else start.tolist()
    return starts


@_disable_dynamo
def _integers(values: Sequence[int], *, device: torch.device) -> Tensor:
    return to_device(_to_tensor(values), device)


@_disable_dynamo
def _stack_integers(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.to(torch.int64) for value in values])


@_disable_dynamo
def _pack_key(lo: Tensor, hi: Tensor) -> Tensor:
    """Return the low 32 bits of each word; the words of a batch of keys are on the last axis."""
    return torch.stack([_low_bits(lo), _low_bits(hi).to(lo.device)], -1)


def _low_bits(word: Tensor) -> Tensor:
    """Return the low 32 bits of integers, zero-extended from their width."""
    bits = integer_bits(word.dtype)
    assert bits is not None  # `Words.width` rejects other dtypes
    return word.to(torch.int64) & MASK32 & ((1 << bits) - 1)


@_disable_dynamo
def _fold_in(key: Tensor, data: Tensor, tag: int = 1) -> Tensor:
    bits = integer_bits(data.dtype)
    assert bits is not None  # `Words.width` rejects other dtypes
    if must_stay(data):
        folded = fold_on_device(key.to(data.device), data, tag)
        if folded is None:
            folded = key_tensor(as_key(key.to(data.device))._fold(data, tag), data.device)
        return folded
    refuse_capture(key.device)
    # Zero-extend from the width, so that negative steps and steps of uint64 are valid too.
    return _to_words(as_key(key)._fold(int(data.item()) & ((1 << bits) - 1), tag))


@_disable_dynamo
def _next_call(calls: Tensor) -> Tensor:
    number = run_exclusively(calls, next_call_number, calls, current_log())
    return number.clone() if isinstance(number, Tensor) else torch.tensor(number)


@_disable_dynamo
def _call_key(calls: Tensor, key: Tensor, rate: Tensor | None = None) -> Tensor:
    if rate is not None and not must_stay(rate) and Rate.from_p(rate.item()).p == 0:
        return key.clone()  # nothing is dropped, and no call is counted
    if must_stay(calls):
        log = current_log()
        taken = run_exclusively(calls, next_call_words, calls, key, log)
        if rate is not None and must_stay(rate) and (log is None or not log.replays):
            uncount(calls, rate)
        # A compiler may reuse the memory of the output, but a recomputation needs the log.
        return taken[:2] if log is None else taken[:2].clone()
    number = run_exclusively(calls, next_call_number, calls, current_log())
    return _to_words(as_key(key).fold_in(int(number)))


@_disable_dynamo
def _draw_key(order: Tensor, *, device: torch.device) -> Tensor:
    refuse_capture(device)
    return to_device(_to_words(draw_key()), device)


def _to_words(key: Key) -> Tensor:
    """Return the words of a key as a new tensor, inside an operator."""
    return key_tensor(key) if key.is_traced else _to_tensor(key._words)


def _to_tensor(integers: Sequence[int]) -> Tensor:
    """Return integers as a tensor, inside an operator; `torch.tensor` takes three times as long."""
    return torch.from_numpy(np.array(integers, dtype=np.int64))


class _Dropout(torch.autograd.function._SingleLevelFunction):
    """The gradient of the operator: the operator on the upstream gradient, under the same key.

    It serves one level of `torch.func`; PyTorch's dispatcher applies it to each level.
    """

    @staticmethod
    def forward(ctx: Any, keyset: Any, x: Tensor, key: Tensor, *rest: Any) -> Tensor:
        p, axes, global_shape, start, random, *ctx.options, rate, complement = _with_defaults(*rest)
        ctx.save_for_backward(key, start, random, rate)
        ctx.save_for_forward(key, start, random, rate)
        ctx.constants, ctx.complement = (p, axes, global_shape), complement
        operator = torch.ops.unidrop.dropout.default
        if not torch._C._are_functorch_transforms_active():
            return _below_autograd(operator, keyset, x, key, *rest)
        # Levels below this one differentiate too.
        with torch.enable_grad(), _set_fwd_grad_enabled(True):
            return _below_autograd(operator, keyset, x, key, *rest)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, _Dropout.recompute(ctx, upstream), *(None,) * 10

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        # Dropout is a product with a diagonal matrix, which is its own transpose.
        return _Dropout.recompute(ctx, tangents[1])

    @staticmethod
    def recompute(ctx: Any, x: Tensor) -> Tensor:
        key, start, random, rate = ctx.saved_tensors
        constants = *ctx.constants, start, random, *ctx.options, rate, ctx.complement
        output: Tensor = torch.ops.unidrop.dropout(x, key, *constants)
        return output


def _with_defaults(
    p: float,
    axes: Sequence[int],
    global_shape: Sequence[int] | None = None,
    start: Tensor | None = None,
    random: Tensor | None = None,
    scale: float | None = None,
    normal: Sequence[float] | None = None,
    rate: Tensor | None = None,
    complement: bool = False,
) -> tuple[Any, ...]:
    """Return the operator's arguments, including the defaults that the dispatcher omits."""
    return p, axes, global_shape, start, random, scale, normal, rate, complement


def _below_autograd(operator: Any, keyset: Any, *arguments: Any, **options: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        keys = keyset & torch._C._after_autograd_keyset
        output: Tensor = operator.redispatch(keys, *arguments, **options)
    return output


@_disable_dynamo
def _differentiate_dropout(keyset: Any, x: Tensor, *rest: Any) -> Tensor:
    """Run the operator as an autograd function, if PyTorch records gradients."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        # Two more visits of the dispatcher would lead to the same kernel.
        plain = _run_plain(x, *rest)
        if plain is not None:
            return plain
    if not (torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled()):
        return _below_autograd(torch.ops.unidrop.dropout.default, keyset, x, *rest)
    with enable_single_level_autograd_function():
        output: Tensor = _Dropout.apply(keyset, x, *rest)  # type: ignore[attr-defined] # made in C
    return output


def _run_plain(
    x: Tensor,
    key: Tensor,
    p: float,
    axes: Sequence[int],
    global_shape: Sequence[int] | None = None,
    start: Tensor | None = None,
    random: Tensor | None = None,
    scale: float | None = None,
    normal: Sequence[float] | None = None,
    rate: Tensor | None = None,
    complement: bool = False,
) -> Tensor | None:
    """Return the output of the operator by `run_plain`, or None if it does not serve x."""
    if rate is not None or normal is not None:
        return None
    if axes or global_shape is not None or x.dtype not in SUPPORTED_DTYPES:
        return None
    if complement or type(key) is not Tensor or is_tracing():
        return None
    return run_plain(x, get_rate(p, scale), as_key(key)._words)


def _batch_dropout(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    key: Tensor,
    p: float,
    axes: Sequence[int],
    global_shape: Sequence[int] | None = None,
    start: Tensor | None = None,
    random: Tensor | None = None,
    scale: float | None = None,
    normal: Sequence[float] | None = None,
    rate: Tensor | None = None,
    complement: bool = False,
) -> tuple[Tensor, int]:
    """Run the operator for a batch, with the mask that `unidrop.adapters.torch.func` describes."""
    names = ["x", "key", "p", "axes", "global_shape", "start", "random", "scale", "normal", "rate"]
    dims = dict(zip(names, in_dims, strict=False))
    count = info.batch_size
    x = x.expand(count, *x.shape) if dims["x"] is None else x.movedim(dims["x"], 0)
    if any(dims.get(name) is not None for name in ("key", "start", "rate")):
        keys, starts, rates = (
            [tensor] * count
            if tensor is None or dims.get(name) is None
            else tensor.movedim(dims[name], 0).unbind()
            for name, tensor in (("key", key), ("start", start), ("rate", rate))
        )
        each = [
            torch.ops.unidrop.dropout(
                x_i,
                key_i,
                p,
                axes,
                global_shape,
                start_i,
                random,
                scale,
                normal,
                rate_i,
                complement,
            )
            for x_i, key_i, start_i, rate_i in zip(x.unbind(), keys, starts, rates, strict=True)
        ]
        return torch.stack(each), 0
    is_shared = dims.get("random") is None
    axes = [*([0] if is_shared else []), *(axis + 1 for axis in axes)]
    if global_shape is not None and start is not None:
        global_shape = [count, *global_shape]
        start = torch.cat([start.new_zeros(1), start])
    if random is not None and not is_shared:
        random = random.select(dims["random"], 0)
    arguments = p, axes, global_shape, start, random, scale, normal, rate, complement
    return torch.ops.unidrop.dropout(x, key, *arguments), 0


def _batch_permutation(
    info: Any,
    in_dims: tuple[Any, ...],
    key: Tensor,
    shape: Sequence[int],
    global_shape: Sequence[int] | None = None,
    start: Tensor | None = None,
    random: Tensor | None = None,
    *,
    device: torch.device,
) -> tuple[Tensor, int]:
    """Run the operator for a batch, as `_batch_dropout` does."""
    names = ("key", "shape", "global_shape", "start", "random")
    dims = dict(zip(names, in_dims, strict=False))
    if random is not None and dims.get("random") is not None:
        random = random.select(dims["random"], 0)
    count, start_dim = info.batch_size, dims.get("start")
    if dims["key"] is None and start_dim is None:
        # Examples are different, because `random` alone is a batch.
        if global_shape is not None and start is not None:
            global_shape = [count, *global_shape]
            start = torch.cat([start.new_zeros(1), start])
        arguments = [count, *shape], global_shape, start, random
        return torch.ops.unidrop.permutation(key, *arguments, device=device), 0
    keys, starts = (
        [tensor] * count if tensor is None or dim is None else tensor.movedim(dim, 0).unbind()
        for tensor, dim in ((key, dims["key"]), (start, start_dim))
    )
    pairs = zip(keys, starts, strict=True)
    draw = partial(torch.ops.unidrop.permutation, device=device)
    return torch.stack([draw(k, shape, global_shape, s, random) for k, s in pairs]), 0


def _make_saved_kernel(name: str) -> Any:
    """Return an autograd kernel of an operator whose output compilers save, not recompute."""

    @_disable_dynamo
    def kernel(keyset: Any, state: Tensor, *key: Tensor | None, **options: Any) -> Tensor:
        tensors = [tensor for tensor in (state, *key) if tensor is not None]
        if not is_tracing() and all(type(t) is Tensor and not t.is_meta for t in tensors):
            # Two more visits of the dispatcher would lead to the same function.
            return _EAGER[name](state, *key, **options)
        operator = getattr(torch.ops.unidrop, name).default
        traced: Any = _get_dispatch_mode(_DispatchMode.PROXY)
        before = 0 if traced is None else len(traced.tracer.graph.nodes)
        output = _below_autograd(operator, keyset, state, *key, **options)
        if traced is not None:
            # Activation checkpointing has marked these nodes for recomputation.
            for node in list(traced.tracer.graph.nodes)[before:]:
                node.meta.pop("recompute", None)
        return output

    return kernel


def _refuse_branch(*arguments: Any, **options: Any) -> Tensor:
    """Raise, because a branch of a compiled graph advances neither a call number nor a generator.

    PyTorch raises its own error for the bodies of compiled loops.
    """
    raise RuntimeError(
        "a Dropout that counts calls or draws keys cannot run in torch.cond of a compiled graph: "
        "use the function with a key, unidrop.adapters.torch.dropout(x, p, key=key)"
    )


def _batch_next_call(info: Any, in_dims: tuple[int], calls: Tensor) -> tuple[Tensor, int]:
    """Advance a batch of call numbers, as `torch.func.stack_module_state` makes it."""
    return torch.ops.unidrop.next_call(calls.movedim(in_dims[0], 0)), 0


def _batch_call_key(
    info: Any, in_dims: tuple[Any, ...], calls: Tensor, key: Tensor, rate: Tensor | None = None
) -> tuple[Tensor, int]:
    """Advance a batch of call numbers, and fold them into a key, or into a batch of keys."""
    numbers, _ = _batch_next_call(info, in_dims[:1], calls)
    if rate is not None:
        uncount(calls.movedim(in_dims[0], 0), rate)
    return _batch_fold_in(info, (in_dims[1], 0), key, numbers)


def _batch_pack_key(
    info: Any, in_dims: tuple[int | None, int | None], lo: Tensor, hi: Tensor
) -> tuple[Tensor, int]:
    """Pack a batch of keys: each word is a number, or one number per example."""
    lo, hi = (
        word.expand(info.batch_size, *word.shape) if dim is None else word.movedim(dim, 0)
        for word, dim in zip((lo, hi), in_dims, strict=True)
    )
    return torch.ops.unidrop.pack_key(lo, hi), 0


def _batch_fold_in(
    info: Any, in_dims: tuple[int | None, ...], key: Tensor, data: Tensor, tag: int = 1
) -> tuple[Tensor, int]:
    """Fold a batch of numbers into a batch of keys, one by one."""
    keys, numbers = (
        [tensor] * info.batch_size if dim is None else tensor.movedim(dim, 0).unbind()
        for tensor, dim in zip((key, data), in_dims[:2], strict=True)
    )
    folded = [torch.ops.unidrop.fold_in(k, n, tag) for k, n in zip(keys, numbers, strict=True)]
    return torch.stack(folded), 0


def _fake_dropout(x: Tensor, *_: Any, **random: Any) -> Tensor:
    """Return an output without values; compilers call this for each node before they lower it."""
    inductor.register(x.device)
    return torch.empty_like(x)


_EAGER: dict[str, Callable[..., Tensor]] = {
    "dropout": _dropout,
    "keep_mask": _keep_mask,
    "permutation": _permutation,
    "integers": _integers,
    "stack_integers": _stack_integers,
    "pack_key": _pack_key,
    "fold_in": _fold_in,
    "copy_rate": torch.clone,
    "next_call": _next_call,
    "call_key": _call_key,
    "draw_key": _draw_key,
}
_FAKE: dict[str, Callable[..., Tensor]] = {
    "dropout": _fake_dropout,
    "keep_mask": lambda key, p, shape, *_, device, rate=None: torch.empty(
        shape, dtype=torch.bool, device=device
    ),
    "permutation": lambda key, shape, *_, device: torch.empty(
        shape, dtype=torch.int64, device=device
    ),
    "integers": lambda values, *, device: torch.empty(
        (len(values),), dtype=torch.int64, device=device
    ),
    "stack_integers": lambda values: values[0].new_empty((len(values),), dtype=torch.int64),
    "pack_key": lambda lo, hi: lo.new_empty((*lo.shape, 2), dtype=torch.int64),
    "fold_in": lambda key, data, tag=1: torch.empty_like(key),
    "copy_rate": torch.empty_like,
    "next_call": lambda calls: torch.empty_like(calls[..., 0]),
    "call_key": lambda calls, key, rate=None: torch.empty_like(key),
    "draw_key": lambda order, *, device: torch.empty((2,), dtype=torch.int64, device=device),
}
for _name, _function in _EAGER.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")
for _name, _fake in _FAKE.items():
    torch.library.register_fake(f"unidrop::{_name}", _fake, lib=_library)
_library.impl("copy_rate", _make_saved_kernel("copy_rate"), "Autograd", with_keyset=True)
for _name in ("next_call", "call_key", "draw_key"):
    _library.impl(_name, _make_saved_kernel(_name), "Autograd", with_keyset=True)
    # A kernel of the dispatcher itself would keep PyTorch from functionalizing the operator.
    getattr(torch.ops.unidrop, _name).default.py_impl(_DispatchKey.Functionalize)(_refuse_branch)
_library.impl("dropout", _differentiate_dropout, "Autograd", with_keyset=True)
torch.library.register_vmap("unidrop::dropout", _batch_dropout, lib=_library)
torch.library.register_vmap("unidrop::permutation", _batch_permutation, lib=_library)
torch.library.register_vmap("unidrop::next_call", _batch_next_call, lib=_library)
torch.library.register_vmap("unidrop::call_key", _batch_call_key, lib=_library)
torch.library.register_vmap("unidrop::pack_key", _batch_pack_key, lib=_library)
torch.library.register_vmap("unidrop::fold_in", _batch_fold_in, lib=_library)
