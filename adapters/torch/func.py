"""The transformations of `torch.func` that dropout must know: vmap and functionalize.

Dropout follows vmap's ``randomness=``.

A batch of `torch.vmap` adds an axis, and ``randomness=`` decides the mask along it:

* ``"different"``: the axis is the first of the mask. Each example gets its window of one mask of
  the whole batch, so examples drop different elements.
* ``"same"``: the mask has length 1 along the axis, so every example gets the mask of one example.
* ``"error"``: PyTorch raises its own error for random functions.

If each example has its own key, as with a batch of call numbers, it gets the mask of its key for
every value of ``randomness=``.
"""

import torch
from torch import Tensor

__all__ = ["is_functionalizing", "randomness"]


def randomness(x: Tensor, key: Tensor | None) -> Tensor | None:
    """Return a tensor that `torch.vmap` treats as random, or None outside of torch.func.

    The tensor is empty, so the generator does not advance. With ``randomness="different"`` it is a
    batch, and so is the output of an operator that receives it.

    Parameters
    ----------
    x : torch.Tensor
        The input of dropout.
    key : torch.Tensor, optional
        The key or the call number; None if the key is drawn.

    Raises
    ------
    RuntimeError
        If ``randomness`` is "error". Not if all examples share x and a key, nor if each example
        has its own key.
    """
    if not torch._C._are_functorch_transforms_active():
        return None
    if torch.compiler.is_dynamo_compiling():
        return torch.rand(0)
    if key is not None and _is_batched(key):
        return None
    try:
        return torch.rand(0)
    except RuntimeError:
        if key is None or _is_batched(x):
            raise
        return None


def _is_batched(x: Tensor) -> bool:
    """Return whether x differs between the examples of a batch."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def is_functionalizing() -> bool:
    """Return whether `torch.func.functionalize` transforms the call."""
    if torch.compiler.is_dynamo_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    functorch = torch._C._functorch
    kind = functorch.TransformType.Functionalize
    return any(level.key() == kind for level in functorch.get_interpreter_stack())
