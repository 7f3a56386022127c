"""Dropout under the transformations of `torch.func`: grad, vjp, jvp, vmap and what is made of them.

A batch of `torch.vmap` is an axis more. What the mask does along it is what ``randomness=`` says:

* ``"different"``: the axis is the first of the mask, so that the examples are the windows of one
  mask of the whole batch, and have other elements dropped each.
* ``"same"``: the mask has length 1 along the axis, and is that of one example.
* ``"error"``: PyTorch raises what it raises of every random function.

An example whose key is its own, as of a batch of call numbers, has the mask of its key whatever
``randomness=`` says, since then nothing is left to it.
"""

import torch
from torch import Tensor

__all__ = ["randomness"]


def randomness(x: Tensor, key: Tensor | None) -> Tensor | None:
    """Return what `torch.vmap` treats as it treats everything random; None outside of torch.func.

    It has no elements, so that nothing is drawn. With ``randomness="different"`` it is a batch,
    and makes a batch of what it is given to.

    Parameters
    ----------
    x : torch.Tensor
        What is dropped from.
    key : torch.Tensor, optional
        The key or the call number, if the key is not drawn.

    Raises
    ------
    RuntimeError
        If ``randomness`` is "error"; but not where all examples share x and a key that is given,
        nor where each has a key of its own.
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
    """Tell whether each example of a batch has its own."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False
