"""Tests of dropout under torch.func: one mask a call, and what vmap's randomness makes of it."""

import copy

import pytest
import torch
import torch.nn.functional as native
from torch import nn
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch_checkpoints import saved_number

import unidrop
from unidrop import Key, keep_mask
from unidrop.adapters.torch import Dropout, dropout, dropout2d

# Forward-mode differentiation is of torch.jit's making.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

SITE = Key(42).fold_in("encoder/0")
WIDTH = 64
RANDOM = "called random operation"


def mask(call, *shape, of=None, start=None):
    """Return the scaled mask of a call, which NumPy makes."""
    keep = keep_mask(shape or (WIDTH,), 0.5, SITE.fold_in(call), global_shape=of, start=start)
    return torch.from_numpy(keep) * 2.0


def numbers():
    return torch.linspace(-1, 1, WIDTH)


@pytest.fixture
def layer():
    return Dropout(seed=SITE)


# --- Derivatives ---------------------------------------------------------------------------------


def test_gives_grad_by_mask_of_its_call(layer):
    for call in range(3):
        assert torch.equal(grad(lambda x: layer(x).sum())(numbers()), mask(call))
        assert layer.calls == call + 1


def test_gives_second_gradient_by_mask_of_its_call(layer):
    first = grad(lambda x: (layer(x) ** 3).sum())
    second = grad(lambda x: first(x).sum())
    torch.testing.assert_close(second(numbers()), 6 * numbers() * mask(0) ** 3)
    assert layer.calls == 1


def test_gives_vjp_one_mask_however_often_called(layer):
    y, pullback = vjp(layer, numbers())
    layer(numbers())
    assert torch.equal(y, numbers() * mask(0))
    for upstream in (torch.ones(WIDTH), numbers()):
        assert torch.equal(pullback(upstream)[0], upstream * mask(0))
    assert layer.calls == 2


def test_gives_jvp_same_mask_for_value_and_tangent(layer):
    y, tangent = jvp(layer, (numbers(),), (torch.ones(WIDTH),))
    assert torch.equal(y, numbers() * mask(0))
    assert torch.equal(tangent, mask(0))
    assert layer.calls == 1


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_gives_jacobian_with_mask_as_diagonal(jacobian, layer):
    assert torch.equal(jacobian(layer)(numbers()), torch.diag(mask(0)))
    assert layer.calls == 1


def test_gives_hessian_of_one_mask(layer):
    actual = hessian(lambda x: (layer(x) ** 2).sum())(numbers())
    torch.testing.assert_close(actual, torch.diag(2 * mask(0) ** 2))
    assert layer.calls == 1


@pytest.mark.parametrize("inplace", [False, True])
def test_draws_one_mask_for_value_and_gradient(inplace):
    def value(x):
        y = dropout(x * 1, inplace=inplace)
        return y.sum(), y

    gradient, y = grad(value, has_aux=True)(torch.ones(WIDTH))
    assert torch.equal(gradient, y)
    assert 0 < (y == 0).sum() < WIDTH


def test_counts_no_call_that_raises(layer):
    with pytest.raises(TypeError, match="dtype"):
        grad(lambda x: layer(x.long()).sum())(numbers())
    assert layer.calls == 0


# --- vmap ----------------------------------------------------------------------------------------

WAYS = {
    "key": lambda x: dropout(x, key=SITE.fold_in(0)),
    "traced key": lambda x: dropout(x, key=SITE.fold_in(torch.tensor(0))),
    "core": lambda x: unidrop.dropout(x, 0.5, SITE.fold_in(0)),
    "module": lambda x: Dropout(seed=SITE)(x),
}


@pytest.fixture(params=WAYS)
def way(request):
    """Return each way to drop under the key of call 0, in turn."""
    return WAYS[request.param]


def batch(randomness, count=5):
    """Return the masks of the examples of a batch."""
    if randomness == "different":
        return mask(0, count, WIDTH)
    return mask(0).expand(count, WIDTH)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_gives_examples_windows_of_one_mask_or_shares_it(randomness, way):
    ones = torch.ones(5, WIDTH)
    assert torch.equal(vmap(way, randomness=randomness)(ones), batch(randomness))
    assert torch.equal(vmap(way, in_dims=1, randomness=randomness)(ones.T), batch(randomness))
    assert torch.equal(
        vmap(way, out_dims=1, randomness=randomness, chunk_size=None)(ones), batch(randomness).T
    )


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_gives_gradients_in_vmap_by_forward_masks(randomness, way):
    ones = torch.ones(5, WIDTH)
    of_each = vmap(grad(lambda x: way(x).sum()), randomness=randomness)(ones)
    of_all = grad(lambda x: vmap(way, randomness=randomness)(x).sum())(ones)
    assert torch.equal(of_each, batch(randomness))
    assert torch.equal(of_all, batch(randomness))


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_drops_shared_input_as_batch(randomness, way):
    actual = vmap(lambda i: way(torch.ones(WIDTH)) + i, randomness=randomness)(torch.zeros(5))
    assert torch.equal(actual, batch(randomness))


def test_raises_what_torch_raises_under_randomness_error(way):
    with pytest.raises(RuntimeError, match=RANDOM) as of_torch:
        vmap(native.dropout)(torch.ones(5, WIDTH))
    with pytest.raises(RuntimeError, match=RANDOM) as ours:
        vmap(way)(torch.ones(5, WIDTH))
    assert str(ours.value) == str(of_torch.value)


def test_drops_shared_input_under_randomness_error(way):
    actual = vmap(lambda i: way(torch.ones(WIDTH)) + i)(torch.zeros(5))
    assert torch.equal(actual, batch("same"))


@pytest.mark.parametrize("shape", [(5, WIDTH), (5, 1)], ids=["batch", "shared"])
def test_counts_and_draws_nothing_under_randomness_error(shape, layer):
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=RANDOM):
        vmap(lambda x: dropout(x if len(x) > 1 else torch.ones(WIDTH)) + x)(torch.ones(shape))
    with pytest.raises(RuntimeError, match=RANDOM):
        vmap(layer)(torch.ones(5, WIDTH))
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.calls == 0


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_draws_per_example_as_randomness_says(randomness):
    y = vmap(lambda x: dropout(x), randomness=randomness)(torch.ones(5, 370))
    assert all(torch.equal(y[0], row) for row in y) == (randomness == "same")
    torch.manual_seed(5)
    first = vmap(dropout, randomness=randomness)(torch.ones(5, 370))
    torch.manual_seed(5)
    assert torch.equal(vmap(dropout, randomness=randomness)(torch.ones(5, 370)), first)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_counts_batch_as_one_call(randomness, layer):
    for call in range(2):
        vmap(layer, randomness=randomness)(torch.ones(5, WIDTH))
        assert layer.calls == call + 1


def test_makes_nested_batches_axes_of_one_mask(way):
    ones = torch.ones(3, 4, WIDTH)
    different = vmap(vmap(way, randomness="different"), randomness="different")(ones)
    mixed = vmap(vmap(way, randomness="same"), randomness="different")(ones)
    assert torch.equal(different, mask(0, 3, 4, WIDTH))
    assert torch.equal(mixed, mask(0, 3, 1, WIDTH).expand(3, 4, WIDTH))


@pytest.mark.parametrize("randomness", ["error", "different", "same"])
def test_gives_examples_masks_of_their_own_keys(randomness):
    def drop(x, step):
        return dropout(x, key=SITE.fold_in(step))

    actual = vmap(drop, randomness=randomness)(torch.ones(4, WIDTH), torch.arange(4))
    assert torch.equal(actual, torch.stack([mask(step) for step in range(4)]))


def test_shares_channels_within_each_example():
    actual = vmap(lambda x: dropout2d(x, key=SITE.fold_in(0)), randomness="different")(
        torch.ones(5, 2, 3, 4, 4)
    )
    assert torch.equal(actual, mask(0, 5, 2, 3, 1, 1).expand(5, 2, 3, 4, 4))


@pytest.mark.parametrize("start", [10, torch.tensor(10)], ids=["int", "tensor"])
def test_gives_each_example_its_window(start):
    def drop(x):
        return unidrop.dropout(x, 0.5, SITE.fold_in(0), global_shape=(100,), start=(start,))

    ones = torch.ones(5, WIDTH)
    different, same = (vmap(drop, randomness=r)(ones) for r in ("different", "same"))
    assert torch.equal(different, mask(0, 5, 100)[:, 10 : 10 + WIDTH])
    assert torch.equal(same, mask(0, of=(100,), start=(10,)).expand(5, WIDTH))


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_returns_mask_of_each_example(randomness):
    def drop(x):
        return unidrop.dropout(x, 0.5, SITE.fold_in(0), return_mask=True)

    y, keep = vmap(drop, randomness=randomness)(torch.ones(5, WIDTH))
    assert torch.equal(y, batch(randomness))
    assert torch.equal(keep, batch(randomness) != 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_drops_large_batch_at_other_dtypes(dtype):
    ones = torch.ones(3, 2**18 + 5, dtype=dtype)
    actual = vmap(WAYS["key"], randomness="different")(ones)
    assert torch.equal(actual != 0, mask(0, *ones.shape) != 0)


# --- Modules as functions ------------------------------------------------------------------------


def network(call=0):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Dropout(seed=SITE))
    model[1].calls = call
    return model


@pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
def test_counts_under_functionalize(remove, layer):
    call = functionalize(layer, remove=remove)
    for number in range(3):
        assert torch.equal(call(torch.ones(WIDTH)), mask(number))
    assert torch.equal(grad(lambda x: call(x).sum())(numbers()), mask(3))
    batch = torch.ones(5, WIDTH)
    inside = vmap(call, randomness="different")
    outside = functionalize(vmap(layer, randomness="different"), remove=remove)
    assert torch.equal(inside(batch), mask(4, 5, WIDTH))
    assert torch.equal(outside(batch), mask(5, 5, WIDTH))
    assert layer.calls == 6


def test_raises_for_damaged_number_under_functionalize(layer):
    layer.get_buffer("_calls").fill_(7)
    with pytest.raises(RuntimeError, match="call number of a Dropout is damaged"):
        functionalize(layer)(torch.ones(WIDTH))


def test_recomputes_first_mask_in_checkpoint_under_functionalize(layer):
    x = numbers().requires_grad_()
    y = checkpoint(functionalize(layer), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad, mask(0))
    assert layer.calls == 1


def test_counts_each_model_of_stack_under_functionalize():
    models = [Dropout(seed=SITE), Dropout(seed=7)]
    models[1].calls = 3
    base, (_, buffers) = Dropout(seed=SITE), stack_module_state(models)
    stacked = vmap(lambda b, x: functional_call(base, b, (x,)), in_dims=(0, None))
    actual = functionalize(stacked)(buffers, torch.ones(WIDTH))
    assert torch.equal(actual[0], mask(0))
    assert torch.equal(actual[1], dropout(torch.ones(WIDTH), key=Key(7).fold_in(3)))
    assert buffers["_calls"][:, 0].tolist() == [1, 4]


def test_draws_under_functionalize_as_without():
    outputs = []
    for layer in (Dropout(), functionalize(Dropout())):
        torch.manual_seed(0)
        outputs.append([layer(torch.ones(WIDTH)) for _ in range(2)])
    assert all(map(torch.equal, *outputs))


def test_traces_call_under_functionalize_that_counts(layer):
    program = make_fx(functionalize(layer))(torch.ones(WIDTH))
    for number in range(1, 4):
        assert torch.equal(program(torch.ones(WIDTH)), mask(number))
    assert layer.calls == 4


def test_counts_in_buffers_of_functional_call():
    model, x = network(), numbers()[None]
    parameters = dict(model.named_parameters())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    buffers["1._calls"].copy_(saved_number(7))
    y = functional_call(model, (parameters, buffers), (x,))
    assert torch.equal(y, model[0](x) * mask(7, 1, WIDTH))
    gradient = grad(lambda p: functional_call(model, (p, buffers), (x,)).sum())(parameters)
    (model[0](x) * mask(8, 1, WIDTH)).sum().backward()
    torch.testing.assert_close(gradient["0.weight"], model[0].weight.grad)
    assert (buffers["1._calls"][0], model[1].calls) == (9, 0)


def test_gives_stacked_models_masks_of_their_calls():
    models, x = [network(call) for call in range(3)], numbers()[None]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])
    actual = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    for call, model in enumerate(models):
        torch.testing.assert_close(actual[call], model[0](x) * mask(call, 1, WIDTH))
    assert buffers["1._calls"][:, 0].tolist() == [1, 2, 3]


def test_gives_per_example_gradients_of_a_loop():
    model, x = network(), torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(p, row):
        return functional_call(model, (p, buffers), (row,)).pow(2).sum()

    actual = vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, x)
    for row, (example, scaled) in enumerate(zip(x, mask(0, 6, WIDTH), strict=True)):
        model.zero_grad()
        (model[0](example) * scaled).pow(2).sum().backward()
        torch.testing.assert_close(actual["0.weight"][row], model[0].weight.grad)
    assert model[1].calls == 1


# --- Compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("eager", marks=pytest.mark.slow)])
def test_compiles_transformations_with_eager_masks(backend, layer):
    torch._dynamo.reset()
    ones = torch.ones(5, WIDTH)
    gradient = torch.compile(
        lambda x: grad(lambda x: layer(x).sum())(x), fullgraph=True, backend=backend
    )
    assert torch.equal(gradient(numbers()), mask(0))
    assert torch.equal(gradient(numbers()), mask(1))
    for call, randomness in enumerate(("different", "same"), start=2):
        batched = torch.compile(
            lambda x, r=randomness: vmap(lambda x: layer(x), randomness=r)(x),
            fullgraph=True,
            backend=backend,
        )
        shape = ones.shape if randomness == "different" else (1, WIDTH)
        assert torch.equal(batched(ones), mask(call, *shape).expand(5, WIDTH))
    assert layer.calls == 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_accepts_negative_word_of_any_width_in_vmap(dtype):
    x = torch.ones(WIDTH)

    def dropped(lo, hi):
        return dropout(x, 0.3, key=Key.from_words(lo, hi))

    lo, hi = torch.tensor(-1, dtype=dtype), torch.tensor(3)
    assert torch.equal(vmap(dropped, (0, None))(lo[None], hi)[0], dropped(lo, hi))
