"""FX tracing: `torch.fx.symbolic_trace` records a call of dropout as one node."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from unidrop.key import Key

__all__ = ["call_override", "override", "record_module"]


def record_module(module: torch.nn.Module, input: Any, *args: Any, **options: Any) -> Any:
    """Return a proxy of a call of a module, as FX records modules of `torch.nn`.

    Raises
    ------
    TypeError
        If the input is not a proxy.
    """
    if not isinstance(input, torch.fx.Proxy):
        raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
    tracer: Any = input.tracer
    return tracer.create_proxy(
        "call_module", tracer.path_of_module(module), (input, *args), options
    )


def call_override(function: Callable[..., Any], input: Any, *args: Any, **options: Any) -> Any:
    """Return the result of ``__torch_function__`` of an input that is not a tensor.

    Raises
    ------
    TypeError
        If the input has no ``__torch_function__``.
    """
    if not has_torch_function_unary(input):
        raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
    return override(function, input, input, *args, **options)


def override(function: Callable[..., Any], by: Any, *args: Any, **options: Any) -> Any:
    """Return the result of ``__torch_function__`` of an argument, with keys as nodes of a graph."""
    for name in ("key", "dropout_key"):
        key = options.get(name)
        if isinstance(by, torch.fx.Proxy) and isinstance(key, Key):
            # A node's arguments are numbers and nodes.
            options[name] = by.tracer.create_proxy("call_function", make_key, key.words, {})
    return handle_torch_function(function, (by,), *args, **options)


def make_key(lo: int, hi: int) -> Key:
    """Return the key of two words, as a node of a graph."""
    return Key.from_words(lo, hi)
