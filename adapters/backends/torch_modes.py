"""The ways in which PyTorch runs a model, as the matrix has them.

A way is a function of a module and an input that gives the output, and one that gives the output
and its pullback. The module is dropout alone, or whatever else has one input.
"""

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

__all__ = ["COMPILED", "MODES", "Pulled", "call", "graphs", "pulled"]

# The exported programs of each module, by what they were exported for. Not the module's attribute,
# which torch.export would put back as it was.
_programs: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()

# What has been exported for, in its order.
_exports: list[Any] = []

Pulled = tuple[Tensor, Callable[[Tensor], Tensor]]

#: The options of torch.compile in each mode that compiles.
COMPILED: dict[str, dict[str, Any]] = {
    "compile": {"backend": "inductor"},
    "compile-aot_eager": {"backend": "aot_eager"},
    "compile-eager": {"backend": "eager"},
    "compile-dynamic": {"backend": "inductor", "dynamic": True},
    "compile-checkpoint": {"backend": "inductor"},
}

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


def graphs(mode: str) -> int:
    """Return how many graphs a mode has traced so far: torch.compile by its own count."""
    if mode == "export":
        return len(_exports)
    return int(_dynamo().utils.counters["stats"]["unique_graphs"])


def call(module: nn.Module, x: Tensor, mode: str) -> Tensor:
    """Return a module's output for an input, in a mode."""
    with _context(mode):
        return _function(module, mode)(x)


def pulled(module: nn.Module, x: Tensor, mode: str) -> Pulled:
    """Return a module's output for an input, and the function that differentiates it."""
    if mode == "func.vjp":
        return _pulled_by_func(module, x)
    if mode == "func.vmap":
        return _pulled_by_vmap(module, x)
    if mode == "forward-mode":
        return _pulled_forwards(module, x)
    leaf = x.detach().requires_grad_()
    with _context(mode):
        y = _function(module, mode)(leaf)

    def pullback(upstream: Tensor) -> Tensor:
        leaf.grad = None
        with _context(mode):
            y.backward(upstream)
        gradient = leaf.grad
        if gradient is None:
            raise RuntimeError("the output does not depend on the input")
        return gradient

    return y, pullback


def _pulled_by_func(function: Callable[[Tensor], Tensor], x: Tensor) -> Pulled:
    both: tuple[Any, ...] = torch.func.vjp(function, x)
    y, pullback = both
    return y, lambda upstream: pullback(upstream)[0]


def _pulled_by_vmap(module: nn.Module, x: Tensor) -> Pulled:
    both: tuple[Any, ...] = torch.func.vjp(_batched(module), torch.stack([x, x]))
    y, pullback = both
    return y[1], lambda upstream: pullback(torch.stack([upstream, upstream]))[0][1]


def _pulled_forwards(module: nn.Module, x: Tensor) -> Pulled:
    """Return the pullback by tangents: what is diagonal is its own transpose.

    Tangents run along with the call, so the call is made again for an upstream gradient, from the
    state of before; its output has to be the same.
    """
    state = {name: value.clone() for name, value in module.state_dict().items()}
    y = call(module, x, "forward-mode")

    def pullback(upstream: Tensor) -> Tensor:
        after = {name: value.clone() for name, value in module.state_dict().items()}
        module.load_state_dict(state)
        with torch.autograd.forward_ad.dual_level():
            dual = module(torch.autograd.forward_ad.make_dual(x, upstream))
            tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
        module.load_state_dict(after)
        # None is what PyTorch has for a tangent of zeros.
        return torch.zeros_like(upstream) if tangent is None else tangent

    return y, pullback


def _function(module: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    if mode in COMPILED:
        return _compiled(module, mode)
    if mode == "export":
        return lambda x: _exported(module, x)(x)
    return _FUNCTIONS[mode](module)


def _compiled(module: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    """Return a module compiled from code of its own, so that its graphs are its own too.

    Modules of one class share their graphs as far as these fit; but where the matrix has a hundred
    of them, the search for one that fits takes longer than another graph.
    """
    _dynamo()
    cached: Callable[[Tensor], Tensor] | None = module.__dict__.get("_compiled")
    if cached is not None:
        return cached
    function = _checkpointed(module, False) if mode == "compile-checkpoint" else module

    def run(x: Tensor) -> Any:
        return function(x)

    own = FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    compiled: Callable[[Tensor], Tensor] = torch.compile(own, fullgraph=True, **COMPILED[mode])
    module.__dict__["_compiled"] = compiled
    return compiled


def _exported(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a module's exported program, run from the module's state and leaving it there."""
    form = x.shape, x.dtype, x.stride(), module.training
    programs = _programs.setdefault(module, {})
    if form not in programs:
        programs[form] = torch.export.export(module, (x.detach(),)).module()
        _exports.append(form)
    program = programs[form]

    def run(x: Tensor) -> Tensor:
        program.load_state_dict(module.state_dict())
        y: Tensor = program(x)
        module.load_state_dict(program.state_dict())
        return y

    return run


def _checkpointed(module: nn.Module, reentrant: bool) -> Callable[[Tensor], Tensor]:
    """Return a module in a region, of whose output the gradient needs the recomputed one."""

    def region(x: Tensor) -> Any:
        y = module(x)
        return (_Kept.apply(y[0]), y[1]) if isinstance(y, tuple) else _Kept.apply(y)

    return lambda x: checkpoint(region, x, use_reentrant=reentrant)


class _Kept(torch.autograd.Function):
    """The identity, which lets a gradient pass where the saved output is not 0."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.where(y != 0, upstream[0], torch.zeros_like(upstream[0]))


def _batched(module: nn.Module) -> Callable[[Tensor], Any]:
    """Return a module of batches of examples that share their mask."""
    return torch.vmap(lambda x: module(x), randomness="same")


def _vmapped(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: tree_map(lambda batch: batch[1], _batched(module)(torch.stack([x, x])))


def _by_functional_call(module: nn.Module) -> Callable[[Tensor], Tensor]:
    buffers = dict(module.named_buffers())
    return lambda x: torch.func.functional_call(module, buffers, (x,))


def _by_duals(module: nn.Module) -> Callable[[Tensor], Any]:
    def function(x: Tensor) -> Any:
        if not (x.is_floating_point() or x.is_complex()):
            return module(x)  # which raises
        with torch.autograd.forward_ad.dual_level():
            dual = module(torch.autograd.forward_ad.make_dual(x, x))
            return tree_map(lambda part: torch.autograd.forward_ad.unpack_dual(part).primal, dual)

    return function


def _by_vjp(module: nn.Module) -> Callable[[Tensor], Any]:
    def value(x: Tensor) -> tuple[Tensor, Any]:
        y = module(x)
        return (y[0], y[1]) if isinstance(y, tuple) else (y, ())

    def function(x: Tensor) -> Any:
        if not (x.is_floating_point() or x.is_complex()):
            return module(x)  # which raises
        with_mask: tuple[Any, ...] = torch.func.vjp(value, x, has_aux=True)
        y, _, mask = with_mask
        return y if isinstance(mask, tuple) else (y, mask)

    return function


_FUNCTIONS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "checkpoint": lambda module: _checkpointed(module, False),
    "checkpoint-reentrant": lambda module: _checkpointed(module, True),
    "func.vjp": _by_vjp,
    "func.vmap": _vmapped,
    "functional_call": _by_functional_call,
    "forward-mode": _by_duals,
    "autocast": lambda module: module,
}


def _context(mode: str) -> AbstractContextManager[Any]:
    """Return what a mode is run under."""
    # Of torch's own making, and not put back after, which would go wrong in several threads: an
    # input without gradients, tangents by way of torch.jit, torch.compile's own handling of an
    # autograd.Function, and complex numbers, which Inductor leaves to torch's operators.
    warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
    warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    warnings.filterwarnings("ignore", "Torchinductor does not support .* complex")
    return torch.autocast("cpu", dtype=torch.bfloat16) if mode == "autocast" else nullcontext()


@cache
def _dynamo() -> Any:
    # Imported when first needed: it takes a second.
    import torch._dynamo

    # The matrix calls one function with dozens of shapes, from threads too.
    torch._dynamo.config.recompile_limit = 1 << 20
    return torch._dynamo
