"""Dropout in programs of torch.export, make_fx, fake tensors and TorchScript."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from unidrop import Key, keep_mask
from unidrop.adapters.torch import Dropout, Dropout2d

SITE = Key(42).fold_in("encoder/0")


def mask(call, shape, p=0.5, site=SITE, **options):
    """Return the scaled mask of a call, which NumPy makes."""
    keep = torch.from_numpy(keep_mask(shape, p, site.fold_in(call), **options))
    return keep.float() * torch.tensor(1 / (1 - p), dtype=torch.float32)


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.first = Dropout(seed=seed)
        self.second = Dropout2d(seed=seed if seed is None else seed.fold_in("second"))

    def forward(self, x):
        return self.first(x), self.second(x.reshape(3, 4, 4, 4))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("seed", [SITE, None], ids=["seeded", "unseeded"])
def test_exports_program_with_masks_of_later_calls(seed, strict, decomposed):
    model, x = Net(seed), torch.ones(3, 64)
    program = torch.export.export(copy.deepcopy(model), (x,), strict=strict)
    exported = (program.run_decompositions() if decomposed else program).module()
    for step in range(3):
        torch.manual_seed(step)
        actual = exported(x)
        torch.manual_seed(step)
        assert all(map(torch.equal, actual, model(x)))
    if seed is not None:
        assert exported.get_buffer("first._calls")[0] == 3


def test_exports_identity_in_evaluation():
    program = torch.export.export(Dropout(seed=SITE).eval(), (torch.ones(3, 64),))
    assert "dropout" not in str(program.graph)
    assert torch.equal(program.module()(torch.ones(3, 64)), torch.ones(3, 64))


def test_exports_program_for_other_lengths():
    length = torch.export.Dim("length", min=2, max=100)
    program = torch.export.export(
        Dropout(seed=SITE), (torch.ones(3, 64),), dynamic_shapes=({0: length},)
    ).module()
    assert torch.equal(program(torch.ones(3, 64)), mask(0, (3, 64)))
    assert torch.equal(program(torch.ones(7, 64)), mask(1, (7, 64)))


def test_records_call_in_make_fx():
    module, x = Dropout(seed=SITE), torch.ones(3, 64)
    graph = make_fx(module)(x)
    for call in range(int(module.calls), int(module.calls) + 2):
        assert torch.equal(graph(x), mask(call, (3, 64)))


@pytest.mark.parametrize("seed", [SITE, None], ids=["seeded", "unseeded"])
def test_gives_fake_outputs_of_fake_tensors(seed):
    with torch._subclasses.FakeTensorMode():
        model, x = nn.Sequential(nn.Linear(4, 5), Dropout(seed=seed)), torch.ones(2, 4)
        y = model(x)
        y.sum().backward()
    assert (type(y), y.shape) == (torch._subclasses.FakeTensor, (2, 5))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("seed", [SITE, None], ids=["seeded", "unseeded"])
def test_refuses_torch_jit_and_names_alternatives(seed):
    for compile_by_jit in (torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(3))):
        with pytest.raises(RuntimeError, match=re.escape("use torch.compile or torch.export")):
            compile_by_jit(Dropout(seed=seed))
    traced = torch.jit.trace(Dropout(seed=seed).eval(), torch.ones(3))
    assert torch.equal(traced(torch.ones(3)), torch.ones(3))
