"""Run a module in every mode of PyTorch: compiled, exported, checkpointed, under torch.func.

`call` returns the output, `vjp` the output and its pullback. They work for any module whose first
input is the one to differentiate.
"""

import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

__all__ = [
    "COMPILED",
    "COMPILED_FOR_CUDA",
    "DERIVED",
    "MODES",
    "OutputAndPullback",
    "call",
    "count_graphs",
    "vjp",
]

# The exported programs of each module, by the form of the input. An attribute of the module would
# not do, since torch.export restores the attributes.
_programs: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()

_compiling = threading.RLock()

# The forms that have been exported, in order.
_exports: list[Any] = []

OutputAndPullback = tuple[Tensor, Callable[[Tensor], Tensor]]

#: The options of torch.compile, by mode.
COMPILED: dict[str, dict[str, Any]] = {
    "compile": {"backend": "inductor"},
    "compile-dynamic": {"backend": "inductor", "dynamic": True},
    "compile-checkpoint": {"backend": "inductor"},
}

#: The same for modes that need a GPU.
COMPILED_FOR_CUDA: dict[str, dict[str, Any]] = {
    "compile-cuda-graph": {"backend": "inductor", "mode": "reduce-overhead"},
}

_COMPILED = COMPILED | COMPILED_FOR_CUDA

#: The compiled mode that wraps another mode in activation checkpointing.
DERIVED = {"compile-checkpoint": "compile"}

#: All modes except eager ones.
MODES = (
    *COMPILED,
    "export",
    "checkpoint",
    "checkpoint-reentrant",
    "func.vjp",
    "func.vmap",
    "functional_call",
    "forward-mode",
    "autocast",
)


def count_graphs(mode: str) -> int:
    """Return the number of graphs that a mode has traced; torch.compile has its own counter."""
    if mode == "export":
        return len(_exports)
    return int(_dynamo().utils.counters["stats"]["unique_graphs"])


def call(module: nn.Module, x: Tensor, mode: str, *others: Tensor) -> Tensor:
    """Call a module in a mode."""
    if mode == "cuda-graph":
        output: Tensor = _capture(module, x, *others).run(x, *others)
        return output
    with _context(mode, x):
        return _transform(module, mode)(x, *others)


def vjp(module: nn.Module, x: Tensor, mode: str, *others: Tensor) -> OutputAndPullback:
    """Call a module in a mode; return the output and the pullback to x."""
    if mode == "func.vjp":
        return _vjp_by_func(module, x, *others)
    if mode == "func.vmap":
        return _vjp_by_vmap(module, x, *others)
    if mode == "forward-mode":
        return _vjp_by_tangents(module, x, *others)
    if mode == "cuda-graph":
        graph = _capture(module, x, *others)
        return graph.run(x, *others), graph.run_backward
    leaf = x.detach().requires_grad_()
    with _context(mode, x):
        y = _transform(module, mode)(leaf, *others)

    def pullback(upstream: Tensor) -> Tensor:
        leaf.grad = None
        with _context(mode, x):
            y.backward(upstream)
        gradient = leaf.grad
        if gradient is None:
            raise RuntimeError("the output does not depend on the input")
        return gradient

    return y, pullback


def _vjp_by_func(module: nn.Module, x: Tensor, *others: Tensor) -> OutputAndPullback:
    both: tuple[Any, ...] = torch.func.vjp(lambda v: module(v, *others), x)
    y, pullback = both
    return y, lambda upstream: pullback(upstream)[0]


def _vjp_by_vmap(module: nn.Module, x: Tensor, *others: Tensor) -> OutputAndPullback:
    both: tuple[Any, ...] = torch.func.vjp(_vmap(module, *others), torch.stack([x, x]))
    y, pullback = both
    return y[1], lambda upstream: pullback(torch.stack([upstream, upstream]))[0][1]


def _vjp_by_tangents(module: nn.Module, x: Tensor, *others: Tensor) -> OutputAndPullback:
    """Compute the pullback in forward mode: a diagonal Jacobian is its own transpose.

    PyTorch propagates tangents during the call, so the pullback repeats the call with the state
    that it had before.
    """
    state = {name: value.clone() for name, value in module.state_dict().items()}
    y = call(module, x, "forward-mode", *others)

    def pullback(upstream: Tensor) -> Tensor:
        after = {name: value.clone() for name, value in module.state_dict().items()}
        module.load_state_dict(state)
        with torch.autograd.forward_ad.dual_level():
            dual = module(torch.autograd.forward_ad.make_dual(x, upstream), *others)
            tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
        module.load_state_dict(after)
        # PyTorch represents a tangent of zeros as None.
        return torch.zeros_like(upstream) if tangent is None else tangent

    return y, pullback


def _transform(module: nn.Module, mode: str) -> Callable[..., Tensor]:
    """Return the function that runs a module in a mode."""
    if mode in _COMPILED:
        return _compile(module, mode)
    if mode == "export":
        return lambda *inputs: _export(module, *inputs)(*inputs)
    return _TRANSFORMS[mode](module)


def _compile(module: nn.Module, mode: str) -> Callable[..., Tensor]:
    """Compile a module from its own copy of a code object, so that it shares no graphs.

    Modules of one class share graphs otherwise. The matrix has a hundred modules, and Dynamo takes
    longer to search their graphs than to trace a new one.
    """
    _dynamo()
    cached: Callable[..., Tensor] | None = module.__dict__.get("_compiled")
    if cached is not None:
        return cached
    region = _checkpoint(module, False) if mode == "compile-checkpoint" else module

    def run(*inputs: Tensor) -> Any:
        return region(*inputs)

    function = FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    compiled = _serialize_first_calls(torch.compile(function, fullgraph=True, **_COMPILED[mode]))
    module.__dict__["_compiled"] = compiled
    return compiled


def _serialize_first_calls(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that takes a lock for the first call with a form of the input.

    Without the lock, each of several concurrent callers would compile it.
    """
    seen: set[Any] = set()

    def run(x: Tensor, *others: Tensor) -> Tensor:
        form = x.shape, x.dtype, x.requires_grad
        if form in seen:
            return compiled(x, *others)
        with _compiling:
            y = compiled(x, *others)
        seen.add(form)
        return y

    return run


def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copy all buffers: a state dictionary lacks those that are not persistent."""
    for name, buffer in target.named_buffers():
        buffer.copy_(source.get_buffer(name))


def _export(module: nn.Module, *inputs: Tensor) -> Callable[..., Tensor]:
    """Export a module as a program that loads the module's state and stores it back."""
    x = inputs[0]
    form = x.shape, x.dtype, x.stride(), module.training
    programs = _programs.setdefault(module, {})
    if form not in programs:
        examples = tuple(value.detach() for value in inputs)
        programs[form] = torch.export.export(module, examples).module()
        _exports.append(form)
    program = programs[form]

    def run(*inputs: Tensor) -> Tensor:
        _copy_buffers(module, program)
        y: Tensor = program(*inputs)
        _copy_buffers(program, module)
        return y

    return run


def _checkpoint(module: nn.Module, reentrant: bool) -> Callable[..., Tensor]:
    """Return a module in a checkpointed region whose backward pass reads the recomputed output."""

    def region(*inputs: Tensor) -> Any:
        y = module(*inputs)
        if isinstance(y, tuple):
            return _SelectGradient.apply(y[0]), y[1]
        return _SelectGradient.apply(y)

    return lambda *inputs: checkpoint(region, *inputs, use_reentrant=reentrant)


@torch.library.custom_op("unidrop_matrix::select_gradient", mutates_args=())
def _select_gradient(upstream: Tensor, y: Tensor) -> Tensor:
    """Set a gradient to 0 in elements whose output is 0, as one operator without compilation."""
    return torch.where(y != 0, upstream, torch.zeros_like(upstream))


@_select_gradient.register_fake
def _(upstream: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(upstream)


class _SelectGradient(torch.autograd.Function):
    """The identity, whose gradient is 0 in elements whose saved output is 0."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        gradient: Tensor = _select_gradient(upstream[0], y)
        return gradient


class _CudaGraphs:
    """A module's forward pass and backward pass as CUDA graphs, for inputs of one form."""

    def __init__(self, module: nn.Module, *inputs: Tensor) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._is_differentiable = inputs[0].is_floating_point() or inputs[0].is_complex()
        self._inputs[0].requires_grad_(self._is_differentiable)
        state = {name: buffer.clone() for name, buffer in module.named_buffers()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled before the capture
            self._differentiate(module(*self._inputs))
        torch.cuda.current_stream().wait_stream(stream)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward):
            self._output = module(*self._inputs)
        self._upstream = torch.zeros_like(self._first_output())
        with torch.cuda.graph(self._backward, pool=self._forward.pool()):
            self._gradient = self._differentiate(self._output)
        # The warm-up and the capture must not count.
        for name, buffer in module.named_buffers():
            buffer.copy_(state[name])

    def run(self, *inputs: Tensor) -> Any:
        """Replay the forward pass for other inputs."""
        with torch.no_grad():
            for own, tensor in zip(self._inputs, inputs, strict=True):
                own.copy_(tensor)
        self._forward.replay()
        return tree_map(lambda tensor: tensor.detach().clone(), self._output)

    def run_backward(self, upstream: Tensor) -> Tensor:
        """Replay the backward pass."""
        self._upstream.copy_(upstream)
        self._backward.replay()
        assert self._gradient is not None
        return self._gradient.clone()

    def _first_output(self) -> Tensor:
        output: Tensor = self._output[0] if isinstance(self._output, tuple) else self._output
        return output

    def _differentiate(self, output: Any) -> Tensor | None:
        first = output[0] if isinstance(output, tuple) else output
        if not first.requires_grad:
            return None
        upstream = getattr(self, "_upstream", None)
        upstream = torch.zeros_like(first) if upstream is None else upstream
        return torch.autograd.grad(first, self._inputs[0], upstream)[0]


def _capture(module: nn.Module, *inputs: Tensor) -> _CudaGraphs:
    """Return the CUDA graphs of a module for the form of its inputs."""
    graphs = module.__dict__.setdefault("_cuda_graphs", {})
    form = module.training, *((x.shape, x.dtype, x.stride()) for x in inputs)
    if form not in graphs:
        graphs[form] = _CudaGraphs(module, *inputs)
    captured: _CudaGraphs = graphs[form]
    return captured


def _vmap(module: nn.Module, *others: Tensor) -> Callable[[Tensor], Any]:
    """Return a module over a batch of examples that share a mask."""
    return torch.vmap(lambda x: module(x, *others), randomness="same")


def _call_by_vmap(module: nn.Module) -> Callable[..., Tensor]:
    def function(x: Tensor, *others: Tensor) -> Any:
        return tree_map(lambda batch: batch[1], _vmap(module, *others)(torch.stack([x, x])))

    return function


def _call_functionally(module: nn.Module) -> Callable[..., Tensor]:
    buffers = dict(module.named_buffers())
    return lambda *inputs: torch.func.functional_call(module, buffers, inputs)


def _call_with_duals(module: nn.Module) -> Callable[..., Any]:
    def function(x: Tensor, *others: Tensor) -> Any:
        if not (x.is_floating_point() or x.is_complex()):
            return module(x, *others)  # raises
        with torch.autograd.forward_ad.dual_level():
            dual = module(torch.autograd.forward_ad.make_dual(x, x), *others)
            return tree_map(lambda part: torch.autograd.forward_ad.unpack_dual(part).primal, dual)

    return function


def _call_by_vjp(module: nn.Module) -> Callable[..., Any]:
    def function(x: Tensor, *others: Tensor) -> Any:
        def value(x: Tensor) -> tuple[Tensor, Any]:
            y = module(x, *others)
            return (y[0], y[1]) if isinstance(y, tuple) else (y, ())

        if not (x.is_floating_point() or x.is_complex()):
            return module(x, *others)  # raises
        with_mask: tuple[Any, ...] = torch.func.vjp(value, x, has_aux=True)
        y, _, mask = with_mask
        return y if isinstance(mask, tuple) else (y, mask)

    return function


_TRANSFORMS: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "checkpoint": lambda module: _checkpoint(module, False),
    "checkpoint-reentrant": lambda module: _checkpoint(module, True),
    "func.vjp": _call_by_vjp,
    "func.vmap": _call_by_vmap,
    "functional_call": _call_functionally,
    "forward-mode": _call_with_duals,
    "autocast": lambda module: module,
}


def _context(mode: str, x: Tensor) -> AbstractContextManager[Any]:
    """Return the context that runs a mode, and ignore warnings that PyTorch causes itself."""
    # PyTorch warns of: checkpoints of an input without gradient; torch.jit in forward mode;
    # autograd.Function in Dynamo; complex numbers in Inductor. The filters stay, since restoring
    # them is not thread-safe.
    warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
    warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    warnings.filterwarnings("ignore", "Torchinductor does not support .* complex")
    if mode != "autocast":
        return nullcontext()
    return torch.autocast(x.device.type, dtype=torch.bfloat16)


@cache
def _dynamo() -> Any:
    # The import takes a second, so it waits for the first compiled mode.
    import torch._dynamo

    # The matrix calls a function with dozens of shapes. By default, Dynamo stops after eight.
    torch._dynamo.config.recompile_limit = 1 << 20
    return torch._dynamo
