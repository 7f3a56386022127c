"""PyTorch as an array library: its namespace, its integers and its gradient."""

from typing import Any

import array_api_compat.torch
import torch

from unidrop.adapters.torch.buffers import BUFFERS, is_capturing, is_tracing, must_stay
from unidrop.adapters.torch.func import randomness
from unidrop.adapters.torch.onnx import is_exporting, run_exported
from unidrop.adapters.torch.operators import (
    as_constant,
    fold_on_device,
    int_tensor,
    key_tensor,
    own_scale,
    pack_words,
    rate_argument,
    trace_dropout,
)
from unidrop.adapters.torch.plain import run_plain
from unidrop.arguments import register_symbolic_integer
from unidrop.gaussian import NormalPlan
from unidrop.key import Key, fold_number, string_data
from unidrop.plan import DropoutPlan
from unidrop.protocols import ArrayLibrary, Arrays, Operator, Words
from unidrop.rate import Rate
from unidrop.window import Window
from unidrop.words import Int64Words
from unidrop.zoneout import ComplementPlan

__all__ = [
    "LIBRARY",
    "MAY_HAVE_NAMES",
    "apply_eager",
    "not_dense",
    "window_arguments",
    "write_result",
]

_WORDS = Int64Words(array_api_compat.torch)

# torch.compiler.assume_constant_result does the same, but imports the compiler.
fold_number._dynamo_marked_constant = True  # type: ignore[attr-defined] # a function accepts any attribute
string_data._dynamo_marked_constant = True  # type: ignore[attr-defined] # a function accepts any attribute

# By name, because the import of their modules takes long.
_REFUSED = {
    "DTensor": "{}.to_local(), with the global_shape and start of the shard or a key for each rank",
    "MaskedTensor": "{}.get_data(), and mask the output",
}

# PyTorch 2.13 has removed the names of axes.
MAY_HAVE_NAMES = hasattr(torch.Tensor, "has_names")

_REMEDIES = {
    torch.jagged: (
        "torch.nested.nested_tensor_from_jagged(dropout(x.values(), p, key=key), x.offsets())"
    ),
    torch.sparse_coo: (
        "torch.sparse_coo_tensor(x.indices(), dropout(x.values(), p, key=key), x.shape), "
        "with the coalesced tensor"
    ),
}

_BITS = {getattr(torch, f"{sign}int{bits}"): bits for sign in ("", "u") for bits in (8, 16, 32, 64)}

# The largest integer that an operator accepts.
_MAX_INT64 = (1 << 63) - 1


class TorchArrays(Arrays):
    """PyTorch tensors."""

    def check_type(self, kind: type, name: str) -> None:
        """Raise TypeError for tensors that are parts of others or have a mask."""
        for base in kind.__mro__:
            if base.__name__ in _REFUSED and base.__module__.startswith("torch."):
                remedy = _REFUSED[base.__name__].format(name)
                raise TypeError(f"{name} must not be a {base.__name__}: apply dropout to {remedy}")

    def check(self, x: torch.Tensor, name: str) -> None:
        """Raise TypeError for tensors that are not dense, or have names."""
        if x.layout is not torch.strided or x.is_nested:
            raise not_dense(x, name)
        if MAY_HAVE_NAMES and x.has_names():  # type: ignore[attr-defined] # gone in 2.13
            raise TypeError(f"{name} must not have names: pass {name}.rename(None)")

    def namespace(self, x: torch.Tensor) -> Any:
        """Return the standard's namespace; Dynamo warns about the cache of array-api-compat."""
        return array_api_compat.torch

    def device(self, x: torch.Tensor) -> torch.device:
        """Return the device of the tensor."""
        return x.device

    def is_traced(self, x: torch.Tensor) -> bool:
        """Return whether PyTorch traces or transforms operations on tensors."""
        return is_tracing()

    def is_on_cpu(self, x: torch.Tensor) -> bool:
        """Return whether the tensor is on the CPU; DLPack knows fewer devices than PyTorch."""
        return x.device.type == "cpu"

    def match_strides(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return y with the strides of `torch.empty_like(x)`."""
        like = torch.empty_like(x)
        return y if y.stride() == like.stride() else like.copy_(y)

    def read_rate(self, p: torch.Tensor, x: torch.Tensor, name: str) -> Any:
        """Return the rate as a float, unless PyTorch traces or reading it waits for the GPU of x.

        Raises
        ------
        TypeError
            If the rate requires a gradient, which dropout does not define.
        RuntimeError
            If a CUDA graph would replay the number that the rate has now.
        """
        if p.requires_grad:
            raise TypeError(f"{name} must not require a gradient: pass {name}.detach()")
        if is_tracing():
            return p
        if must_stay(p) and p.device == x.device and p.device.type != "mps":
            return p.clone()  # the backward pass needs the present number, and p may change
        if is_capturing(x.device):
            raise RuntimeError(
                f"{name} in a CUDA graph must be a tensor on the GPU, or each replay would have "
                f"the same rate: pass {name}.to({x.device.type!r})"
            )
        return float(p.item())


class TorchWords(Words):
    """Words in ``int64``, which PyTorch supports on every device."""

    def arithmetic(self, xp: Any, device: Any) -> Int64Words:
        """Return arithmetic on ``int64``, without a look-up of the device's dtypes."""
        return _WORDS

    def width(self, value: torch.Tensor, name: str) -> int:
        """Return the number of bits of a 0-d integer tensor."""
        bits = _BITS.get(value.dtype)
        # The generic method takes longer to trace, so only errors call it.
        return super().width(value, name) if bits is None or value.dim() != 0 else bits


class TorchOperator(Operator):
    """Dropout as an autograd function, or in a trace as one ``torch.ops`` operator."""

    def dropout(
        self, x: torch.Tensor, key: Key, plan: DropoutPlan, mask: torch.Tensor | None = None
    ) -> Any:
        """Apply a plan as one operator; autograd saves the key and no tensor."""
        if is_tracing():
            if is_exporting():
                return run_exported(plan, x, key, mask)
            if not plan.is_elementwise:
                return plan.run(x, key, mask)
            window = window_arguments(plan.window, x.device)
            words, scale = key_tensor(key, x.device), own_scale(plan.rate)
            normal = (plan.mean, plan.stddev) if isinstance(plan, NormalPlan) else None
            options: dict[str, Any] = {"scale": scale, "normal": normal}
            options["complement"] = isinstance(plan, ComplementPlan)
            return trace_dropout(x, words, rate_argument(plan.rate), *window, **options)
        return _apply_recorded(x, key, plan, mask)

    def traced_mask(
        self, like: torch.Tensor, key: Key, window: Window, rate: Rate
    ) -> torch.Tensor | None:
        """Return the mask as the output of one operator."""
        if is_exporting() or not is_tracing():
            return None
        p = rate_argument(rate)
        if torch._C._are_functorch_transforms_active():
            # vmap must treat a mask like dropout of ones of the same shape.
            ones = torch.ones(window.shape, device=like.device)
            whole = Window.from_args(
                window.shape, window.broadcast_axes, window.global_shape, window.start
            )
            words, arguments = key_tensor(key, like.device), window_arguments(whole, like.device)
            return trace_dropout(ones, words, p, *arguments) > 0  # unlike NaN of a bad rate
        mask: torch.Tensor = torch.ops.unidrop.keep_mask(
            key_tensor(key, like.device),
            0.0 if isinstance(p, torch.Tensor) else as_constant(p),
            window.shape,
            *window_arguments(window, like.device),
            device=like.device,
            rate=p if isinstance(p, torch.Tensor) else None,
        )
        return mask

    def traced_permutation(
        self, like: torch.Tensor, key: Key, window: Window
    ) -> torch.Tensor | None:
        """Return permutations as the output of one operator."""
        if is_exporting():
            return None
        words = key_tensor(key, like.device)
        permuted: torch.Tensor = torch.ops.unidrop.permutation(
            words,
            window.shape,
            *window_arguments(window, like.device)[1:],
            random=randomness(like, words),
            device=like.device,
        )
        return permuted

    def pack_key(self, lo: Any, hi: Any) -> torch.Tensor | None:
        """Return two tensors as the tensor of a key, in a trace."""
        are_tensors = isinstance(lo, torch.Tensor) and isinstance(hi, torch.Tensor)
        if not are_tensors or not is_tracing() or is_exporting():
            return None
        LIBRARY.words.width(lo, "lo")
        LIBRARY.words.width(hi, "hi")
        packed: torch.Tensor = torch.ops.unidrop.pack_key(lo, hi)
        return packed

    def fold_in(self, words: Any, data: torch.Tensor, tag: int) -> torch.Tensor | None:
        """Return the words of a key after folding in a step: by one operator, or on a GPU.

        Compiling the arithmetic would take seconds.
        """
        if is_exporting():
            return None
        if not is_tracing():
            if not must_stay(data):
                return None
            LIBRARY.words.width(data, "data")
            return fold_on_device(words, data, tag)
        LIBRARY.words.width(data, "data")
        words = pack_words(words, data.device)
        folded: torch.Tensor = torch.ops.unidrop.fold_in(words, data, tag)
        return folded

    def fold_in_constant(self, words: Any, data: int, tag: int) -> torch.Tensor | None:
        """Return the words of a key after folding in an integer, as `fold_in`."""
        tensor = words[0] if isinstance(words[0], torch.Tensor) else words[1]
        if is_exporting() or not (is_tracing() or must_stay(tensor)):
            return None
        signed = data - (data >> 63 << 64)
        number = int_tensor([signed], tensor.device).reshape(())
        return self.fold_in(words, number, tag)


LIBRARY = ArrayLibrary(TorchArrays(), TorchWords(), TorchOperator(), BUFFERS)
register_symbolic_integer(torch.SymInt)


def not_dense(x: torch.Tensor, name: str) -> TypeError:
    """Return an error with a remedy: the elements of such tensors have no index in an array."""
    kind = "a nested tensor" if x.is_nested else f"one of layout {x.layout}"
    dense = "to_padded_tensor(0)" if x.is_nested else "to_dense()"
    remedy = _REMEDIES.get(x.layout, f"dropout({name}.{dense}, p, key=key)").replace(
        "x.", f"{name}."
    )
    return TypeError(
        f"{name} must be a dense tensor, got {kind}: apply dropout to its values, as in {remedy}"
    )


def window_arguments(window: Window, device: torch.device) -> tuple[Any, ...]:
    """Return the arguments of an operator for a window of a tensor on a device."""
    if window.global_shape is None or window.start is None:
        return (window.broadcast_axes,)
    if any(length > _MAX_INT64 for length in window.global_shape):
        raise ValueError(
            "global_shape must be below 2**63 under torch.compile, torch.export and torch.func, "
            f"got {window.global_shape}"
        )
    return window.broadcast_axes, window.global_shape, int_tensor(window.start, device)


class _Dropout(torch.autograd.Function):
    """The eager gradient: dropout of the upstream gradient under the same key."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, key: Key, plan: DropoutPlan, mask: Any) -> Any:
        ctx.key, ctx.plan = key, plan
        return _run(x, key, plan, mask)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        # Dropout is a product with a diagonal matrix, which is its own transpose.
        return ctx.plan.apply(tangents[0], ctx.key)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        x, key, plan = upstream[0], ctx.key, ctx.plan
        is_eager = not torch.is_grad_enabled() and not is_tracing()
        return _run(x, key, plan, None) if is_eager else plan.apply(x, key), None, None, None


class _InPlaceDropout(_Dropout):
    """The gradient of dropout in place, for an input that is written to next.

    Autograd adds zeros to the gradient of ``copy_``, and does not keep its strides.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, key: Key, plan: DropoutPlan, mask: Any) -> Any:
        ctx.key, ctx.plan = key, plan
        ctx.mark_dirty(x)
        return x


# `torch.autograd.Function.apply`, whose checks for torch.func `apply_eager` does not need.
_record = super(torch.autograd.Function, _Dropout).apply


def apply_eager(x: torch.Tensor, key: Key, plan: DropoutPlan, mask: Any = None) -> Any:
    """Apply a plan to a tensor that PyTorch does not trace; autograd saves the key alone."""
    if type(plan) is not DropoutPlan:
        return plan.apply(x, key, mask)
    return _apply_recorded(x, key, plan, mask)


def _apply_recorded(x: torch.Tensor, key: Key, plan: DropoutPlan, mask: Any) -> Any:
    """Apply a plan whose gradient is the plan itself, and record it if autograd is on."""
    if x.requires_grad and torch.is_grad_enabled():
        return _record(torch._C._functorch.unwrap_if_dead(x), key, plan, mask)
    return _run(x, key, plan, mask)


def _run(x: torch.Tensor, key: Key, plan: DropoutPlan, mask: Any) -> Any:
    """Return ``plan.run(x, key, mask)``, if possible by `run_plain`."""
    window = plan.window
    if plan.has_kernels and window.start is None and not window.broadcast_axes:
        output = run_plain(x, plan.rate, key._words)
        if output is not None:
            return output
    return plan.run(x, key, mask)


def write_result(x: torch.Tensor, key: Key, plan: DropoutPlan, mask: Any) -> torch.Tensor:
    """Write dropout over x, a result of operations that autograd has recorded."""
    output = plan.run(x.detach(), key, mask)
    _InPlaceDropout.apply(x, key, plan, mask)
    x.detach().copy_(output)
    return x
