"""The seed and the call number of PyTorch's modules, as users read and set them."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch_checkpoints import saved_calls

from unidrop import Key
from unidrop.adapters.torch import Dropout, Dropout1d, Dropout2d, Dropout3d, dropout

SITE = Key(42).fold_in("encoder/0")
OTHER = Key(42).fold_in("encoder/1")
X = torch.ones(37)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def output(seed, call):
    return dropout(X, key=seed.fold_in(call))


@pytest.mark.parametrize("module", [Dropout, Dropout1d, Dropout2d, Dropout3d])
@pytest.mark.parametrize("seed", [42, np.uint64(42), Key(42)], ids=["int", "numpy", "Key"])
def test_keeps_seed_as_key(module, seed):
    assert module(seed=seed).seed == Key(42)
    assert isinstance(module(seed=seed).seed, Key)


def test_has_no_seed_by_default():
    assert Dropout().seed is None
    assert repr(Dropout()) == "Dropout(p=0.5, inplace=False)"


def test_shows_seed():
    assert repr(Dropout(0.1, seed=SITE)) == f"Dropout(p=0.1, inplace=False, seed={SITE})"


@pytest.mark.parametrize("seed", [OTHER, int(OTHER)], ids=["Key", "int"])
def test_draws_by_seed_that_is_set(seed):
    module = Dropout(seed=SITE)
    module(X)
    module.seed = seed
    assert module.seed == OTHER
    assert torch.equal(module(X), output(OTHER, 1))
    assert module.calls == 2
    assert saved_calls(module.state_dict()) == {"": 2}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("eager", marks=pytest.mark.slow)])
def test_draws_by_seed_that_is_set_when_compiled(backend):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(backend)
    module = Dropout(seed=SITE)
    call = torch.compile(module, fullgraph=True, backend=graphs)
    assert torch.equal(call(X), output(SITE, 0))
    module.seed = OTHER
    assert torch.equal(call(X), output(OTHER, 1))


def test_counts_from_0_after_first_seed():
    module = Dropout()
    module(X)
    module.seed = SITE
    assert module.calls == 0
    assert torch.equal(module(X), output(SITE, 0))
    assert saved_calls(module.state_dict()) == {"": 1}


def test_has_no_state_after_seed_is_removed():
    module = Dropout(seed=SITE)
    module(X)
    module.seed = None
    assert module.seed is None
    assert module.state_dict() == nn.Dropout().state_dict()
    with pytest.raises(AttributeError, match="without a seed does not count calls"):
        module.calls  # noqa: B018 # reading it raises
    torch.manual_seed(5)
    expected = dropout(X)
    torch.manual_seed(5)
    assert torch.equal(module(X), expected)


@pytest.mark.parametrize(
    ("seed", "error"),
    [
        (-1, ValueError),
        (2**64, ValueError),
        (True, TypeError),
        (1.5, TypeError),
        ("encoder", TypeError),
        (torch.ones(3), TypeError),
    ],
    ids=str,
)
@pytest.mark.parametrize("before", [SITE, None], ids=["seeded", "unseeded"])
def test_rejects_bad_seed_and_keeps_state(before, seed, error):
    module = Dropout(seed=before)
    state = saved_calls(module.state_dict())
    message = rf"^seed must be .*{re.escape(repr(seed))}"
    with pytest.raises(error, match=message):
        module.seed = seed
    assert module.seed == before
    assert saved_calls(module.state_dict()) == state
    with pytest.raises(error, match=message):
        Dropout(seed=seed)


@pytest.mark.parametrize("seed", [SITE, None], ids=["seeded", "unseeded"])
def test_names_seed_for_old_name(seed):
    module = Dropout(seed=seed)
    with pytest.raises(AttributeError, match=r"use Dropout\.seed") as raised:
        module.key  # noqa: B018 # reading it raises
    assert raised.value.name == "key"
    with pytest.raises(AttributeError, match=r"use Dropout\.seed"):
        module.key = OTHER
    assert module.seed == seed


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
@pytest.mark.parametrize("seed", [SITE, None], ids=["seeded", "unseeded"])
def test_copies_seed(duplicate, seed):
    module = Dropout(seed=seed)
    twin = duplicate(module)
    assert twin.seed == seed
    twin.seed = OTHER
    assert module.seed == seed
    assert torch.equal(twin(X), output(OTHER, 0))


def test_sets_calls_to_any_integer():
    module = Dropout(seed=SITE)
    for calls in (7, np.int64(7), torch.tensor(7), torch.tensor(7, dtype=torch.uint8)):
        module.calls = calls
        assert isinstance(module.calls, torch.Tensor)
        assert (module.calls.dtype, int(module.calls)) == (torch.int64, 7)
        assert torch.equal(module(X), output(SITE, 7))
