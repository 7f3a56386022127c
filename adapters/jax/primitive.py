"""Dropout as one JAX primitive, with a rule for each of JAX's transformations.

The primitive is linear in x. Its derivative is itself, applied to a tangent; its transpose is
itself, applied to a cotangent. So a backward pass keeps the key and recomputes the mask. Over a
batch it is itself with one more leading axis, along which each operand varies or not.

In a program for one CPU it lowers to a call of the fused kernels. In all others it lowers to
operations that every platform supports and a partitioner can cut: the core's portable ones on the
CPU, and pointwise ones on other platforms. An exported program has these operations too: it may run
in a process without unidrop.

JAX documentation: JAX internals, primitives; `jax.extend.core.Primitive`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from importlib import import_module
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from unidrop.adapters.jax.generator import pointwise_mask
from unidrop.dispatch import get_kernels
from unidrop.dtypes import compute_dtype
from unidrop.key import Key
from unidrop.output import select
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.schedule import ScheduledRate
from unidrop.threads import fork_guard
from unidrop.window import Window
from unidrop.words import SplitInteger

__all__ = ["count_programs", "drop", "get_varying_axes", "is_on_cpu", "keep_mask"]

_STATIC = ("plan", "batch", "is_for_cpu")

# From this number of elements, several threads process one array outside of a program.
_LARGE = 1 << 20


def drop(
    x: Any,
    key: SplitInteger,
    starts: Sequence[SplitInteger],
    plan: DropoutPlan,
    is_portable: bool = False,
) -> Any:
    """Return dropout of an array.

    Parameters
    ----------
    x : array
        At least one element.
    key : (lo, hi)
        The key's words, in ``uint32``.
    starts : sequence of (hi, lo)
        The starts of the window that are arrays, as words.
    plan : DropoutPlan
        A plan that keeps some elements.
    is_portable : bool, default False
        If True, a program calls no kernels.
    """
    words = [word for start in starts for word in start]
    if isinstance(plan.rate, ScheduledRate):
        words.append(plan.rate.array)
    # Devices that share x but not the mask do not share the output. The transpose of this cast sums
    # their cotangents of x.
    traced = (word for word in (*key, *words) if isinstance(word, jax.core.Tracer))
    axes = frozenset[Any]().union(*map(get_varying_axes, traced))
    if axes and (axes := axes - get_varying_axes(x)):
        x = jax.lax.pcast(x, tuple(sorted(axes, key=str)), to="varying")
    return _drop_p.bind(
        x,
        *key,
        *words,
        plan=_without_arrays(plan),
        batch=(),
        is_portable=is_portable,
        is_transposed=False,
    )


def keep_mask(key: SplitInteger, starts: Sequence[SplitInteger], plan: DropoutPlan) -> Any:
    """Return the mask of `drop`, of the window's shape: True for kept elements."""
    words = [word for start in starts for word in start]
    if isinstance(plan.rate, ScheduledRate):
        words.append(plan.rate.array)
    mask: Any = _keep_mask(*key, *words, plan=_without_arrays(plan))
    return mask


# In one program of portable operations, XLA allocates no ones, and places the mask on the device of
# the key.
@partial(jax.jit, static_argnames=("plan",), inline=True)
def _keep_mask(lo: Any, hi: Any, *words: Any, plan: DropoutPlan) -> Any:
    words, plan = _with_rate(words, plan)
    starts = list(zip(words[::2], words[1::2], strict=True))
    ones = jnp.ones(plan.window.shape, np.float32)
    # The output of a bad rate is NaN, and its mask is False.
    return drop(ones, (lo, hi), starts, plan, is_portable=True) > 0


def _without_arrays(plan: DropoutPlan) -> DropoutPlan:
    """Return a plan with None for a rate or a start that is an array, so that it can be hashed."""
    if isinstance(plan.rate, ScheduledRate):
        plan = replace(plan, rate=plan.rate.with_array(None))
    if plan.window.start is None:
        return plan
    start = tuple(s if isinstance(s, int) else None for s in plan.window.start)
    return replace(plan, window=replace(plan.window, start=start))


def _with_rate(words: Any, plan: DropoutPlan) -> tuple[Any, DropoutPlan]:
    """Return the words of starts, and a plan with its scheduled rate, which follows them."""
    if not isinstance(plan.rate, ScheduledRate):
        return words, plan
    *words, p = words
    return words, replace(plan, rate=plan.rate.with_array(p))


def _with_starts(window: Window, starts: Iterator[SplitInteger]) -> Window:
    """Return a window with its array starts filled in."""
    if window.start is None:
        return window
    return replace(window, start=tuple(next(starts) if s is None else s for s in window.start))


def get_varying_axes(operand: Any) -> frozenset[Any]:
    """Return the axes of `jax.shard_map`'s mesh along which an operand varies."""
    aval: Any = jax.typeof(operand)
    if hasattr(aval, "mat"):
        return frozenset(aval.mat.varying)
    return frozenset(getattr(aval, "vma", ()))  # the name before JAX 0.10


_drop_p = Primitive("unidrop_dropout")


def _rule(
    x: Any,
    *words: Any,
    plan: DropoutPlan,
    batch: tuple[Any, ...],
    is_for_cpu: bool,
    is_transposed: bool = False,
) -> Any:
    """Return dropout of an array; the outermost axis of the batch is first."""
    # The result must not depend on the user's setting, and 64-bit integers make the generator
    # faster. No transformation sees them, because they stay inside the rule.
    with jax.enable_x64(True):
        if not is_for_cpu and plan.has_kernels:
            # XLA must not see that a backward pass computes the same mask: it would keep the mask.
            if is_transposed:
                words = jax.lax.optimization_barrier(words)
            return _pointwise_rule(x, *words, plan=plan, batch=batch)
        rule = partial(_rule_of_one, plan=plan)
        for varies in reversed(batch):
            rule = jax.vmap(rule, in_axes=tuple(0 if axis else None for axis in varies))
        return rule(x, *words)


# JAX traces and lowers this once for all layers of one shape in a model, and their gradients.
_shared_rule = jax.jit(_rule, static_argnames=(*_STATIC, "is_transposed"))


def _rule_of_one(x: Any, lo: Any, hi: Any, *words: Any, plan: DropoutPlan) -> Any:
    """Return the core's dropout of one example."""
    words, plan = _with_rate(words, plan)
    starts = zip(words[::2], words[1::2], strict=True)
    plan = replace(plan, window=_with_starts(plan.window, starts))
    return plan.run_portable(x, Key._from_raw_words((lo, hi)))


def _pointwise_rule(x: Any, *words: Any, plan: DropoutPlan, batch: tuple[Any, ...]) -> Any:
    """Return dropout of all examples, each element by operations on it alone."""
    axes = tuple(range(len(batch), x.ndim))
    lo, hi, *rest = (jnp.expand_dims(word, axes) for word in _align(words, batch))
    rest, plan = _with_rate(rest, plan)
    window = _with_starts(plan.window, zip(rest[::2], rest[1::2], strict=True))
    varying = np.broadcast_shapes(*(word.shape for word in (lo, hi, *rest)))[: len(batch)]
    decide = partial(pointwise_mask, window, (lo, hi), batch=varying)
    if isinstance(plan.rate, ScheduledRate):
        mask = plan.rate.keep(plan.library, None, decide)
    else:
        mask = decide(plan.rate.threshold)
    return select(plan.library, x, mask, plan.rate)


def _align(words: Sequence[Any], batch: tuple[Any, ...]) -> list[Any]:
    """Return words with all axes of a batch, of length 1 if a word does not vary along an axis."""
    aligned = []
    for operand, word in enumerate(words, 1):
        shared = [axis for axis, varies in enumerate(batch) if not varies[operand]]
        aligned.append(jnp.expand_dims(word, shared))
    return aligned


class _TracedRate(Rate):
    """A rate that keeps some elements, with operands of a program as threshold and scale."""

    @property
    def keeps_nothing(self) -> bool:
        return False

    def scale_in(self, dtype: str) -> Any:
        return self.scale


@partial(jax.jit, static_argnames=_STATIC)
def _run(
    threshold: Any, scale: Any, *operands: Any, plan: DropoutPlan, batch: Any, is_for_cpu: bool
) -> Any:
    """Run the rule in one program for all rates."""
    rate = _TracedRate(math.nan, threshold, scale)
    return _rule(*operands, plan=replace(plan, rate=rate), batch=batch, is_for_cpu=is_for_cpu)


def count_programs() -> int:
    """Return how many programs JAX has compiled for eager calls."""
    number: int = _run._cache_size() + _get_program.cache_info().currsize
    return number


# In place of a call's rate, so that one program serves all rates.
_ANY_RATE = Rate.from_p(0.5)


def _run_eagerly(
    x: Any,
    *words: Any,
    plan: DropoutPlan,
    batch: tuple[Any, ...],
    is_portable: bool,
    is_transposed: bool,
) -> Any:
    """Compute dropout of an array that is not traced, such as a tangent."""
    if isinstance(plan.rate, ScheduledRate):
        options = {"is_portable": is_portable, "is_transposed": is_transposed}
        return _run_scheduled(x, words, plan, batch, **options)
    # A user's transfer guard is for arrays. A call transfers the numbers of a key and a rate.
    with jax.transfer_guard_host_to_device("allow"):
        if not is_portable and plan.has_kernels and isinstance(x, jax.Array):
            y = _run_kernels(x, words, plan, batch)
            if y is not None:
                return y
        dtype, rate = compute_dtype(x.dtype), plan.rate
        numbers = np.uint32(rate.threshold), np.dtype(dtype).type(rate.scale_in(dtype))
        if not plan.has_kernels:
            return _shared_rule(x, *words, plan=plan, batch=batch, is_for_cpu=is_on_cpu(x))
        settings = {"plan": replace(plan, rate=_ANY_RATE), "batch": batch}
        return _run(*numbers, x, *words, **settings, is_for_cpu=is_on_cpu(x))


def _run_scheduled(
    x: Any, words: Sequence[Any], plan: DropoutPlan, batch: tuple[Any, ...], **options: bool
) -> Any:
    """Run `_run_eagerly` for a rate whose number is known, or for a batch of them.

    A derivative with respect to a rate, and `jax.vmap` over rates, come here outside of a program.
    """
    assert isinstance(plan.rate, ScheduledRate)
    *others, p = words
    for number in np.asarray(p, np.float64).ravel().tolist():
        rate = Rate.from_p(number)  # raises
    if np.shape(p):
        return _shared_rule(x, *words, plan=plan, batch=batch, is_for_cpu=is_on_cpu(x))
    if rate.p == 0:
        return x
    if rate.keeps_nothing:
        return jnp.zeros_like(x)
    rate = rate if plan.rate.scale is None else rate.with_scale(plan.rate.scale)
    batch = tuple(varies[:-1] for varies in batch)
    return _run_eagerly(x, *others, plan=replace(plan, rate=rate), batch=batch, **options)


def is_on_cpu(x: Any) -> bool:
    """Return whether JAX runs a program of an array on the CPU."""
    if not isinstance(x, jax.Array):
        return bool(jax.default_backend() == "cpu")
    return bool(next(iter(x.devices())).platform == "cpu")


_drop_p.def_impl(_run_eagerly)


def _run_kernels(x: Any, words: Sequence[Any], plan: DropoutPlan, batch: tuple[Any, ...]) -> Any:
    """Compute dropout of an array by kernels, or return None if they cannot run."""
    is_one = len(words) == 2 and not batch
    program = None
    if get_kernels() is not None and not (is_one and x.size >= _LARGE):
        is_located = not isinstance(plan.library.buffers.locate(x), str)
        program = _get_program(x.shape, x.dtype, plan.window, batch) if is_located else None
    if program is not None:
        return program(x, *words, rate=_get_custom_call().pack_rate(plan.rate))
    return plan.run_fused(x, Key.from_words(*words)) if is_one else None


@lru_cache(maxsize=1024)
def _get_program(
    shape: tuple[int, ...], dtype: Any, window: Window, batch: tuple[Any, ...]
) -> Any | None:
    """Return a compiled program that calls kernels, or None if they cannot run.

    JAX takes longer to adopt memory of NumPy than to run this program.
    """
    call = _make_call(jax.ShapeDtypeStruct(shape, dtype), window, batch)
    return None if call is None else jax.jit(partial(_call_rule, call=call, batch=batch))


def _lower(
    context: Any,
    *operands: Any,
    plan: DropoutPlan,
    batch: tuple[Any, ...],
    is_portable: bool,
    is_transposed: bool,
    is_for_cpu: bool,
) -> Any:
    """Lower to a call of kernels in a program for one CPU, otherwise to operations of JAX."""
    call = None
    has_one_rate = not (plan.rate.is_scheduled and any(varies[-1] for varies in batch))
    may_call = is_for_cpu and not is_portable and plan.has_kernels and has_one_rate
    if may_call and _is_for_one_cpu(context):
        call = _make_call(context.avals_in[0], plan.window, batch)
    if call is None:
        settings = {"is_for_cpu": is_for_cpu, "is_transposed": is_transposed and not is_for_cpu}
        rule = partial(_shared_rule, plan=plan, batch=batch, **settings)
    elif plan.rate.is_scheduled:
        rule = partial(_call_scheduled_rule, plan=plan, call=call, batch=batch)
    else:
        rate = _get_custom_call().pack_rate(plan.rate)
        rule = partial(_call_rule, rate=rate, call=call, batch=batch)
    return mlir.lower_fun(rule, multiple_results=False)(context, *operands)


def _is_for_one_cpu(context: Any) -> bool:
    """Return whether a program is for one CPU of this process.

    A partitioner would gather a sharded array for a custom call. An exported program may run in a
    process without unidrop. JAX documents none of these attributes, so each may be missing.
    """
    module = context.module_context
    platforms: Any = getattr(context, "platforms", None) or getattr(module, "platforms", ())
    devices = getattr(getattr(module, "axis_context", None), "num_devices", None)
    is_exported = getattr(getattr(module, "lowering_parameters", None), "for_export", True)
    return tuple(platforms) == ("cpu",) and devices == 1 and not is_exported


def _make_call(x: Any, window: Window, batch: tuple[Any, ...]) -> Any:
    """Return the custom call for an array, or None if kernels cannot compute it."""
    custom_call = _get_custom_call()
    if custom_call is None or not all(isinstance(n, int) and n for n in x.shape):
        return None
    ndim = len(batch)
    runs, shape, strides = 1, x.shape, window.strides
    if _has_varying(batch):
        runs, shape = math.prod(shape[:ndim]), shape[ndim:]
    else:
        strides = (0,) * ndim + strides  # all examples share one mask
    starts = [stride for _, stride in window.offsets]
    return custom_call.make_call(x.dtype, shape, strides, window.whole.base, starts, runs)


def _call_rule(x: Any, *words: Any, rate: Any, call: Any, batch: tuple[Any, ...]) -> Any:
    """Return the output of a custom call. Over a batch of keys, each example has its own words."""
    if not _has_varying(batch):
        return _get_custom_call().call_kernel(call, x, rate, *words)
    sizes = x.shape[: len(batch)]
    spread = [jnp.broadcast_to(word, sizes) for word in _align(words, batch)]
    return _get_custom_call().call_kernel(call, x, rate, *spread)


def _call_scheduled_rule(
    x: Any, *words: Any, plan: DropoutPlan, call: Any, batch: tuple[Any, ...]
) -> Any:
    """Return the output of a custom call at a rate that keeps and drops, otherwise a constant."""
    words, plan = _with_rate(words, plan)
    with jax.enable_x64(True):
        rate: Any = plan.rate
        threshold, keeps_some = rate.limits(plan.library, None)
        scale = jnp.asarray(rate.scale_in("float64"), np.float64)
        bits = jax.lax.bitcast_convert_type(scale, np.uint32)
        packed = jnp.concatenate([threshold[None], bits])
        return jax.lax.cond(
            keeps_some & ~rate.is_zero(),
            lambda: _call_rule(x, *words, rate=packed, call=call, batch=batch),
            lambda: plan.select(x, np.False_),
        )


def _has_varying(batch: tuple[Any, ...]) -> bool:
    """Return whether an operand other than x varies along an axis of the batch."""
    return any(any(varies[1:]) for varies in batch)


@cache
def _get_custom_call() -> Any:
    """Return the module of the custom call, or None if this process has no kernels."""
    try:
        with fork_guard:
            return import_module("unidrop.adapters.jax.custom_call")
    except ImportError:  # of llvmlite or of unidrop.fused
        return None


mlir.register_lowering(_drop_p, partial(_lower, is_for_cpu=False))
mlir.register_lowering(_drop_p, partial(_lower, is_for_cpu=True), platform="cpu")


def _abstract_eval(x: Any, *others: Any, **settings: Any) -> Any:
    return x.update(weak_type=False)


_drop_p.def_abstract_eval(_abstract_eval)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **settings: Any) -> tuple[Any, Any]:
    x, *numbers = primals
    y = _drop_p.bind(x, *numbers, **settings)
    if isinstance(tangents[0], ad.Zero):  # the derivative is with respect to a rate
        return y, ad.Zero(jax.typeof(y))
    return y, _drop_p.bind(tangents[0], *numbers, **settings)


def _transpose(cotangent: Any, x: Any, *numbers: Any, **settings: Any) -> list[Any]:
    no_cotangents = [None] * len(numbers)
    if isinstance(cotangent, ad.Zero):
        return [cotangent, *no_cotangents]
    settings["is_transposed"] = not settings["is_transposed"]
    return [_drop_p.bind(cotangent, *numbers, **settings), *no_cotangents]


def _batch(
    operands: Sequence[Any], axes: Sequence[int | None], *, batch: tuple[Any, ...], **settings: Any
) -> tuple[Any, int]:
    """Apply the primitive over one more axis; x gets the axis, because the output has it."""
    size = next(v.shape[a] for v, a in zip(operands, axes, strict=True) if a is not None)
    moved = [v if a is None else jnp.moveaxis(v, a, 0) for v, a in zip(operands, axes, strict=True)]
    if axes[0] is None:
        moved[0] = jnp.broadcast_to(moved[0], (size, *moved[0].shape))
    varies = (True, *(a is not None for a in axes[1:]))
    return _drop_p.bind(*moved, **settings, batch=(varies, *batch)), 0


ad.primitive_jvps[_drop_p] = _jvp
ad.primitive_transposes[_drop_p] = _transpose
batching.primitive_batchers[_drop_p] = _batch
