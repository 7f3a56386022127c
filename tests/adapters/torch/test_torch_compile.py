"""Dropout under torch.compile: one graph, and the masks of eager calls."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch_checkpoints import saved_calls

import unidrop
from unidrop import Key, keep_mask
from unidrop.adapters.torch import Dropout, Dropout1d, Dropout2d, Dropout3d, dropout
from unidrop.conformance.backends.torch import Torch
from unidrop.conformance.compare import check_output
from unidrop.conformance.golden import golden_outputs
from unidrop.dtypes import DTYPES

SITE = Key(42).fold_in("encoder/0")


def mask(call, shape, p=0.5, site=SITE, **options):
    """Return the scaled mask of a call, which NumPy makes."""
    keep = torch.from_numpy(keep_mask(shape, p, site.fold_in(call), **options))
    return keep.float() * torch.tensor(1 / (1 - p), dtype=torch.float32)


# Inductor imports what torch.jit has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


# aot_eager traces forward and backward as Inductor has them, without generating code.
BACKENDS = [
    "aot_eager",
    pytest.param("eager", marks=pytest.mark.slow),
    pytest.param("inductor", marks=pytest.mark.slow),
]


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture(params=BACKENDS)
def backend(request):
    mask(0, (1,))  # a process's first NumPy array makes Dynamo retrace earlier functions
    torch._dynamo.reset()
    return CompileCounterWithBackend(request.param)


def compiled(function, backend, **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def gradient(y, x):
    return torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("make", [Dropout, Dropout1d, Dropout2d, Dropout3d])
def test_makes_one_graph_of_seeded_module(make, backend):
    module, twin, x = make(0.3, seed=SITE), make(0.3, seed=SITE), numbers(2, 3, 4, 5, 6)
    if make is Dropout1d:
        x = numbers(2, 3, 4)
    if make is Dropout2d:
        x = numbers(2, 3, 4, 5)
    call = compiled(module, backend)
    for _ in range(20):
        y, expected = call(x), twin(x)
        assert torch.equal(y, expected)
        assert torch.equal(gradient(y, x), gradient(expected, x))
    assert (backend.frame_count, int(module.calls)) == (1, 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_golden_vectors_at_every_dtype(dtype, backend):
    column, p = Torch(), 0.4
    call = compiled(lambda x, step: dropout(x, p, key=Key(42).fold_in(step)), backend)
    chosen = [g for g in golden_outputs() if (g.dtype, g.p, g.seed) == (dtype, p, 42)]
    assert chosen
    for golden in chosen:
        x = column.from_numpy(golden.x, "cpu", "compile").requires_grad_()
        y = call(x, torch.tensor(golden.step))
        (actual,) = torch.autograd.grad(y, x, x.detach())
        for array in (y, actual):
            check_output(column.to_numpy(array), golden.y, golden.x, golden.name)
    assert backend.frame_count == 1


def test_makes_one_graph_for_steps_of_tensors(backend):
    call = compiled(lambda x, step: dropout(x, key=SITE.fold_in(step)), backend)
    for step in range(100):
        assert torch.equal(call(torch.ones(5, 7), torch.tensor(step)), mask(step, (5, 7)))
    assert backend.frame_count == 1


def test_accepts_python_integers_as_steps(backend):
    call = compiled(lambda x, step: dropout(x, key=SITE.fold_in(step)), backend)
    steps = (3, 0, 2**64 - 1)
    for step in (*steps, *steps):
        assert torch.equal(call(torch.ones(5, 7), step), mask(step, (5, 7)))
    assert backend.frame_count <= len(steps)


@pytest.mark.parametrize("data", ["encoder/0", "", "\u00e9"])
def test_folds_in_string_within_graph(data, backend):
    def function(x, step):
        return dropout(x, key=Key(7).fold_in(data).fold_in(step))

    call = compiled(function, backend)
    for step in range(3):
        expected = mask(step, (5, 7), site=Key(7).fold_in(data))
        assert torch.equal(call(torch.ones(5, 7), torch.tensor(step)), expected)
    assert backend.frame_count == 1


def test_accepts_python_integers_as_start_within_graph(backend):
    def function(x, row):
        return unidrop.dropout(x, 0.5, SITE, global_shape=(9, 7), start=(row, 0))

    call, whole = compiled(function, backend), unidrop.dropout(torch.ones(9, 7), 0.5, SITE)
    for row in (0, 1, 4):
        assert torch.equal(call(torch.ones(5, 7), row), whole[row : row + 5])


def test_draws_as_eager_calls_do_in_their_order(backend):
    model = nn.Sequential(Dropout(), Dropout(), nn.Linear(6, 6), Dropout2d(), Dropout(0.3))
    call, x = compiled(model, backend), numbers(2, 3, 4, 6)
    for seed in range(5):
        torch.manual_seed(seed)
        y = call(x)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        expected = model(x)
        torch.testing.assert_close(y, expected)
        assert torch.equal(y == 0, expected == 0)
        torch.testing.assert_close(gradient(y, x), gradient(expected, x))
        assert torch.equal(state, torch.get_rng_state())
    assert backend.frame_count == 1


def test_advances_generator_for_unused_output(backend):
    def function(x):
        dropout(x)
        return dropout(x)

    torch.manual_seed(5)
    y = compiled(function, backend)(torch.ones(370))
    torch.manual_seed(5)
    assert torch.equal(y, function(torch.ones(370)))


class Block(nn.Module):
    def __init__(self, seed, p=0.5):
        super().__init__()
        self.linear = nn.Linear(7, 7)
        self.dropout = Dropout(p, seed=seed)

    def forward(self, x):
        return self.dropout(self.linear(x))


def test_shares_one_graph_between_six_seeds(backend):
    blocks = [Block(SITE.fold_in(i)) for i in range(6)]
    for _ in range(2):
        for i, block in enumerate(blocks):
            call = int(block.dropout.calls)
            y = compiled(block, backend)(torch.ones(3, 7))
            assert torch.equal(y != 0, mask(call, (3, 7), site=SITE.fold_in(i)) != 0)
    assert backend.frame_count == 1


@pytest.mark.parametrize("in_region", [False, True])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_makes_graphs_for_different_rates(backend, in_region, needs_gradient):
    def apply(module, x):
        return checkpoint(module, x, use_reentrant=False) if in_region else module(x)

    for p in (1 / 3, 0.1, 0.6):
        module = Dropout(p, seed=SITE)
        x = torch.ones(37, requires_grad=needs_gradient)
        assert torch.equal(compiled(lambda x, m=module: apply(m, x), backend)(x), mask(0, (37,), p))


def test_switches_training_on_and_off(backend):
    module, x = Dropout(seed=SITE), torch.ones(5, 7)
    call = compiled(module, backend)
    for step in range(4):
        module.train()
        assert torch.equal(call(x), mask(step, (5, 7)))
        module.eval()
        assert torch.equal(call(x), x)
    assert int(module.calls) == 4
    assert backend.frame_count <= 2


def test_accepts_dynamic_lengths(backend):
    module = Dropout(seed=SITE)
    call = compiled(module, backend, dynamic=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step, length in enumerate((3, 5, 8, 13, 64)):
        x = torch.ones(length, 7, requires_grad=True)
        y = call(x)
        assert torch.equal(y, mask(step, (length, 7)))
        assert torch.equal(gradient(y, x), mask(step, (length, 7)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_writes_in_place(backend):
    module, x = Dropout(inplace=True, seed=SITE), torch.ones(5, 7)
    assert torch.equal(compiled(module, backend)(x), mask(0, (5, 7)))
    assert torch.equal(x, mask(0, (5, 7)))


def test_records_windows_and_masks(backend):
    options = {"broadcast_axes": (1,), "global_shape": (10, 5, 6)}

    def function(x, step, start):
        key = SITE.fold_in(step)
        return unidrop.dropout(x, 0.5, key, start=(start, 0, 0), return_mask=True, **options)

    call = compiled(function, backend)
    for step in range(4):
        x = numbers(2, 5, 6)
        y, keep = call(x, torch.tensor(step), torch.tensor(2 * step))
        expected = mask(step, (2, 5, 6), start=(2 * step, 0, 0), **options)
        assert torch.equal(y, x * expected)
        assert torch.equal(keep, expected != 0)
        assert torch.equal(gradient(y, x), expected.expand(2, 5, 6))
    assert backend.frame_count == 1


@pytest.mark.parametrize("seed", [SITE, None], ids=["seeded", "unseeded"])
def test_keeps_few_words_for_backward_pass(backend, seed):
    kept = []
    call = compiled(nn.Sequential(Dropout(seed=seed), Dropout(0.3, seed=seed)), backend)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.nbytes) or t, lambda t: t
    ):
        call(numbers(64, 64))
    assert sum(kept) <= 64


@pytest.mark.parametrize("where", ["around", "inside", "both"])
@pytest.mark.parametrize("seed", [SITE, None], ids=["seeded", "unseeded"])
def test_recomputes_first_masks_in_checkpoints(backend, where, seed):
    block = Block(seed)

    def region(x):
        return block(x).exp().sin()

    def inner(x):
        return checkpoint(region, x, use_reentrant=False) if where != "around" else region(x)

    call = compiled(lambda x: inner(inner(x)), backend)

    def run(x):
        return call(x) if where == "inside" else checkpoint(call, x, use_reentrant=False)

    for step in range(3):
        x = numbers(5, 7)
        torch.manual_seed(step)
        y = run(x)
        actual = gradient(y, x)
        if seed is not None:
            assert block.dropout.calls == 2 * step + 2
            block.dropout.calls = 2 * step
        torch.manual_seed(step)
        expected = region(region(x))
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(actual, gradient(expected, x))


@pytest.mark.slow
def test_trains_100_steps_alike_in_every_mode():
    torch._dynamo.reset()
    start = nn.Sequential(
        nn.Linear(8, 16), Dropout(0.2, seed=SITE), Dropout(0.5, seed=1), nn.Linear(16, 2)
    )
    models = {
        name: copy.deepcopy(start)
        for name in ("eager", "compile", "checkpoint", "both", "functional")
    }
    both, functional = models["both"], models["functional"]

    def call_functional(x):
        state = dict(functional.named_parameters()) | dict(functional.named_buffers())
        return torch.func.functional_call(functional, state, (x,))

    calls = {
        "eager": models["eager"],
        "compile": torch.compile(models["compile"], fullgraph=True),
        "checkpoint": lambda x: checkpoint(models["checkpoint"], x, use_reentrant=False),
        "both": torch.compile(lambda x: checkpoint(both, x, use_reentrant=False), fullgraph=True),
        "functional": call_functional,
    }
    generator, losses = torch.Generator().manual_seed(0), {name: [] for name in calls}
    optimizers = {name: torch.optim.SGD(model.parameters(), 0.05) for name, model in models.items()}
    for _ in range(100):
        x = torch.randn(4, 8, generator=generator)
        for name, call in calls.items():
            optimizers[name].zero_grad()
            loss = call(x).square().mean()
            loss.backward()
            optimizers[name].step()
            losses[name].append(loss.detach())
    for name, model in models.items():
        torch.testing.assert_close(torch.stack(losses[name]), torch.stack(losses["eager"]))
        assert [int(model[i].calls) for i in (1, 2)] == [100, 100]


def test_has_call_number_alone_as_state():
    module = Dropout(seed=SITE)
    compiled(module, "eager")(torch.ones(3))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert saved_calls(torch.load(file)) == {"": 1}
    twin = copy.deepcopy(module).to_empty(device="cpu")
    twin.calls = 1
    assert torch.equal(compiled(twin, "eager")(torch.ones(37)), mask(1, (37,)))
