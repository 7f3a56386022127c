"""Tests of dropout under torch.utils.checkpoint: recomputation reuses the original masks."""

import contextlib
import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.distributed._composable import checkpoint as composable
from torch.utils import checkpoint as torchs
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

from unidrop import Key, keep_mask
from unidrop.adapters.torch import Dropout, dropout
from unidrop.adapters.torch import checkpoint as torch_checkpoint

SITE = Key(42).fold_in("encoder/0")
WIDTH = 64


def mask(call, site=SITE, shape=(3, WIDTH)):
    """Return the scaled mask of a call, which NumPy makes."""
    return torch.from_numpy(keep_mask(shape, 0.5, site.fold_in(call))) * 2.0


def numbers():
    """Return the same input at every call."""
    x = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)
    return x.requires_grad_()


def region(layer):
    """Return a function whose gradient needs the layer's output, and so its recomputation."""
    return lambda x: (layer(x.exp()) * 1.5).sin()


def by_hand(x, *masks):
    """Return what `region` computes, with masks that are constants, a region for each."""
    for scaled in masks:
        x = (x.exp() * scaled * 1.5).sin()
    return x


def gradient_by_hand(*masks):
    """Return the gradient of the sum of `by_hand`."""
    x = numbers()
    by_hand(x, *masks).sum().backward()
    return x.grad


def assert_gradient(x, *masks):
    torch.testing.assert_close(x.grad, gradient_by_hand(*masks))


@pytest.fixture(params=[False, True], ids=["non-reentrant", "reentrant"])
def reentrant(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["preserved", "not preserved"])
def run(request, reentrant):
    """Return checkpoint, of each kind in turn."""

    def run(function, *arguments):
        return checkpoint(
            function, *arguments, use_reentrant=reentrant, preserve_rng_state=request.param
        )

    return run


def test_recomputes_first_mask_uncounted(run):
    layer, x = Dropout(seed=SITE), numbers()
    y = run(region(layer), x)
    assert layer.calls == 1
    y.sum().backward()
    assert_gradient(x, mask(0))
    assert layer.calls == 1


def test_recomputes_first_mask_without_seed(run):
    layer, x, seen = Dropout(), numbers(), []

    def function(x):
        y = layer(x.exp())
        seen.append(y.detach() != 0)
        torch.rand(1)
        return (y * 1.5).sin()

    run(function, x).sum().backward()
    assert torch.equal(seen[0], seen[-1])
    assert_gradient(x, seen[0] * 2.0)


def test_leaves_preserved_generator_to_others(reentrant):
    seen, x = [], numbers()

    def function(x):
        y = dropout(x.exp())
        seen.append(torch.rand(1))
        return (y * 1.5).sin() * seen[-1]

    torch.manual_seed(3)
    checkpoint(function, x, use_reentrant=reentrant).sum().backward()
    after = torch.rand(1)
    torch.manual_seed(3)
    dropout(torch.ones(3))
    assert torch.equal(seen[0], seen[1])
    assert [seen[0], after] == [torch.rand(1), torch.rand(1)]


@pytest.mark.parametrize("latest_first", [False, True])
def test_gives_each_waiting_forward_its_mask(run, latest_first):
    layer, inputs = Dropout(seed=SITE), [numbers() for _ in range(4)]
    outputs = [run(region(layer), x) for x in inputs]
    waiting = list(enumerate(outputs))
    for call, y in reversed(waiting) if latest_first else waiting:
        y.sum().backward()
        assert_gradient(inputs[call], mask(call))
    assert layer.calls == 4


def test_gives_accumulated_forwards_their_masks(run):
    layer, inputs = Dropout(seed=SITE), [numbers() for _ in range(3)]
    sum(run(region(layer), x).sum() for x in inputs).backward()
    for call, x in enumerate(inputs):
        assert_gradient(x, mask(call))
    assert layer.calls == 3


def test_gives_regions_of_one_graph_their_masks(run):
    layer, x = Dropout(seed=SITE), numbers()
    y = run(region(layer), run(region(layer), x))
    y.sum().backward()
    assert_gradient(x, mask(0), mask(1))
    assert layer.calls == 2


def test_gives_layer_used_twice_its_masks_in_order(run):
    layer, x = Dropout(seed=SITE), numbers()
    run(lambda x: region(layer)(region(layer)(x)), x).sum().backward()
    assert_gradient(x, mask(0), mask(1))
    assert layer.calls == 2


def test_counts_two_layers_in_region_apart(run):
    other = SITE.fold_in("another")
    layers, x = (Dropout(seed=SITE), Dropout(seed=other)), numbers()
    layers[1].calls = 9
    run(lambda x: region(layers[1])(region(layers[0])(x)), x).sum().backward()
    assert_gradient(x, mask(0), mask(9, other))
    assert [int(layer.calls) for layer in layers] == [1, 10]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # inside
@pytest.mark.parametrize("inner", [False, True], ids=["in non-reentrant", "in reentrant"])
@pytest.mark.parametrize("depth", [2, 3])
def test_recomputes_first_masks_of_nested_regions(run, inner, depth):
    layer, x = Dropout(seed=SITE), numbers()

    def nested(depth):
        if depth == 1:
            return region(layer)
        deeper = nested(depth - 1)
        return lambda x: region(layer)(checkpoint(deeper, region(layer)(x), use_reentrant=inner))

    run(nested(depth), x).sum().backward()
    count = 2 * depth - 1
    assert_gradient(x, *map(mask, range(count)))
    assert layer.calls == count


def test_recomputes_same_mask_in_further_backward_passes(run):
    layer, x = Dropout(seed=SITE), numbers()
    y = run(region(layer), x).sum()
    layer(torch.ones(3))
    for _ in range(3):
        x.grad = None
        y.backward(retain_graph=True)
        assert_gradient(x, mask(0))
    assert layer.calls == 2


def test_recomputes_its_mask_after_further_calls(run):
    layer, x = Dropout(seed=SITE), numbers()
    y = run(region(layer), x)
    for _ in range(5):
        layer(torch.ones(3))
    layer.calls = 100
    y.sum().backward()
    assert_gradient(x, mask(0))
    assert layer.calls == 100


@pytest.mark.parametrize("early", [True, False])
def test_recomputes_first_masks_with_early_stop_and_without(early):
    layer, x = Dropout(seed=SITE), numbers()

    def function(x):
        y = region(layer)(x)
        layer(y)  # the backward pass does not need its output
        return y

    with set_checkpoint_early_stop(early):
        y = checkpoint(function, x, use_reentrant=False)
    y.sum().backward()
    assert_gradient(x, mask(0))
    assert layer.calls == 2


def test_recomputes_first_masks_in_checkpoint_sequential(reentrant):
    layers = [Dropout(seed=SITE) for _ in range(4)]
    x = numbers()
    model = nn.Sequential(*(Region(layer) for layer in layers))
    checkpoint_sequential(model, 2, x, use_reentrant=reentrant).sum().backward()
    assert_gradient(x, *[mask(0)] * 4)
    assert [int(layer.calls) for layer in layers] == [1] * 4


class Region(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return region(self.layer)(x)


def test_recomputes_first_masks_in_composable_checkpoint():
    layer, x = Dropout(seed=SITE), numbers()
    model = nn.Sequential(composable(Region(layer)), composable(Region(layer)))
    y = model(x)
    layer(torch.ones(3))
    y.sum().backward()
    assert_gradient(x, mask(0), mask(1))
    assert layer.calls == 3


@pytest.mark.parametrize("idle", ["evaluation", "rate 0"])
def test_counts_no_idle_layer_in_region(run, idle):
    layer, x = Dropout(seed=SITE), numbers()
    other = Dropout(0 if idle == "rate 0" else 0.5, seed=1).train(idle == "rate 0")
    run(lambda x: region(layer)(other(x)), x).sum().backward()
    assert_gradient(x, mask(0))
    assert (layer.calls, other.calls) == (1, 0)


def test_counts_region_without_gradient_once(run, reentrant):
    layer = Dropout(seed=SITE)
    with torch.no_grad():
        y = run(region(layer), numbers())
    assert torch.equal(y, by_hand(numbers().detach(), mask(0)))
    assert layer.calls == 1


@pytest.mark.parametrize("raises", ["before", "after", "in the call"])
def test_continues_after_region_that_raised(run, raises):
    layer, x = Dropout(seed=SITE), numbers()

    def function(x):
        if raises == "before":
            raise KeyError
        layer(x.long() if raises == "in the call" else x)
        raise KeyError

    with pytest.raises((KeyError, TypeError)):
        run(function, x)
    taken = int(layer.calls)
    assert taken == (raises == "after")
    run(region(layer), x).sum().backward()
    assert_gradient(x, mask(taken))


def test_shifts_no_mask_by_caught_error_in_region(run, monkeypatch):
    layer, x, allocate, fails = Dropout(seed=SITE), numbers(), torch.empty_like, [True]

    def failing(*arguments, **options):
        if fails[0]:
            raise MemoryError
        return allocate(*arguments, **options)

    monkeypatch.setattr(torch, "empty_like", failing)

    def function(x):
        fails[0] = True
        with contextlib.suppress(MemoryError):
            layer(x)
        fails[0] = False
        return region(layer)(x)

    run(function, x).sum().backward()
    assert_gradient(x, mask(0))
    assert layer.calls == 1


def test_gives_regions_in_threads_their_masks(run):
    layer = Dropout(seed=SITE)

    def work(_):
        x = numbers()
        y = run(region(layer), x)
        y.sum().backward()
        return x.grad

    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(work, range(32)))
    expected = [gradient_by_hand(mask(call)) for call in range(32)]
    assert all(any(torch.allclose(g, e) for e in expected) for g in actual)
    assert layer.calls == 32


def test_recomputes_first_mask_in_another_thread(run):
    layer, x = Dropout(seed=SITE), numbers()
    y = run(region(layer), x)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(y.sum().backward).result()
    assert_gradient(x, mask(0))


def test_shifts_no_mask_by_gradient_inside_region():
    layer, x = Dropout(seed=SITE), numbers()

    def function(x):
        inner = numbers()
        y = checkpoint(region(layer), inner, use_reentrant=False)
        (gradient,) = torch.autograd.grad(y.sum(), inner)
        torch.testing.assert_close(gradient, gradient_by_hand(mask(0)))
        return region(layer)(x)

    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert_gradient(x, mask(1))
    assert layer.calls == 2


def test_recomputes_first_mask_with_enable_grad_inside():
    layer, x = Dropout(seed=SITE), numbers()

    @torch.enable_grad()
    def function(x):
        return region(layer)(x)

    y = checkpoint(function, x, use_reentrant=True)
    layer(torch.ones(3))
    y.sum().backward()
    assert_gradient(x, mask(0))


def test_recomputes_first_mask_under_hooks_of_others():
    layer, x = Dropout(seed=SITE), numbers()

    def function(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return layer(x.exp()) * 1.5

    y = checkpoint(lambda x: function(x).sin(), x, use_reentrant=False)
    layer(torch.ones(3))
    y.sum().backward()
    assert_gradient(x, mask(0))


def test_shifts_no_mask_by_look_at_saved_tensor():
    layer, x = Dropout(seed=SITE), numbers()
    y = checkpoint(region(layer), x, use_reentrant=False)
    layer(torch.ones(3))
    assert torch.equal(y.grad_fn._saved_self, x.exp() * mask(0) * 1.5)
    y.sum().backward()
    assert_gradient(x, mask(0))
    assert layer.calls == 2


def test_recomputes_first_mask_for_second_gradient():
    def second(y, x):
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad((gradient**2).sum(), x)[0]

    layer, x = Dropout(seed=SITE), numbers()
    actual = second(checkpoint(region(layer), x, use_reentrant=False), x)
    torch.testing.assert_close(actual, second(by_hand(x, mask(0)), x))
    assert layer.calls == 1


def test_recomputes_mask_of_given_key(run):
    x = numbers()
    key = SITE.fold_in(torch.tensor(5))
    run(region(lambda x: dropout(x, key=key)), x).sum().backward()
    assert_gradient(x, mask(5))


def test_rejects_training_switched_on_before_backward(run):
    layer, x = Dropout(seed=SITE).eval(), numbers()
    y = run(region(layer), x)
    layer.train()
    run(region(Dropout(seed=1)), x).sum().backward()
    with pytest.raises(RuntimeError, match="recomputation makes more training calls of dropout"):
        y.sum().backward()
    assert layer.calls == 0


def test_counts_copy_made_before_backward_apart(run):
    layer, x = Dropout(seed=SITE), numbers()
    y = run(region(layer), x)
    twin = copy.deepcopy(layer)
    y.sum().backward()
    assert_gradient(x, mask(0))
    assert (layer.calls, twin.calls) == (1, 1)


@pytest.mark.slow
def test_recomputes_first_mask_under_debug():
    layer, x = Dropout(seed=SITE), numbers()
    checkpoint(region(layer), x, use_reentrant=False, debug=True).sum().backward()
    assert_gradient(x, mask(0))
    assert layer.calls == 1


@pytest.mark.parametrize("saved", [(), (torch.ops.aten.exp.default,)], ids=["nothing", "exp"])
def test_recomputes_first_masks_in_selective_checkpoints(saved):
    layer, x = Dropout(seed=SITE), numbers()

    def contexts():
        return torchs.create_selective_checkpoint_contexts(list(saved))

    y = checkpoint(region(layer), x, use_reentrant=False, context_fn=contexts)
    layer(torch.ones(3))
    y.sum().backward()
    assert_gradient(x, mask(0))
    assert layer.calls == 2


# --- What is kept, and what it costs -------------------------------------------------------------


@pytest.mark.slow
def test_keeps_nothing_beyond_its_graph(run):
    layer, x = Dropout(seed=SITE), numbers()
    records, make = [], torch_checkpoint._Record

    class Record(make):
        def __init__(self):
            super().__init__()
            records.append(weakref.ref(self))

    torch_checkpoint._Record = Record
    try:
        run(region(layer), x).sum().backward()
        dropped = run(region(layer), x)
        del dropped
        gc.collect()
    finally:
        torch_checkpoint._Record = make
    assert len(records) == 2
    assert [record() for record in records] == [None, None]


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.enable_grad])
def test_walks_nothing_outside_checkpoints(context, monkeypatch):
    def walked():
        raise AssertionError("walked")

    monkeypatch.setattr(torch_checkpoint, "_reentrant_forwards", walked)
    monkeypatch.setattr(torch_checkpoint, "_pack_hooks", walked)
    layer, x = Dropout(seed=SITE), numbers()
    with context():
        y = layer(x)
    if y.requires_grad:
        y.sum().backward()
    assert layer.calls == 1


# --- The private parts of torch that are named ----------------------------------------------------


def test_relies_on_frames_that_torch_still_has(reentrant):
    """Fails first where PyTorch has changed what `torch_checkpoint` goes by."""
    seen = []

    def function(x):
        draws = torch_checkpoint.current_log()
        seen.append(None if draws is None else draws.replays)
        return x.exp().sin()

    x = numbers()
    checkpoint(function, x, use_reentrant=reentrant).sum().backward()
    function(x)
    assert seen == [False, True, None]


def test_restores_hooks_of_region():
    top = torch._C._autograd._top_saved_tensors_default_hooks

    def function(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            before = top(True)
            assert torch_checkpoint.current_log() is not None
            assert top(True) == before
        return x.exp().sin()

    x = numbers()
    checkpoint(function, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(x.exp().sin().sum(), x)[0])
