"""The call number of PyTorch's modules in a state dictionary."""

import torch

__all__ = ["saved_calls", "saved_number"]


def saved_number(number):
    """Return a call number as a checkpoint contains it."""
    return torch.tensor([number, ~number])


def saved_calls(state_dict):
    """Return the call numbers of a state dictionary by module name, after checking them."""
    found = {}
    for name, value in state_dict.items():
        module, _, last = name.rpartition(".")
        if last == "_extra_state":
            assert torch.equal(value, saved_number(int(value[0])))
            found[module] = int(value[0])
    return found
