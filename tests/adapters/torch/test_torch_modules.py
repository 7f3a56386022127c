"""The modules of the PyTorch adapter: calls, state, devices, channels."""

import copy
import io
import pickle
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as native
from torch import nn
from torch_checkpoints import saved_calls, saved_number
from torch_tensors import (
    KEY,
    SITE,
    expected_patterns,
    get_mask,
    get_name,
    numbers,
    patterns,
)

import unidrop.adapters.torch as ours
from unidrop import Key
from unidrop.adapters.torch import Dropout, Dropout1d, Dropout2d, Dropout3d, dropout

MODULES = [Dropout, Dropout1d, Dropout2d, Dropout3d]


# --- Calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seed", [SITE, int(SITE), np.uint64(int(SITE))], ids=["Key", "int", "numpy"]
)
def test_folds_call_number_into_key(seed):
    module, x = Dropout(0.1, seed=seed), numbers(3, 37)
    for n in range(3):
        assert patterns(module(x)) == expected_patterns(x, 0.1, SITE.fold_in(n))


def test_returns_its_input_in_place():
    x = numbers(37)
    assert Dropout(inplace=True, seed=SITE)(x) is x
    assert patterns(x) == expected_patterns(numbers(37), 0.5, SITE.fold_in(0))


def test_gives_gradient_of_earlier_call_by_its_mask():
    module, x = Dropout(seed=SITE), numbers(37, requires_grad=True)
    y = module(x)
    module(x)
    y.sum().backward()
    assert torch.equal(x.grad, get_mask(SITE.fold_in(0), 37) * 2.0)


def test_returns_input_uncounted_in_evaluation():
    module, x = Dropout(seed=SITE).eval(), numbers(37)
    assert module(x) is x
    assert module.calls == 0


def test_continues_training_after_evaluation():
    module, x = Dropout(seed=SITE), numbers(37)
    module(x)
    module.eval()(x)
    assert patterns(module.train()(x)) == expected_patterns(x, 0.5, SITE.fold_in(1))


def test_returns_input_uncounted_at_rate_0():
    module, x = Dropout(0, seed=SITE), numbers(37)
    assert module(x) is x
    assert module.calls == 0


def test_counts_call_at_rate_1():
    module = Dropout(1, seed=SITE)
    module(numbers(37))
    assert module.calls == 1


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("arguments", [{}, {"p": 0.2}, {"p": 0.2, "inplace": True}], ids=str)
def test_shows_as_torch_does(module, arguments):
    assert repr(module(**arguments)) == repr(getattr(nn, module.__name__)(**arguments))


def test_shows_its_seed():
    assert repr(Dropout(0.2, seed=42)) == f"Dropout(p=0.2, inplace=False, seed={Key(42)!r})"


@pytest.mark.parametrize(
    "convert",
    [
        lambda module: module.half(),
        lambda module: module.double(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
    ],
    ids=["half", "double", "to bfloat16", "to device and float16"],
)
def test_keeps_call_number_whole_when_converted(convert):
    module = Dropout(seed=SITE)
    module.calls = 2**40 + 1
    module = convert(module)
    x = numbers(37)
    assert patterns(module(x)) == expected_patterns(x, 0.5, SITE.fold_in(2**40 + 1))
    assert module.calls == 2**40 + 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_continues_alone_as_copy(copied):
    module, x = Dropout(0.1, seed=SITE), numbers(37)
    module(x)
    twin = copied(module)
    for n in (1, 2):
        assert patterns(twin(x)) == expected_patterns(x, 0.1, SITE.fold_in(n))
    assert (module.calls, twin.calls) == (1, 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_has_no_state_as_copy_without_seed(copied):
    assert copied(Dropout(0.1)).state_dict() == {}


def test_is_saved_and_loaded_with_its_model():
    model, file = nn.Sequential(nn.Linear(3, 3), Dropout(0.1, seed=SITE)), io.BytesIO()
    model(torch.ones(2, 3))
    torch.save(model, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)[1].calls == 1


# --- The call number ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 5, 2**40, 2**63 - 2])
@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
def test_accepts_call_number(value, kind):
    module, x = Dropout(seed=SITE), numbers(37)
    module.calls = kind(value)
    assert patterns(module(x)) == expected_patterns(x, 0.5, SITE.fold_in(value))
    assert module.calls == value + 1


def test_leaves_tensor_that_set_call_number():
    module, step = Dropout(seed=SITE), torch.tensor(5)
    module.calls = step
    module(torch.ones(3))
    assert step == 5


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1, ValueError),
        (2**63, ValueError),
        (True, TypeError),
        (1.0, TypeError),
        ("5", TypeError),
        (None, TypeError),
        (torch.tensor(5.5), TypeError),
        (torch.tensor([1, 2]), (TypeError, ValueError)),
    ],
    ids=repr,
)
def test_rejects_bad_call_number_and_keeps_old(value, error):
    module = Dropout(seed=SITE)
    module.calls = 3
    with pytest.raises(error, match=rf"^calls must be .*{re.escape(str(value))}"):
        module.calls = value
    assert module.calls == 3
    assert module.calls.dtype == torch.int64


# --- State ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_has_state_of_torch_without_seed(module):
    assert module().state_dict() == getattr(nn, module.__name__)().state_dict() == {}


def test_has_no_state_after_call_without_seed():
    module = Dropout()
    module(torch.ones(3))
    assert module.state_dict() == {}


def test_has_call_number_as_state_with_seed():
    module = Dropout(seed=SITE)
    module(torch.ones(3))
    assert saved_calls(module.state_dict()) == {"": 1}


def test_resumes_loaded_run():
    model, x = nn.Sequential(nn.Identity(), Dropout(seed=SITE)), numbers(37)
    model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    resumed = nn.Sequential(nn.Identity(), Dropout(seed=SITE))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed(x), model(x))
    assert resumed[1].calls == 2


def test_leaves_loaded_checkpoint_as_it_was():
    state = {"_extra_state": saved_number(5)}
    module = Dropout(seed=SITE)
    module.load_state_dict(state)
    module(torch.ones(3))
    assert (int(module.calls), saved_calls(state)) == (6, {"": 5})


def network(make, depth=0):
    """Return a small network with a dropout, nested ``depth`` deep."""
    inner = nn.Sequential(nn.Linear(3, 3), make(), nn.Linear(3, 2))
    for _ in range(depth):
        inner = nn.Sequential(nn.ReLU(), inner)
    return inner


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("seed", [None, SITE], ids=["unseeded", "seeded"])
@pytest.mark.parametrize("module", MODULES)
def test_loads_checkpoint_of_torch_strictly(module, seed, depth):
    of_torch = network(getattr(nn, module.__name__), depth)
    mine = network(lambda: module(seed=seed), depth)
    loaded = mine.load_state_dict(of_torch.state_dict(), strict=True)
    assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
    assert torch.equal(mine.state_dict().popitem()[1], of_torch.state_dict().popitem()[1])


def test_keeps_call_number_if_checkpoint_has_none():
    module = Dropout(seed=SITE)
    module.calls = 5
    module.load_state_dict(nn.Dropout().state_dict())
    assert module.calls == 5


def test_saves_unseeded_checkpoint_that_torch_loads():
    network(nn.Dropout).load_state_dict(network(Dropout).state_dict(), strict=True)


def test_rejects_checkpoint_that_lacks_other_keys():
    mine = network(lambda: Dropout(seed=SITE))
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        mine.load_state_dict({}, strict=True)


# --- Training, threads, devices -------------------------------------------------------------------


def test_trains_a_network():
    torch.manual_seed(0)
    model = network(lambda: Dropout(0.2, seed=SITE))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, target = numbers(64, 3), numbers(64, 3)[:, :2] * 0.5
    losses = []
    for _ in range(30):
        loss = ((model(x) - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert model[1].calls == 30


def test_explains_that_calls_need_a_seed():
    module = Dropout()
    with pytest.raises(AttributeError, match=r"without a seed .* make it with seed="):
        module.calls = 3
    with pytest.raises(AttributeError, match=r"without a seed .* make it with seed=") as raised:
        module.calls  # noqa: B018 # reading it is what raises
    assert raised.value.name == "calls"
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        module.other  # noqa: B018 # as above


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_has_no_calls_without_seed(copied):
    module = copied(Dropout())
    assert not hasattr(module, "calls")
    assert not module.state_dict()


def masks_of_calls_in_threads(layer, ones, calls, as_bytes):
    """Call one layer from many threads; return each call's mask."""
    with ThreadPoolExecutor(8) as pool:
        return sorted(pool.map(lambda _: as_bytes(layer(ones)), range(calls)))


def test_gives_threads_call_numbers_of_their_own():
    module = Dropout(seed=SITE)
    ones = torch.ones(257)
    masks = masks_of_calls_in_threads(module, ones, 200, lambda y: y.numpy().tobytes())
    expected = [dropout(ones, key=SITE.fold_in(n)).numpy().tobytes() for n in range(200)]
    assert masks == sorted(expected)
    assert module.calls == 200


def test_gives_data_parallel_replicas_same_call_number():
    module, masks = Dropout(seed=SITE), []
    for _ in range(2):
        replica = module._replicate_for_data_parallel()
        replica._calls = module._calls.clone()  # as torch.nn.parallel.replicate sets it
        masks.append(patterns(replica(torch.ones(37))))
        assert replica.calls == 1
    assert masks[0] == masks[1]
    assert module.calls == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=get_name)
def test_keeps_call_number_integer_when_cast(dtype):
    module = Dropout(seed=SITE)
    module.calls = 2049
    module.type(dtype)
    assert module.calls.dtype == torch.int64
    assert module.calls == 2049


@pytest.mark.parametrize(
    "prepare",
    [
        lambda module: setattr(module, "calls", 5),
        lambda module: module.load_state_dict({"_extra_state": saved_number(5)}, assign=True),
    ],
    ids=["set", "loaded"],
)
def test_replaces_meta_buffer_by_call_number(prepare):
    with torch.device("meta"):
        module = Dropout(seed=SITE)
    prepare(module)
    assert patterns(module(torch.ones(37))) == patterns(
        dropout(torch.ones(37), key=SITE.fold_in(5))
    )
    assert module.calls == 6


def test_counts_from_0_after_reset_parameters():
    with torch.device("meta"):
        module = Dropout(seed=SITE)
    module.to_empty(device="cpu").reset_parameters()
    assert module.calls == 0


def test_counts_from_0_after_assigned_checkpoint_on_meta():
    with torch.device("meta"):
        module = Dropout(seed=SITE)
    module.load_state_dict(nn.Dropout().state_dict(), assign=True)
    module(torch.ones(3))
    assert module.calls == 1


def test_rolls_back_call_that_fails(monkeypatch):
    module = Dropout(seed=SITE)

    def out_of_memory(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", out_of_memory)
        with pytest.raises(MemoryError):
            module(torch.ones(3))
    assert module.calls == 0


def test_rejects_seed_in_place_of_inplace():
    with pytest.raises(TypeError, match=r"inplace must be a bool, got 42; pass a seed as seed="):
        Dropout(0.2, 42)


# --- Bad input ------------------------------------------------------------------------------------


def test_rejects_bad_rate_assigned_later():
    module = Dropout(seed=SITE)
    module.p = 1.5
    with pytest.raises(ValueError, match=r"probability p has to be .*got 1\.5"):
        module(torch.ones(3))
    assert module.calls == 0


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("seed", "error"),
    [
        (-1, ValueError),
        (2**64, ValueError),
        (True, TypeError),
        (1.0, TypeError),
        ("encoder", TypeError),
        (b"1", TypeError),
    ],
    ids=repr,
)
def test_rejects_non_seed(module, seed, error):
    with pytest.raises(error, match=rf"^seed must be .*{re.escape(str(seed))}"):
        module(seed=seed)


# --- Channels -------------------------------------------------------------------------------------


FEATURES = [
    pytest.param(1, (4, 5), (1,), id="dropout1d of (C, L)"),
    pytest.param(1, (3, 4, 5), (2,), id="dropout1d of (N, C, L)"),
    pytest.param(2, (3, 4, 5, 6), (2, 3), id="dropout2d of (N, C, H, W)"),
    pytest.param(3, (3, 4, 5, 6), (1, 2, 3), id="dropout3d of (C, D, H, W)"),
    pytest.param(3, (2, 3, 4, 5, 6), (2, 3, 4), id="dropout3d of (N, C, D, H, W)"),
]


@pytest.mark.parametrize(("n", "shape", "axes"), FEATURES)
@pytest.mark.parametrize("inplace", [False, True])
def test_drops_whole_channels(n, shape, axes, inplace):
    x = numbers(*shape)
    expected = expected_patterns(x, 0.1, KEY, axes)
    y = getattr(ours, f"dropout{n}d")(x, 0.1, inplace=inplace, key=KEY)
    assert patterns(y) == expected
    assert (y is x) == inplace


@pytest.mark.parametrize(("n", "shape", "axes"), FEATURES)
def test_drops_whole_channels_in_module_and_counts(n, shape, axes):
    x, module = numbers(*shape), getattr(ours, f"Dropout{n}d")(0.1, seed=SITE)
    for call in range(2):
        assert patterns(module(x)) == expected_patterns(x, 0.1, SITE.fold_in(call), axes)
    assert module.calls == 2


@pytest.mark.parametrize(("n", "shape", "axes"), FEATURES)
def test_drops_same_channels_in_gradient(n, shape, axes):
    x = numbers(*shape, requires_grad=True)
    upstream = numbers(*shape)
    getattr(ours, f"dropout{n}d")(x, 0.1, key=KEY).backward(upstream)
    assert patterns(x.grad) == expected_patterns(upstream, 0.1, KEY, axes)


def behaviour(call, shape):
    """Return what a call does with ones: the axes that share decisions, its warnings, its error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            y = call(torch.ones(shape))
        except RuntimeError as error:
            shared = f"{type(error).__name__}: {error}"[:70]
        else:
            shared = [
                axis
                for axis in range(y.dim())
                if torch.equal(y, y.narrow(axis, 0, 1).expand(shape))
            ]
    return shared, [(warning.category, str(warning.message)[:30]) for warning in caught]


@pytest.mark.parametrize("mode", ["function", "training", "evaluation"])
@pytest.mark.parametrize("dimensions", range(2, 7))
@pytest.mark.parametrize("n", [1, 2, 3])
def test_treats_input_of_any_rank_as_torch_does(n, dimensions, mode):
    if mode == "function":
        calls = [getattr(module, f"dropout{n}d") for module in (native, ours)]
    else:
        calls = [
            getattr(module, f"Dropout{n}d")().train(mode == "training") for module in (nn, ours)
        ]
    torch.manual_seed(0)
    of_torch, mine = (behaviour(call, (6,) * dimensions) for call in calls)
    assert mine == of_torch


@pytest.mark.parametrize(("n", "dimensions"), [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)])
def test_rejects_too_few_dimensions_as_torch_does(n, dimensions):
    of_torch, mine = (
        behaviour(getattr(module, f"dropout{n}d"), (6,) * dimensions) for module in (native, ours)
    )
    assert "RuntimeError" in of_torch[0]
    assert mine == of_torch


@pytest.mark.parametrize("n", [1, 2, 3])
def test_counts_no_call_that_rejects_rank(n):
    module = getattr(ours, f"Dropout{n}d")(seed=SITE)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(RuntimeError, match=r"Expected 2D or 3D|at least 2 dimensions"),
    ):
        module(torch.ones(()))
    assert module.calls == 0
