"""Tests of dropout under torch.compile and torch.export: one graph, the masks of eager calls."""

import copy
import io
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import unidrop
from unidrop import Key, keep_mask
from unidrop.adapters.torch import Dropout, Dropout1d, Dropout2d, Dropout3d, dropout
from unidrop.conformance.backends.torch import Torch
from unidrop.conformance.compare import check_output
from unidrop.conformance.golden import golden_outputs
from unidrop.dtypes import DTYPES

# Inductor imports what torch.jit has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

SITE = Key(42).fold_in("encoder/0")
BACKENDS = ["eager", "aot_eager", "inductor"]


def mask(call, shape, p=0.5, site=SITE, **options):
    """Return the scaled mask of a call, which NumPy makes."""
    keep = torch.from_numpy(keep_mask(shape, p, site.fold_in(call), **options))
    return keep.float() * torch.tensor(1 / (1 - p), dtype=torch.float32)


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture(params=BACKENDS)
def backend(request):
    mask(0, (1,))  # the first NumPy array of a process has what was traced before traced again
    torch._dynamo.reset()
    return CompileCounterWithBackend(request.param)


def compiled(function, backend, **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def gradient(y, x):
    return torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("make", [Dropout, Dropout1d, Dropout2d, Dropout3d])
def test_a_seeded_module_is_one_graph_over_100_calls(make, backend):
    module, twin, x = make(0.3, seed=SITE), make(0.3, seed=SITE), numbers(2, 3, 4, 5, 6)
    if make is Dropout1d:
        x = numbers(2, 3, 4)
    if make is Dropout2d:
        x = numbers(2, 3, 4, 5)
    call = compiled(module, backend)
    for _ in range(100):
        y, expected = call(x), twin(x)
        assert torch.equal(y, expected)
        assert torch.equal(gradient(y, x), gradient(expected, x))
    assert (backend.frame_count, int(module.calls)) == (1, 100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients_are_those_of_the_golden_vectors_at_every_dtype(dtype, backend):
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


def test_a_step_that_is_a_tensor_is_one_graph_over_100_steps(backend):
    call = compiled(lambda x, step: dropout(x, key=SITE.fold_in(step)), backend)
    for step in range(100):
        assert torch.equal(call(torch.ones(5, 7), torch.tensor(step)), mask(step, (5, 7)))
    assert backend.frame_count == 1


def test_integers_of_python_are_constants_of_a_full_graph(backend):
    call = compiled(lambda x, step: dropout(x, key=SITE.fold_in(step)), backend)
    steps = (3, 0, 2**64 - 1)
    for step in (*steps, *steps):
        assert torch.equal(call(torch.ones(5, 7), step), mask(step, (5, 7)))
    assert backend.frame_count == len(steps)


@pytest.mark.parametrize("data", ["encoder/0", "", "\u00e9"])
def test_a_string_is_folded_in_within_a_full_graph(data, backend):
    def function(x, step):
        return dropout(x, key=Key(7).fold_in(data).fold_in(step))

    call = compiled(function, backend)
    for step in range(3):
        expected = mask(step, (5, 7), site=Key(7).fold_in(data))
        assert torch.equal(call(torch.ones(5, 7), torch.tensor(step)), expected)
    assert backend.frame_count == 1


def test_a_window_begins_at_integers_of_python_within_a_full_graph(backend):
    def function(x, row):
        return unidrop.dropout(x, 0.5, SITE, global_shape=(9, 7), start=(row, 0))

    call, whole = compiled(function, backend), unidrop.dropout(torch.ones(9, 7), 0.5, SITE)
    for row in (0, 1, 4):
        assert torch.equal(call(torch.ones(5, 7), row), whole[row : row + 5])


def test_unseeded_calls_draw_what_eager_ones_draw_in_their_order(backend):
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


def test_a_draw_whose_output_is_not_used_still_advances_the_generator(backend):
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


def test_six_blocks_of_different_seeds_share_one_graph(backend):
    blocks = [Block(SITE.fold_in(i)) for i in range(6)]
    for _ in range(2):
        for i, block in enumerate(blocks):
            call = int(block.dropout.calls)
            y = compiled(block, backend)(torch.ones(3, 7))
            assert torch.equal(y != 0, mask(call, (3, 7), site=SITE.fold_in(i)) != 0)
    assert backend.frame_count == 1


@pytest.mark.parametrize("in_region", [False, True])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_blocks_of_different_rates_have_their_own(backend, in_region, needs_gradient):
    def apply(module, x):
        return checkpoint(module, x, use_reentrant=False) if in_region else module(x)

    for p in (1 / 3, 0.1, 0.2, 0.6):
        module = Dropout(p, seed=SITE)
        x = torch.ones(37, requires_grad=needs_gradient)
        assert torch.equal(compiled(lambda x, m=module: apply(m, x), backend)(x), mask(0, (37,), p))


def test_training_is_switched_on_and_off_with_a_graph_for_each(backend):
    module, x = Dropout(seed=SITE), torch.ones(5, 7)
    call = compiled(module, backend)
    for step in range(4):
        module.train()
        assert torch.equal(call(x), mask(step, (5, 7)))
        module.eval()
        assert torch.equal(call(x), x)
    assert int(module.calls) == 4
    assert backend.frame_count <= 2


def test_lengths_may_be_dynamic(backend):
    module = Dropout(seed=SITE)
    call = compiled(module, backend, dynamic=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step, length in enumerate((3, 5, 8, 13, 64)):
        x = torch.ones(length, 7, requires_grad=True)
        y = call(x)
        assert torch.equal(y, mask(step, (length, 7)))
        assert torch.equal(gradient(y, x), mask(step, (length, 7)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_in_place_the_input_is_written(backend):
    module, x = Dropout(inplace=True, seed=SITE), torch.ones(5, 7)
    assert torch.equal(compiled(module, backend)(x), mask(0, (5, 7)))
    assert torch.equal(x, mask(0, (5, 7)))


def test_windows_and_masks_are_recorded_too(backend):
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
def test_a_few_words_are_kept_for_the_backward_pass_and_no_mask(backend, seed):
    kept = []
    call = compiled(nn.Sequential(Dropout(seed=seed), Dropout(0.3, seed=seed)), backend)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.nbytes) or t, lambda t: t
    ):
        call(numbers(64, 64))
    assert sum(kept) <= 64


@pytest.mark.parametrize("where", ["around", "inside", "both"])
@pytest.mark.parametrize("seed", [SITE, None], ids=["seeded", "unseeded"])
def test_checkpoints_around_and_inside_a_compiled_model_have_the_first_masks(backend, where, seed):
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


def test_100_training_steps_have_the_same_masks_in_every_mode():
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


# --- Export and the like -------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.first, self.second = Dropout(seed=seed), Dropout2d(seed=seed)

    def forward(self, x):
        return self.first(x), self.second(x.reshape(3, 4, 4, 4))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("seed", [SITE, None], ids=["seeded", "unseeded"])
def test_an_exported_program_has_the_masks_of_the_calls_that_follow(seed, strict, decomposed):
    model, x = Net(seed), torch.ones(3, 64)
    program = torch.export.export(copy.deepcopy(model), (x,), strict=strict)
    exported = (program.run_decompositions() if decomposed else program).module()
    for step in range(3):
        torch.manual_seed(step)
        actual = exported(x)
        torch.manual_seed(step)
        assert all(map(torch.equal, actual, model(x)))
    if seed is not None:
        assert exported.get_buffer("first.calls") == 3


def test_a_program_that_is_exported_in_evaluation_is_the_identity():
    program = torch.export.export(Dropout(seed=SITE).eval(), (torch.ones(3, 64),))
    assert "dropout" not in str(program.graph)
    assert torch.equal(program.module()(torch.ones(3, 64)), torch.ones(3, 64))


def test_an_exported_program_takes_other_lengths():
    length = torch.export.Dim("length", min=2, max=100)
    program = torch.export.export(
        Dropout(seed=SITE), (torch.ones(3, 64),), dynamic_shapes=({0: length},)
    ).module()
    assert torch.equal(program(torch.ones(3, 64)), mask(0, (3, 64)))
    assert torch.equal(program(torch.ones(7, 64)), mask(1, (7, 64)))


def test_an_exported_program_that_is_saved_goes_on_in_a_new_process(tmp_path):
    path = tmp_path / "program.pt2"
    program = torch.export.export(Dropout(seed=SITE), (torch.ones(3, 64),))
    torch.export.save(program, path)
    script = (
        "import sys, torch, unidrop.adapters.torch\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "for _ in range(2):\n"
        "    print(''.join(str(int(u != 0)) for u in program(torch.ones(3, 64)).flatten()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
    )
    expected = [
        "".join(str(int(u != 0)) for u in mask(call, (3, 64)).flatten()) for call in range(2)
    ]
    assert done.stdout.split() == expected


def test_make_fx_records_the_call_and_not_its_mask():
    module, x = Dropout(seed=SITE), torch.ones(3, 64)
    graph = make_fx(module)(x)
    for call in range(int(module.calls), int(module.calls) + 2):
        assert torch.equal(graph(x), mask(call, (3, 64)))


@pytest.mark.parametrize("seed", [SITE, None], ids=["seeded", "unseeded"])
def test_fake_tensors_have_fake_outputs(seed):
    with torch._subclasses.FakeTensorMode():
        model, x = nn.Sequential(nn.Linear(4, 5), Dropout(seed=seed)), torch.ones(2, 4)
        y = model(x)
        y.sum().backward()
    assert (type(y), y.shape) == (torch._subclasses.FakeTensor, (2, 5))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("seed", [SITE, None], ids=["seeded", "unseeded"])
def test_torch_jit_is_refused_in_words_that_say_what_to_use(seed):
    for compile_by_jit in (torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(3))):
        with pytest.raises(RuntimeError, match=re.escape("use torch.compile or torch.export")):
            compile_by_jit(Dropout(seed=seed))
    traced = torch.jit.trace(Dropout(seed=seed).eval(), torch.ones(3))
    assert torch.equal(traced(torch.ones(3)), torch.ones(3))


def test_the_state_of_a_module_is_its_call_number_alone():
    module = Dropout(seed=SITE)
    compiled(module, "eager")(torch.ones(3))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert torch.load(file) == {"calls": torch.tensor(1)}
    twin = copy.deepcopy(module).to_empty(device="cpu")
    twin.calls = 1
    assert torch.equal(compiled(twin, "eager")(torch.ones(37)), mask(1, (37,)))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(-1, "int8"), (-1, "int32"), (-1, "int64"), (255, "uint8"), (2**63 + 5, "uint64")],
)
def test_a_step_of_any_integer_dtype_folds_as_eagerly(value, dtype):
    step = torch.tensor(value, dtype=getattr(torch, dtype))
    x = torch.ones(64)

    def drop(x, step):
        return dropout(x, 0.5, key=Key(42).fold_in(step))

    compiled = torch.compile(drop, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, step), drop(x, step))
    in_vmap = torch.vmap(drop, in_dims=(0, None), randomness="same")
    assert torch.equal(in_vmap(x[None], step)[0], drop(x, step))


# --- Keys of two tensors -------------------------------------------------------------------------


def test_a_key_of_two_tensors_is_recorded_as_operators_alone():
    graphs = []
    mask(0, (1,))  # as in the fixture above

    def kept(graph, inputs):
        graphs.append(graph)
        return graph

    def drop(x, lo, hi, step):
        return dropout(x, 0.5, key=Key.from_words(lo, hi).fold_in(step))

    call, words = torch.compile(drop, fullgraph=True, backend=kept), torch.tensor(SITE.words)
    for step in range(3):
        assert torch.equal(call(torch.ones(5, 7), *words, torch.tensor(step)), mask(step, (5, 7)))
    (graph,) = graphs
    graph.graph.eliminate_dead_code()  # the question whether torch.func transforms is a node too
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert called == ["unidrop.joined", "unidrop.fold_in", "unidrop.dropout"]


@pytest.mark.parametrize("dtype", ["int64", "uint64", "uint32", "int32"])
@pytest.mark.parametrize("transform", ["compile", "make_fx", "vmap", "vjp"])
def test_words_of_any_integer_dtype_make_the_key_of_their_low_32_bits(transform, dtype):
    lo, hi = 0xDDCCBBAA - (1 << 32 if dtype == "int32" else 0), 0x10
    given = [torch.tensor(word, dtype=getattr(torch, dtype)) for word in (lo, hi)]
    if dtype.endswith("64"):
        given[1] = torch.tensor(hi + (5 << 40), dtype=getattr(torch, dtype))

    def words(lo, hi):
        return torch.stack(Key.from_words(lo, hi).words)

    run = {
        "compile": lambda: compiled(words, "eager")(*given),
        "make_fx": lambda: make_fx(words)(*given)(*given),
        "vmap": lambda: torch.vmap(words)(*(word.expand(2) for word in given))[1],
        "vjp": lambda: torch.func.vjp(lambda x: (x, words(*given)), torch.ones(1), has_aux=True)[2],
    }
    assert run[transform]().tolist() == [0xDDCCBBAA, 0x10]


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
def test_a_batch_of_keys_of_two_tensors_drops_from_each_by_its_own(in_dims):
    def drop(lo, hi):
        return dropout(torch.ones(37), key=Key.from_words(lo, hi).fold_in(torch.tensor(7)))

    lo, hi = (torch.arange(3) if dim == 0 else torch.tensor(5) for dim in in_dims)
    actual = torch.vmap(drop, in_dims=in_dims)(lo, hi)
    for each, lo_i, hi_i in zip(actual, lo.expand(3).tolist(), hi.expand(3).tolist(), strict=True):
        assert torch.equal(each, mask(7, (37,), site=Key.from_words(lo_i, hi_i)))


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ((torch.ones(()), torch.tensor(1)), TypeError, "lo must be an integer"),
        ((torch.tensor(1), torch.ones(())), TypeError, "hi must be an integer"),
        ((torch.tensor(1), torch.ones(2, dtype=torch.int64)), ValueError, "hi must be 0-d"),
    ],
)
def test_what_is_no_word_raises_where_keys_are_recorded_too(words, error, message):
    def key(lo, hi):
        return Key.from_words(lo, hi)

    for make in (key, make_fx(key)):
        with pytest.raises(error, match=message):
            make(*words)
