"""Run the PyTorch function and module in every mode of PyTorch."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from unidrop import Key
from unidrop.adapters import torch as adapter
from unidrop.adapters.torch import Dropout, scaled_dot_product_attention
from unidrop.conformance import (
    FUSED,
    GENERAL,
    CoreBackend,
    eager_modes,
    missing_eager_modes,
    use_mode_path,
)
from unidrop.conformance.backends.torch_modes import (
    COMPILED,
    DERIVED,
    MODES,
    call,
    count_graphs,
    vjp,
)

__all__ = ["Torch"]


_CONJUGATED = "functional_call"

# After arrays of other shapes, Inductor compiles blocks of any shape, which takes half a minute.
_SLOW_BLOCKS: Mapping[str, str] = {
    "drop_block": "compile-dynamic and the keras-torch backend compile it"
}


class Torch(CoreBackend):
    """PyTorch on the CPU."""

    name = "torch"
    xp = torch
    capabilities: Mapping[str, str | None] = {
        **CoreBackend.core_capabilities,
        **dict.fromkeys(("gradient", "family_gradient", "layouts", "traces")),
        **dict.fromkeys(("layer", "layer_gradient")),
        **dict.fromkeys(("attention", "attention_gradient", "attention_windows")),
    }
    transforms: tuple[str, ...] = MODES
    compiled_modes: tuple[str, ...] = (*COMPILED, "export")
    derived_modes: Mapping[str, str] = DERIVED
    missing_modes: Mapping[str, str] = {
        "torch.jit": "deprecated; tracing would freeze the mask, so dropout raises",
    }
    mode_exclusions: Mapping[str, Mapping[str, str]] = {
        mode: {
            **dict.fromkeys(
                ("bad-rate", "bad-dtype", "layer-error"),
                "torch.compile(fullgraph=True) replaces errors of the traced function by its own",
            ),
            **({} if mode == "compile-dynamic" else _SLOW_BLOCKS),
        }
        for mode in COMPILED
    } | {
        "export": {"threads": "torch.export has tracing state that threads share"},
        "forward-mode": {
            "threads": "PyTorch has one dual level that threads share",
            **dict.fromkeys(
                ("attention_gradient", "patch_dropout"),
                "tangents are gradients only if the Jacobian is diagonal",
            ),
        },
        "autocast": {
            **dict.fromkeys(
                ("attention-output", "attention-gradient", "attention-windows"),
                "autocast rounds the inputs to bfloat16",
            ),
            "patch_dropout": "torch.cat raises for float16, if autocast rounds to bfloat16",
        },
    }

    def __init__(self) -> None:
        example = torch.ones(1, device=self.devices[0])
        eager = eager_modes(example)
        general = (GENERAL,) if FUSED in eager and example.is_cpu else ()
        self.modes = (*eager, *general, *self.transforms)
        self.missing_modes = {**self.missing_modes, **missing_eager_modes(example)}
        self._modules: dict[Any, torch.nn.Module] = {}

    def dtypes(self, mode: str) -> tuple[str, ...]:
        """Return PyTorch's floating-point and complex dtypes."""
        return ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")

    def from_numpy(self, x: NDArray[Any], device: str, mode: str) -> torch.Tensor:
        """Convert to a tensor; bfloat16 through its bits, since NumPy lacks it.

        In one mode, complex tensors are conjugated, and PyTorch does so only when it must.
        """
        if x.dtype == ml_dtypes.bfloat16:
            return torch.tensor(x.view(np.int16), device=device).view(torch.bfloat16)
        if mode == _CONJUGATED and np.iscomplexobj(x):
            return torch.tensor(x.conj(), device=device).conj()
        return torch.tensor(x, device=device)

    def to_numpy(self, y: torch.Tensor) -> NDArray[Any]:
        """Convert to a NumPy array; bfloat16 through its bits, since NumPy lacks it."""
        y = y.detach().cpu().contiguous().resolve_conj()
        if y.dtype == torch.bfloat16:
            return y.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return y.numpy()

    def get_device(self, y: torch.Tensor) -> str:
        """Return the device's type."""
        return y.device.type

    def dropout(self, x: Any, p: Any, seed: int, step: int, *, mode: str, **options: Any) -> Any:
        """Call the function."""
        if mode in self.transforms:
            key_and_step = _key_and_step(seed, step, x.device)
            return call(self._module(p, mode, options), x, mode, *key_and_step)
        with use_mode_path(mode):
            return _drop(x, p, Key(seed).fold_in(step), **options)

    def gradient(
        self, x: Any, upstream: Any, p: float, seed: int, step: int, *, mode: str, **options: Any
    ) -> Any:
        """Differentiate with autograd, or with the mode's own transformation."""
        if mode in self.transforms:
            key_and_step = _key_and_step(seed, step, x.device)
            return vjp(self._module(p, mode, options), x, mode, *key_and_step)[1](upstream)
        x = x.requires_grad_()
        with use_mode_path(mode):
            y = _drop(x, p, Key(seed).fold_in(step), **options)
            return torch.autograd.grad(y, x, upstream)[0]

    def traces(self, mode: str) -> int:
        """Return the number of traced graphs."""
        return count_graphs(mode)

    def _module(self, p: Any, mode: str, options: Mapping[str, Any]) -> torch.nn.Module:
        """Return a cached module, so that keys and steps share its graphs."""
        static = repr((p, mode, sorted(options.items())))
        return self._modules.setdefault(static, _Function(p, options))

    def attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        p: float,
        seed: int,
        step: int,
        *,
        mode: str,
        **options: Any,
    ) -> Any:
        """Call the function, with one input in the modes that transform a module of one input."""
        inputs = query, key, value
        if mode in self.transforms:
            module, others = self._attention_module(inputs, p, mode, options)
            others = (*_key_and_step(seed, step, query.device), *others)
            return call(module, _pack(inputs), mode, *others)
        with use_mode_path(mode):
            return _attend(*inputs, p, Key(seed).fold_in(step), **options)

    def attention_gradient(
        self,
        query: Any,
        key: Any,
        value: Any,
        upstream: Any,
        p: float,
        seed: int,
        step: int,
        *,
        mode: str,
        **options: Any,
    ) -> tuple[Any, Any, Any]:
        """Differentiate with autograd, or with the mode's own transformation."""
        inputs = query, key, value
        if mode in self.transforms:
            module, others = self._attention_module(inputs, p, mode, options)
            others = (*_key_and_step(seed, step, query.device), *others)
            packed = vjp(module, _pack(inputs), mode, *others)[1](upstream)
            return _unpack(packed, [x.shape for x in inputs])
        leaves = query.requires_grad_(), key.requires_grad_(), value.requires_grad_()
        with use_mode_path(mode):
            y = _attend(*leaves, p, Key(seed).fold_in(step), **options)
            of_query, of_key, of_value = torch.autograd.grad(y, leaves, upstream)
        return of_query, of_key, of_value

    def _attention_module(
        self, inputs: tuple[Any, ...], p: float, mode: str, options: dict[str, Any]
    ) -> tuple[torch.nn.Module, tuple[Any, ...]]:
        """Return a cached module for the shapes of its inputs, and its further inputs."""
        others = (options.pop("mask"),) if "mask" in options else ()
        shapes = [x.shape for x in inputs]
        static = repr(("attention", shapes, p, mode, sorted(options.items())))
        return self._modules.setdefault(static, _Attention(shapes, p, options)), others

    def layouts(self, x: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Return the layouts that PyTorch users meet."""
        return {
            "channels_last": x.contiguous(memory_format=torch.channels_last),
            "transposed": x.transpose(1, 3).contiguous().transpose(1, 3),
            "every second element": x.repeat_interleave(2, dim=2)[:, :, ::2],
        }

    def layer(self, p: float, seed: int, *, dtype: str, device: str, mode: str) -> "_Layer":
        """Return a module and the mode that runs it."""
        return _Layer(Dropout(p, seed=seed).to(device), mode, mode in self.transforms)


def _key_and_step(seed: int, step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the words of a key, and a step, as tensors on a device."""
    words = torch.tensor(Key(seed).words, device=device)
    return words, torch.tensor(step, dtype=torch.uint64, device=device)


class _Function(torch.nn.Module):
    """The function as a module, with the key and the step as arguments of the compiled code."""

    def __init__(self, p: Any, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.p = p
        self.options = dict(options)

    def forward(self, x: torch.Tensor, words: torch.Tensor, step: torch.Tensor) -> Any:
        lo, hi = words.unbind()
        key = Key.from_words(lo, hi).fold_in(step)
        return _drop(x, self.p, key, **self.options)


def _drop(x: torch.Tensor, p: Any, key: Key, *, member: str = "dropout", **options: Any) -> Any:
    """Call a function of the family, in training unless the options say otherwise."""
    if member == "drop_block":
        member = f"drop_block{len(options.pop('axes'))}d"
    if member == "locked_dropout":
        options["batch_first"] = options.pop("axis") == 1
    function: Callable[..., Any] = getattr(adapter, member)
    return function(x, p, **{"training": True, **options}, key=key)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, p: float, name: Key, **options: Any
) -> torch.Tensor:
    """Call the function with PyTorch's names of the options; ``name`` is the name of the mask."""
    options["attn_mask"] = options.pop("mask", None)
    options["enable_gqa"] = key.shape[1] != query.shape[1]
    y: torch.Tensor = scaled_dot_product_attention(
        query, key, value, dropout_p=p, dropout_key=name, **options
    )
    return y


def _pack(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return one vector with the elements of several tensors."""
    return torch.cat([x.reshape(-1) for x in inputs])


def _unpack(
    packed: torch.Tensor, shapes: Sequence[torch.Size]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the tensors of three shapes in a vector."""
    parts = torch.split(packed, [shape.numel() for shape in shapes])
    query, key, value = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    return query, key, value


class _Attention(torch.nn.Module):
    """Attention as a module of one vector, with the key and the step as further inputs."""

    def __init__(self, shapes: Sequence[torch.Size], p: float, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.shapes = shapes
        self.p = p
        self.options = dict(options)

    def forward(
        self, x: torch.Tensor, words: torch.Tensor, step: torch.Tensor, mask: Any = None
    ) -> torch.Tensor:
        lo, hi = words.unbind()
        key = Key.from_words(lo, hi).fold_in(step)
        return _attend(*_unpack(x, self.shapes), self.p, key, mask=mask, **self.options)


class _Layer:
    def __init__(self, module: Dropout, mode: str, is_transformed: bool) -> None:
        self._module = module
        self._mode = mode
        self._is_transformed = is_transformed

    @property
    def calls(self) -> int:
        return int(self._module.calls)

    @calls.setter
    def calls(self, value: int) -> None:
        self._module.calls = value

    def __call__(self, x: torch.Tensor, *, training: bool) -> Any:
        self._module.train(training)
        if self._is_transformed:
            return call(self._module, x, self._mode)
        with use_mode_path(self._mode):
            return self._module(x)

    def vjp(self, x: torch.Tensor) -> tuple[Any, Callable[[Any], Any]]:
        if self._is_transformed:
            return vjp(self._module.train(), x, self._mode)
        x = x.requires_grad_()
        y = self(x, training=True)

        def pullback(upstream: torch.Tensor) -> torch.Tensor:
            with use_mode_path(self._mode):
                return torch.autograd.grad(y, x, upstream)[0]

        return y, pullback

    def save(self) -> bytes:
        buffer = io.BytesIO()
        torch.save(self._module.state_dict(), buffer)
        return buffer.getvalue()

    def load(self, state: bytes) -> None:
        self._module.load_state_dict(torch.load(io.BytesIO(state)))
