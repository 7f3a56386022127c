"""The options that PyTorch's functions share with the core: windows, shared axes and masks."""

import inspect
import re
import warnings

import pytest
import torch
import torch.nn.functional as native
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import unidrop
import unidrop.adapters.torch as ours
from unidrop import Key
from unidrop.adapters.torch import dropout, dropout1d, dropout2d, dropout3d

KEY = Key(42).fold_in("encoder/0").fold_in(7)
SITE = Key(42).fold_in("encoder/0")
P = 0.3

# From a function's name to the shape of an input and the axes along which its mask is shared.
CHANNELS = {
    "dropout1d": ((3, 4, 5), (2,)),
    "dropout2d": ((3, 4, 5, 2), (2, 3)),
    "dropout3d": ((3, 4, 5, 2, 2), (2, 3, 4)),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def both(x, key=KEY, p=P, **options):
    """Return the output and the mask by the core."""
    return unidrop.dropout(x, p, key, return_mask=True, **options)


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        assert torch.equal(a, e)


# --- Signatures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dropout", *CHANNELS])
def test_extends_native_signature_by_options(name):
    mine = inspect.signature(getattr(ours, name)).parameters.values()
    of_torch = inspect.signature(getattr(native, name)).parameters.values()
    positional = [(p.name, p.default) for p in mine if p.kind is not p.KEYWORD_ONLY]
    assert positional == [(p.name, p.default) for p in of_torch]
    options = {"key": None, "global_shape": None, "start": None, "return_mask": False}
    if name == "dropout":
        options["broadcast_axes"] = ()
    assert {p.name: p.default for p in mine if p.kind is p.KEYWORD_ONLY} == options


# --- Eager ---------------------------------------------------------------------------------------

OPTIONS = {
    "mask": {},
    "axes": {"broadcast_axes": (1,)},
    "negative axis": {"broadcast_axes": [-1]},
    "every axis": {"broadcast_axes": (0, 1)},
    "window": {"global_shape": (9, 7), "start": (2, 0)},
    "window inside rows": {"global_shape": (9, 12), "start": (2, 3)},
    "start in tensors": {"global_shape": (9, 12), "start": (torch.tensor(2), torch.tensor(3))},
    "window and axes": {"broadcast_axes": (1,), "global_shape": (9, 7), "start": (2, 0)},
    "window and first axis": {"broadcast_axes": (0,), "global_shape": (9, 12), "start": (2, 3)},
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def options(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_equals_core_with_options(options, dtype):
    x = numbers(5, 7, dtype=dtype)
    expected = both(x, **options)
    assert_same(dropout(x, P, key=KEY, return_mask=True, **options), expected)
    assert torch.equal(dropout(x, P, key=KEY, **options), expected[0])


@pytest.mark.parametrize("name", CHANNELS)
def test_equals_core_with_options_for_channels(name):
    shape, axes = CHANNELS[name]
    start = (torch.tensor(2), *(0 for _ in shape[1:]))
    window = {"global_shape": (9, *shape[1:]), "start": start}
    x, function = numbers(*shape), getattr(ours, name)
    for options in ({}, window):
        expected = both(x, broadcast_axes=axes, **options)
        assert_same(function(x, P, key=KEY, return_mask=True, **options), expected)
        assert torch.equal(function(x, P, key=KEY, **options), expected[0])


def test_tiles_whole_mask_by_windows():
    x = numbers(9, 7)
    tiles = [
        dropout(x[first : first + 3], P, key=KEY, global_shape=(9, 7), start=(first, 0))
        for first in (0, 3, 6)
    ]
    assert torch.equal(torch.cat(tiles), dropout(x, P, key=KEY))


@pytest.mark.parametrize("p", [0.3, 1])
@pytest.mark.parametrize("inplace", [False, True])
def test_differentiates_by_returned_mask(options, inplace, p):
    x, upstream = numbers(5, 7).requires_grad_(), numbers(5, 7) + 1
    y, mask = dropout(x * 1, p, inplace=inplace, key=KEY, return_mask=True, **options)
    y.backward(upstream)
    assert torch.equal(y, both(x.detach(), p=p, **options)[0])
    assert torch.equal(mask, both(x.detach(), p=p, **options)[1])
    assert torch.equal(x.grad, both(upstream, p=p, **options)[0])


def test_saves_no_tensor_with_options(options):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        dropout(numbers(5, 7).requires_grad_() * 1, P, key=KEY, return_mask=True, **options)
    assert saved == []


def test_writes_input_in_place_with_options(options):
    x, expected = numbers(5, 7), both(numbers(5, 7), **options)
    version = x._version
    y, mask = dropout(x, P, inplace=True, key=KEY, return_mask=True, **options)
    assert y is x
    assert x._version > version
    assert_same((y, mask), expected)


@pytest.mark.parametrize("arguments", [{"p": 0}, {"training": False}], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_returns_input_and_ones_if_nothing_drops(options, arguments, inplace):
    x, state = numbers(5, 7), torch.get_rng_state()
    y, mask = dropout(x, inplace=inplace, return_mask=True, **arguments, **options)
    assert y is x
    assert torch.equal(x, numbers(5, 7))
    assert torch.equal(mask, torch.ones_like(both(x, **options)[1]))
    assert dropout(x, inplace=inplace, **arguments, **options) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", CHANNELS)
def test_returns_ones_of_channels_in_evaluation(name):
    shape, axes = CHANNELS[name]
    x = numbers(*shape)
    y, mask = getattr(ours, name)(x, training=False, return_mask=True)
    assert y is x
    assert torch.equal(mask, torch.ones_like(both(x, broadcast_axes=axes)[1]))


@pytest.mark.parametrize("inplace", [False, True])
def test_returns_mask_of_drawn_key(inplace):
    torch.manual_seed(5)
    expected = dropout(torch.ones(370))
    torch.manual_seed(5)
    y, mask = dropout(torch.ones(370), inplace=inplace, return_mask=True)
    assert torch.equal(y, expected)
    assert torch.equal(mask, expected != 0)


def test_keeps_generator_if_in_place_call_with_mask_raises():
    x, state = numbers(37).requires_grad_(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        dropout(x, inplace=True, return_mask=True)
    assert torch.equal(x.detach(), numbers(37))
    assert torch.equal(torch.get_rng_state(), state)


def test_recomputes_window_under_checkpoint():
    x = torch.ones(5, 7, requires_grad=True)

    def region(x):
        y, mask = dropout(x, P, return_mask=True, global_shape=(9, 7), start=(2, 0))
        return torch.where(mask, y, x.exp())

    torch.manual_seed(5)
    region(x).sum().backward()
    expected, x.grad = x.grad, None
    torch.manual_seed(5)
    torch.utils.checkpoint.checkpoint(region, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, expected)


# --- Bad input -----------------------------------------------------------------------------------

BAD = {
    "axis that does not exist": {"broadcast_axes": (2,)},
    "axis twice": {"broadcast_axes": (0, -2)},
    "axis that is not an integer": {"broadcast_axes": (0.5,)},
    "axes in a string": {"broadcast_axes": "01"},
    "global_shape alone": {"global_shape": (9, 7)},
    "start alone": {"start": (2, 0)},
    "global_shape of another rank": {"global_shape": (9,), "start": (2, 0)},
    "start of another rank": {"global_shape": (9, 7), "start": (2,)},
    "window outside": {"global_shape": (9, 7), "start": (5, 0)},
    "negative start": {"global_shape": (9, 7), "start": (-1, 0)},
    "negative length": {"global_shape": (9, -7), "start": (0, 0)},
    "start of a float": {"global_shape": (9, 7), "start": (1.5, 0)},
    "too many elements": {"global_shape": (2**40, 2**40), "start": (0, 0)},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_raises_error_of_core(bad, training):
    x = numbers(5, 7)
    with pytest.raises((TypeError, ValueError)) as of_core:
        unidrop.dropout(x, P, KEY, training=training, **bad)
    state = torch.get_rng_state()
    with pytest.raises(of_core.type, match=f"^{re.escape(str(of_core.value))}$"):
        dropout(x, P, training, **bad)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("function", [dropout, dropout1d, dropout2d, dropout3d])
@pytest.mark.parametrize("mask", [False, True])
def test_names_input_that_is_not_a_tensor(function, mask):
    with pytest.raises(TypeError, match=r"^input must be a torch\.Tensor, got list$"):
        function([1.0], key=KEY, return_mask=mask)


def test_names_input_that_is_not_a_tensor_with_axes():
    with pytest.raises(TypeError, match=r"^input must be a torch\.Tensor, got list$"):
        dropout([1.0], key=KEY, broadcast_axes=(0,))


@pytest.mark.parametrize("options", [{"return_mask": True}, {"global_shape": (9,), "start": (0,)}])
def test_checks_native_arguments_with_options(options):
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"probability p has to be between 0 and 1, but got 2"):
        dropout(x, 2, key=KEY, **options)
    with pytest.raises(TypeError, match=r"^key must be a unidrop\.Key.*got 42"):
        dropout(x, key=42, **options)
    with pytest.raises(TypeError, match=r"^input must be of a floating.*int32"):
        dropout(x.int(), key=KEY, **options)


def test_refuses_torchscript_with_mask():
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(RuntimeError, match=r"does not run in torch\.jit"),
    ):
        torch.jit.trace(lambda x: dropout(x, key=KEY, return_mask=True), torch.ones(3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["dropout", *CHANNELS])
def test_traces_evaluation_by_torchscript(name):
    function, x = getattr(ours, name), numbers(2, 3, 4, 5, 6)
    x = x if name in ("dropout", "dropout3d") else x[..., 0] if name == "dropout2d" else x[0, 0]
    traced = torch.jit.trace(lambda x: function(x, training=False) * 2, x)
    assert torch.equal(traced(x + 1), (x + 1) * 2)


# --- Traces --------------------------------------------------------------------------------------


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=graphs), graphs


CALLS = {
    "axes": lambda x, key, row, **o: dropout(x, P, key=key, broadcast_axes=(-1,), **o),
    "window": lambda x, key, row, **o: dropout(
        x, P, key=key, global_shape=(9, 4, 5), start=(row, 0, 0), **o
    ),
    "window and axes": lambda x, key, row, **o: dropout(
        x, P, key=key, broadcast_axes=(1,), global_shape=(9, 4, 5), start=(row, 0, 0), **o
    ),
    "dropout1d": lambda x, key, row, **o: dropout1d(
        x, P, key=key, global_shape=(9, 4, 5), start=(row, 0, 0), **o
    ),
    "dropout2d": lambda x, key, row, **o: dropout2d(
        x[None], P, key=key, global_shape=(1, 9, 4, 5), start=(0, row, 0, 0), **o
    ),
    "dropout3d": lambda x, key, row, **o: dropout3d(
        x[None], P, key=key, global_shape=(9, 3, 4, 5), start=(row, 0, 0, 0), **o
    ),
}


@pytest.fixture(params=CALLS.values(), ids=CALLS)
def call(request):
    return request.param


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mask", [False, True])
def test_compiles_options_to_one_graph(call, mask, backend):
    def function(x, step, row):
        return call(x, SITE.fold_in(step), row, return_mask=mask)

    fast, graphs = compiled(function, backend)
    for step in range(3):
        x = numbers(3, 4, 5).requires_grad_()
        actual = fast(x, torch.tensor(step), torch.tensor(2 * step))
        expected = function(x, step, 2 * step)
        outputs = (actual[0], expected[0]) if mask else (actual, expected)
        assert_same(*((actual, expected) if mask else ((actual,), (expected,))))
        gradients = (torch.autograd.grad(y.sum(), x)[0] for y in outputs)
        assert torch.equal(*gradients)
    assert graphs.frame_count == 1


def test_compiles_window_of_dynamic_length_to_one_graph():
    def function(x, first):
        window = {"global_shape": (2 * x.shape[0], x.shape[1]), "start": (first, 0)}
        return unidrop.dropout(x, P, KEY, **window)

    fast, graphs = compiled(function, "eager")
    for length in (4, 5, 6):
        x = numbers(length, 6)
        assert torch.equal(fast(x, torch.tensor(length)), function(x, length))
    assert graphs.frame_count == 2  # the first has a fixed length


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("eager", marks=pytest.mark.slow)])
def test_compiles_in_place_call_with_mask(backend):
    fast, graphs = compiled(
        lambda x, row: dropout(
            x, P, inplace=True, key=KEY, return_mask=True, global_shape=(9, 7), start=(row, 0)
        ),
        backend,
    )
    for row in range(3):
        x = numbers(5, 7)
        y, mask = fast(x, torch.tensor(row))
        expected = both(numbers(5, 7), global_shape=(9, 7), start=(row, 0))
        assert_same((y, mask), expected)
        assert torch.equal(x, expected[0])
    assert graphs.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("eager", marks=pytest.mark.slow)])
def test_compiles_drawn_key_with_mask(backend):
    fast, graphs = compiled(lambda x: dropout(x, P, return_mask=True), backend)
    for seed in range(3):
        torch.manual_seed(seed)
        actual = fast(torch.ones(5, 7))
        torch.manual_seed(seed)
        assert_same(actual, dropout(torch.ones(5, 7), P, return_mask=True))
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_compiles_rate_that_changes_with_window():
    fast, _ = compiled(
        lambda x, p: dropout(x, p, key=KEY, return_mask=True, global_shape=(9, 7), start=(2, 0))
    )
    for p in (0.3, 0.1, 0.6, 1.0, 0.0):
        expected = both(torch.ones(5, 7), p=p, global_shape=(9, 7), start=(2, 0))
        assert_same(fast(torch.ones(5, 7), p), expected)


@pytest.mark.parametrize("arguments", [{"p": 0.0}, {"training": False}], ids=str)
def test_compiles_ones_if_nothing_drops(arguments):
    fast, graphs = compiled(
        lambda x: dropout(x, key=KEY, broadcast_axes=(1,), return_mask=True, **arguments)
    )
    for length in (5, 6, 7):
        y, mask = fast(numbers(length, 7))
        assert torch.equal(y, numbers(length, 7))
        assert torch.equal(mask, torch.ones(length, 1, dtype=torch.bool))
    assert graphs.frame_count <= 2  # the second is for lengths that change


def test_exports_window_and_mask():
    class Shard(torch.nn.Module):
        def forward(self, x, row):
            return dropout(x, P, key=KEY, return_mask=True, global_shape=(9, 7), start=(row, 0))

    program = torch.export.export(Shard(), (torch.ones(5, 7), torch.tensor(0))).module()
    for row in range(3):
        expected = both(torch.ones(5, 7), global_shape=(9, 7), start=(row, 0))
        assert_same(program(torch.ones(5, 7), torch.tensor(row)), expected)


def test_traces_options_by_make_fx(call):
    def function(x, row):
        return call(x, KEY, row, return_mask=True)

    graph = make_fx(function)(numbers(3, 4, 5), torch.tensor(0))
    for row in range(3):
        expected = function(numbers(3, 4, 5), torch.tensor(row))
        assert_same(graph(numbers(3, 4, 5), torch.tensor(row)), expected)


def test_returns_fake_tensors_with_options(call):
    with torch._subclasses.FakeTensorMode():
        y, mask = call(torch.ones(3, 4, 5), None, 2, return_mask=True)
    assert {type(y), type(mask)} == {torch._subclasses.FakeTensor}
    expected, keep = call(torch.ones(3, 4, 5), None, 2, return_mask=True)
    assert (y.shape, mask.shape, mask.dtype) == (expected.shape, keep.shape, torch.bool)


# --- torch.func ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_transforms_gradient_with_options(call, inplace):
    def loss(x):
        y, mask = call(x * 1, KEY, torch.tensor(2), return_mask=True, inplace=inplace)
        return (y * mask).sum()

    y, mask = call(torch.ones(3, 4, 5), KEY, 2, return_mask=True)
    gradient = grad(loss)(numbers(3, 4, 5))
    assert torch.equal(gradient, (y * mask).reshape(3, 4, 5))


def test_transforms_tangent_with_options(call):
    def function(x):
        return call(x, KEY, 2, return_mask=True)[0]

    y, tangent = jvp(function, (numbers(3, 4, 5),), (numbers(3, 4, 5) + 1,))
    assert torch.equal(y, function(numbers(3, 4, 5)))
    assert torch.equal(tangent, function(numbers(3, 4, 5) + 1))


@pytest.mark.parametrize("key", [KEY, None], ids=["key", "drawn key"])
@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("row", [2, torch.tensor(2)], ids=["int", "tensor"])
def test_maps_windows_and_masks_of_examples(randomness, row, key):
    def function(x):
        options = {"broadcast_axes": (-1,), "global_shape": (9, 7), "start": (row, 0)}
        return dropout(x, P, key=key, return_mask=True, **options)

    x = torch.ones(4, 5, 7)
    state = torch.get_rng_state()
    y, mask = vmap(function, randomness=randomness)(x)
    torch.set_rng_state(state)
    if randomness == "different":
        options = {"broadcast_axes": (2,), "global_shape": (4, 9, 7), "start": (0, 2, 0)}
        expected = dropout(x, P, key=key, return_mask=True, **options)
    else:
        one, keep = function(x[0])
        expected = one.expand(4, 5, 7), keep.expand(4, 5, 1)
    assert_same((y, mask), expected)


@pytest.mark.parametrize("key", [KEY, None], ids=["key", "drawn key"])
def test_rejects_mapped_mask_without_randomness(key):
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: dropout(x, P, key=key, return_mask=True))(torch.ones(4, 7))
    assert torch.equal(torch.get_rng_state(), state)


def test_maps_keys_and_starts_of_examples():
    def function(x, step, row):
        key = SITE.fold_in(step)
        return dropout(x, P, key=key, global_shape=(9, 7), start=(row, 0), return_mask=True)

    steps, rows = torch.arange(4), torch.arange(4)
    y, mask = vmap(function, randomness="different")(torch.ones(4, 5, 7), steps, rows)
    for i in range(4):
        expected = function(torch.ones(5, 7), steps[i], rows[i])
        assert_same((y[i], mask[i]), expected)


def test_maps_evaluation_to_ones():
    def function(x):
        return dropout(x, training=False, return_mask=True, broadcast_axes=(0,))

    y, mask = vmap(function)(numbers(4, 5))
    assert torch.equal(y, numbers(4, 5))
    assert torch.equal(mask, torch.ones(4, 1, dtype=torch.bool))


@pytest.mark.parametrize("start", [torch.tensor(1.0), torch.tensor([1]), torch.tensor(True)])
def test_rejects_start_tensor_before_it_draws_a_key(start):
    state = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match="start must be"):
        dropout(torch.ones(2, 3), 0.5, global_shape=(4, 4), start=(start, 0))
    assert torch.equal(torch.get_rng_state(), state)


def test_rejects_window_beyond_operators_when_traced():
    def call(x):
        return dropout(x, 0.5, key=KEY, global_shape=(2**63, 2), start=(0, 0))

    assert call(torch.ones(2, 2)).shape == (2, 2)
    with pytest.raises(ValueError, match=rf"global_shape must be below 2\*\*63 .*{2**63}"):
        torch.vmap(call, randomness="same")(torch.ones(4, 2, 2))


def test_returns_mask_on_device_of_input_under_vmap():
    x = torch.ones(4, 2, 3, device="meta")
    masks = torch.vmap(lambda x: dropout(x, 0.5, key=KEY, return_mask=True)[1], randomness="same")
    assert masks(x).device == x.device


def test_makes_mask_of_operator_on_given_device():
    words = torch.tensor(KEY.words)
    mask = torch.ops.unidrop.keep_mask(words, 0.5, (3,), (), device=torch.device("meta"))
    assert mask.device.type == "meta"
