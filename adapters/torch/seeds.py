"""The seeds of a model: assigns each layer its own, and warns of layers that share one."""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from unidrop.adapters.seeds import warn_of_equal_seeds
from unidrop.adapters.torch.buffers import must_stay
from unidrop.key import Key

__all__ = ["assign_seeds", "warn_of_twins"]

M = TypeVar("M", bound=torch.nn.Module)

# The model in a wrapper has one of these names, and the qualified name of its parent.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)

_CALL = torch.nn.Module._call_impl.__code__


def assign_seeds(model: M, seed: int | Key) -> M:
    """Give each dropout layer of a model the seed ``Key(seed).fold_in(name)``.

    The name is the qualified name of the layer, as in `torch.nn.Module.named_modules`, without the
    names that torch.compile and the wrappers for several devices add. So a wrapped model has the
    masks of the model alone. A layer in two places has the first name.

    Parameters
    ----------
    model : torch.nn.Module
        The model. Layers that count calls keep their call numbers.
    seed : int or unidrop.Key
        A process of several must fold in its rank, or all drop the same units.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        If model is not a module, or seed is neither an integer nor a Key.
    ValueError
        If the model has no layer of `unidrop.adapters.torch`, or seed is outside [0, 2^64).

    Examples
    --------
    >>> import torch
    >>> from unidrop import Key
    >>> from unidrop.adapters.torch import Dropout, assign_seeds
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), Dropout(), torch.nn.Linear(2, 2))
    >>> assign_seeds(model, 42)[1].seed == Key(42).fold_in("1")
    True
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    key = seed if isinstance(seed, Key) else Key(seed)
    layers = dict(_named_layers(model))
    if not layers:
        raise ValueError("model must have a layer of unidrop.adapters.torch, and it has none")
    for name, layer in layers.items():
        layer.seed = key.fold_in(name)
    return model


def warn_of_twins(layer: torch.nn.Module) -> None:
    """Warn if layers of the model that runs have one seed and one call number.

    Layers call this once, before their first training call: a model whose layers are copies, such
    as `torch.nn.TransformerEncoder`, is a mistake that no output shows.
    """
    layers = list(_named_layers(_find_model(layer)))
    for _, other in layers:
        other._checked = id(other)
    # Reading a number, or a rate, on another device would wait for it.
    active = [
        (name, other.seed, 0 if must_stay(other.calls) else int(other.calls))
        for name, other in layers
        if other.seed is not None and other.training
        if isinstance(other.p, Tensor) or other.p > 0
    ]
    warn_of_equal_seeds(active, "unidrop.adapters.torch")


def _find_model(layer: torch.nn.Module) -> torch.nn.Module:
    """Return the outermost module whose call contains the current call."""
    model = layer
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            model = frame.f_locals["self"]
        frame = frame.f_back
    return model


def _named_layers(
    module: torch.nn.Module, name: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield the layers that have seeds, each once, by qualified name."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, torch.nn.modules.dropout._DropoutNd) and hasattr(type(module), "seed"):
        yield name, module
    for child_name, child in module.named_children():
        unnamed = "module" if isinstance(module, _PARALLEL) else None
        if child_name in (*_WRAPPED, getattr(type(module), "_unnamed_child", unnamed)):
            yield from _named_layers(child, name, seen)
        else:
            yield from _named_layers(child, f"{name}.{child_name}" if name else child_name, seen)
