"""The ways in which PyTorch runs a model, as the matrix has them.

A way is a function of a module and an input that gives the output, and one that gives the output
and its pullback. The module is dropout alone, or whatever else has one input, and maybe others
which it is not differentiated by.
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

__all__ = ["COMPILED", "DERIVED", "MODES", "Pulled", "call", "graphs", "pulled"]

# The exported programs of each module, by what they were exported for. Not the module's attribute,
# which torch.export would put back as it was.
_programs: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()

_compiling = threading.RLock()

# What has been exported for, in its order.
_exports: list[Any] = []

Pulled = tuple[Tensor, Callable[[Tensor], Tensor]]

#: The options of torch.compile in each mode that compiles.
COMPILED: dict[str, dict[str, Any]] = {
    "compile": {"backend": "inductor"},
    "compile-dynamic": {"backend": "inductor", "dynamic": True},
    "compile-checkpoint": {"backend": "inductor"},
}

#: Those that trace what another does: with a checkpoint around it.
DERIVED = {"compile-checkpoint": "compile"}

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


def call(module: nn.Module, x: Tensor, mode: str, *others: Tensor) -> Tensor:
    """Return a module's output for an input, in a mode."""
    with _context(mode):
        return _function(module, mode)(x, *others)


def pulled(module: nn.Module, x: Tensor, mode: str, *others: Tensor) -> Pulled:
    """Return a module's output for an input, and the function that differentiates it."""
    if mode == "func.vjp":
        return _pulled_by_func(module, x, *others)
    if mode == "func.vmap":
        return _pulled_by_vmap(module, x, *others)
    if mode == "forward-mode":
        return _pulled_forwards(module, x, *others)
    leaf = x.detach().requires_grad_()
    with _context(mode):
        y = _function(module, mode)(leaf, *others)

    def pullback(upstream: Tensor) -> Tensor:
        leaf.grad = None
        with _context(mode):
            y.backward(upstream)
        gradient = leaf.grad
        if gradient is None:
            raise RuntimeError("the output does not depend on the input")
        return gradient

    return y, pullback


def _pulled_by_func(module: nn.Module, x: Tensor, *others: Tensor) -> Pulled:
    both: tuple[Any, ...] = torch.func.vjp(lambda v: module(v, *others), x)
    y, pullback = both
    return y, lambda upstream: pullback(upstream)[0]


def _pulled_by_vmap(module: nn.Module, x: Tensor, *others: Tensor) -> Pulled:
    both: tuple[Any, ...] = torch.func.vjp(_batched(module, *others), torch.stack([x, x]))
    y, pullback = both
    return y[1], lambda upstream: pullback(torch.stack([upstream, upstream]))[0][1]


def _pulled_forwards(module: nn.Module, x: Tensor, *others: Tensor) -> Pulled:
    """Return the pullback by tangents: what is diagonal is its own transpose.

    Tangents run along with the call, so the call is made again for an upstream gradient, from the
    state of before; its output has to be the same.
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
        # None is what PyTorch has for a tangent of zeros.
        return torch.zeros_like(upstream) if tangent is None else tangent

    return y, pullback


def _function(module: nn.Module, mode: str) -> Callable[..., Tensor]:
    if mode in COMPILED:
        return _compiled(module, mode)
    if mode == "export":
        return lambda *inputs: _exported(module, *inputs)(*inputs)
    return _FUNCTIONS[mode](module)


def _compiled(module: nn.Module, mode: str) -> Callable[..., Tensor]:
    """Return a module compiled from code of its own, so that its graphs are its own too.

    Modules of one class share their graphs as far as these fit; but where the matrix has a hundred
    of them, the search for one that fits takes longer than another graph.
    """
    _dynamo()
    cached: Callable[..., Tensor] | None = module.__dict__.get("_compiled")
    if cached is not None:
        return cached
    function = _checkpointed(module, False) if mode == "compile-checkpoint" else module

    def run(*inputs: Tensor) -> Any:
        return function(*inputs)

    own = FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    compiled = _one_at_first(torch.compile(own, fullgraph=True, **COMPILED[mode]))
    module.__dict__["_compiled"] = compiled
    return compiled


def _one_at_first(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function whose first call of a form is one thread's alone.

    Threads that call together what is not compiled yet would compile it each.
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


def _exported(module: nn.Module, *inputs: Tensor) -> Callable[..., Tensor]:
    """Return a module's exported program, run from the module's state and leaving it there."""
    x = inputs[0]
    form = x.shape, x.dtype, x.stride(), module.training
    programs = _programs.setdefault(module, {})
    if form not in programs:
        given = tuple(value.detach() for value in inputs)
        programs[form] = torch.export.export(module, given).module()
        _exports.append(form)
    program = programs[form]

    def run(*inputs: Tensor) -> Tensor:
        program.load_state_dict(module.state_dict())
        y: Tensor = program(*inputs)
        module.load_state_dict(program.state_dict())
        return y

    return run


def _checkpointed(module: nn.Module, reentrant: bool) -> Callable[..., Tensor]:
    """Return a module in a region, of whose output the gradient needs the recomputed one."""

    def region(*inputs: Tensor) -> Any:
        y = module(*inputs)
        return (_Kept.apply(y[0]), y[1]) if isinstance(y, tuple) else _Kept.apply(y)

    return lambda *inputs: checkpoint(region, *inputs, use_reentrant=reentrant)


@torch.library.custom_op("unidrop_matrix::where_kept", mutates_args=())
def _where_kept(upstream: Tensor, y: Tensor) -> Tensor:
    """Return a gradient where an output is not 0: one operator, which nothing is compiled for."""
    return torch.where(y != 0, upstream, torch.zeros_like(upstream))


@_where_kept.register_fake
def _(upstream: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(upstream)


class _Kept(torch.autograd.Function):
    """The identity, which lets a gradient pass where the saved output is not 0."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        kept: Tensor = _where_kept(upstream[0], y)
        return kept


def _batched(module: nn.Module, *others: Tensor) -> Callable[[Tensor], Any]:
    """Return a module of batches of examples that share their mask."""
    return torch.vmap(lambda x: module(x, *others), randomness="same")


def _vmapped(module: nn.Module) -> Callable[..., Tensor]:
    def function(x: Tensor, *others: Tensor) -> Any:
        return tree_map(lambda batch: batch[1], _batched(module, *others)(torch.stack([x, x])))

    return function


def _by_functional_call(module: nn.Module) -> Callable[..., Tensor]:
    buffers = dict(module.named_buffers())
    return lambda *inputs: torch.func.functional_call(module, buffers, inputs)


def _by_duals(module: nn.Module) -> Callable[..., Any]:
    def function(x: Tensor, *others: Tensor) -> Any:
        if not (x.is_floating_point() or x.is_complex()):
            return module(x, *others)  # which raises
        with torch.autograd.forward_ad.dual_level():
            dual = module(torch.autograd.forward_ad.make_dual(x, x), *others)
            return tree_map(lambda part: torch.autograd.forward_ad.unpack_dual(part).primal, dual)

    return function


def _by_vjp(module: nn.Module) -> Callable[..., Any]:
    def function(x: Tensor, *others: Tensor) -> Any:
        def value(x: Tensor) -> tuple[Tensor, Any]:
            y = module(x, *others)
            return (y[0], y[1]) if isinstance(y, tuple) else (y, ())

        if not (x.is_floating_point() or x.is_complex()):
            return module(x, *others)  # which raises
        with_mask: tuple[Any, ...] = torch.func.vjp(value, x, has_aux=True)
        y, _, mask = with_mask
        return y if isinstance(mask, tuple) else (y, mask)

    return function


_FUNCTIONS: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
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
