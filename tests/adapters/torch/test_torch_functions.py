"""Functions of the PyTorch adapter: outputs, layouts, gradients, in place, errors, drawn keys."""

import gc
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as native
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch_tensors import (
    COMPLEX,
    DTYPES,
    KEY,
    SITE,
    expected_patterns,
    get_mask,
    get_name,
    numbers,
    patterns,
)

import unidrop
import unidrop.adapters.torch as ours
from unidrop.adapters.torch import Dropout, Dropout1d, Dropout2d, Dropout3d, dropout

MODULES = [Dropout, Dropout1d, Dropout2d, Dropout3d]


# --- Outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 3, 1])
@pytest.mark.parametrize("dtype", DTYPES + COMPLEX, ids=get_name)
def test_gives_specified_output(dtype, p):
    x = numbers(3, 37, dtype=dtype)
    y = dropout(x, p, key=KEY)
    assert y.dtype == x.dtype
    assert patterns(y) == expected_patterns(x, p)


def test_defaults_to_rate_of_one_half():
    assert torch.equal(dropout(torch.ones(37), key=KEY), get_mask(KEY, 37) * 2.0)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)], ids=str)
def test_keeps_shape_of_0_d_and_empty_tensors(shape):
    x = torch.ones(shape)
    assert patterns(dropout(x, key=KEY)) == expected_patterns(x, 0.5)
    assert dropout(x, key=KEY).shape == shape


def test_replaces_dropped_nan_and_infinities_by_zeros():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0])
    assert patterns(dropout(x, 1, key=KEY)) == [0, 0, 0, 0]


@pytest.mark.parametrize("arguments", [{"p": 0}, {"p": 0.0}, {"training": False}], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_returns_input_itself_if_nothing_is_dropped(arguments, inplace):
    x = numbers(37)
    assert dropout(x, inplace=inplace, key=KEY, **arguments) is x
    assert torch.equal(x, numbers(37))


def test_leaves_input_as_it_was():
    x = numbers(37)
    dropout(x, key=KEY)
    assert torch.equal(x, numbers(37))


def test_accepts_tensor_as_step():
    x = numbers(37)
    assert torch.equal(dropout(x, key=SITE.fold_in(torch.tensor(7))), dropout(x, key=KEY))


@pytest.mark.parametrize("dtype", DTYPES, ids=get_name)
def test_gives_meta_tensor_of_meta_tensor(dtype):
    y = dropout(torch.empty(3, 5, dtype=dtype, device="meta"), key=KEY)
    assert (y.device.type, y.dtype, y.shape) == ("meta", dtype, (3, 5))


@pytest.mark.parametrize("whole", [(99, 8), (99, 9)], ids=str)
def test_accepts_start_on_another_device(whole):
    x = torch.empty(3, 5, device="meta")
    start = (torch.tensor(8), 0)
    y = unidrop.dropout(x, 0.4, KEY, global_shape=whole, start=start)
    assert (y.device.type, y.shape) == ("meta", (3, 5))


# --- Memory layouts -------------------------------------------------------------------------------


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3),
    "permuted": lambda x: x.permute(3, 1, 0, 2),
    "every second": lambda x: x[..., ::2],
    "narrowed": lambda x: x[:, 1:],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [5, 64], ids=["small", "of several pieces"])
def test_follows_logical_indices_in_every_layout(layout, size):
    x = LAYOUTS[layout](numbers(3, 8, size, 5 * size * size // 25))
    assert torch.equal(dropout(x, 0.1, key=KEY), dropout(x.contiguous(), 0.1, key=KEY))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=get_name)
@pytest.mark.parametrize("p", [0.5, 1])
def test_gives_output_strides_of_empty_like(layout, dtype, p):
    x = LAYOUTS[layout](numbers(3, 8, 4, 5, dtype=dtype))
    assert dropout(x, p, key=KEY).stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gives_gradient_by_logical_indices_in_every_layout(layout):
    x = numbers(3, 8, 4, 5, requires_grad=True)
    view = LAYOUTS[layout](x)
    (dropout(view, key=KEY) * numbers(*view.shape)).sum().backward()
    twin = numbers(3, 8, 4, 5, requires_grad=True)
    view = LAYOUTS[layout](twin)
    (view * (get_mask(KEY, *view.shape) * 2.0) * numbers(*view.shape)).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-6, atol=0)


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5, 1])
@pytest.mark.parametrize("dtype", DTYPES + COMPLEX, ids=get_name)
def test_gives_gradient_as_output_of_upstream_gradient(dtype, p, inplace):
    x = numbers(3, 37, dtype=dtype, requires_grad=True)
    upstream = numbers(37, 3, dtype=dtype).T
    dropout(x * 1, p, inplace=inplace, key=KEY).backward(upstream)
    assert patterns(x.grad) == expected_patterns(upstream, p)


def test_drops_nan_of_upstream_gradient():
    x = numbers(37, requires_grad=True)
    dropout(x, key=KEY).backward(torch.where(get_mask(KEY, 37), 1.0, float("nan")))
    assert torch.equal(x.grad, get_mask(KEY, 37) * 2.0)


def test_gives_gradient_by_mask_of_drawn_key():
    x = torch.ones(370, requires_grad=True)
    y = dropout(x)
    dropout(torch.ones(3))  # draws in between must not matter
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_runs_backward_pass_twice():
    x = numbers(37, requires_grad=True)
    y = dropout(x, key=KEY).sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * once)


FUNCTIONS = {
    "dropout": lambda x: dropout(x, 0.3, key=KEY),
    "in place": lambda x: dropout(x * 1, 0.3, inplace=True, key=KEY),
    "traced key": lambda x: dropout(x, 0.3, key=SITE.fold_in(torch.tensor(7))),
    "dropout2d": lambda x: ours.dropout2d(x[None, ..., None], 0.3, key=KEY),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=get_name)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_has_numerical_first_and_second_derivatives(check, function, dtype):
    assert check(function, numbers(3, 5, dtype=dtype, requires_grad=True))


def test_gives_second_derivative_by_forward_mask():
    x = numbers(37, requires_grad=True)
    (gradient,) = torch.autograd.grad((dropout(x, key=KEY) ** 2).sum(), x, create_graph=True)
    gradient.sum().backward()
    assert torch.equal(x.grad, get_mask(KEY, 37) * 8.0)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training_key", [KEY, None], ids=["key", "drawn key"])
def test_saves_no_tensor_for_backward_pass(inplace, training_key):
    saved = []
    x = numbers(370, requires_grad=True)
    h = x + 1
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        y = dropout(h, inplace=inplace, key=training_key)
    assert saved == []
    assert getattr(y.grad_fn, "saved_tensors", ()) == ()


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True])
def test_keeps_nothing_of_input_size_for_backward_pass(inplace):
    x = numbers(12_345, requires_grad=True)
    h = x + 1
    y = dropout(h, inplace=inplace, key=KEY)
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.numel() == 12_345]
    assert {id(tensor) for tensor in alive} <= {id(x), id(h), id(y)}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own making
def test_gives_tangent_in_forward_mode_by_forward_mask():
    x, tangent = numbers(37, requires_grad=True), numbers(37)
    with torch.autograd.forward_ad.dual_level():
        y = dropout(torch.autograd.forward_ad.make_dual(x, tangent), 0.1, key=KEY)
        actual = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert patterns(actual) == patterns(dropout(tangent, 0.1, key=KEY))


def test_gives_same_gradient_in_torch_func():
    x = numbers(37)
    gradient = torch.func.grad(lambda x: dropout(x, key=KEY).sum())(x)
    assert torch.equal(gradient, get_mask(KEY, 37) * 2.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputes_mask_of_drawn_key_in_checkpoint(reentrant):
    x = torch.ones(370, requires_grad=True)
    y = checkpoint(lambda x: dropout(x) * 1.0, x, use_reentrant=reentrant)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


# --- In place -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_writes_output_in_place(layout):
    x = LAYOUTS[layout](numbers(3, 8, 4, 5))
    expected, strides = dropout(x, key=KEY), x.stride()
    assert dropout(x, inplace=True, key=KEY) is x
    assert x.stride() == strides
    assert torch.equal(x, expected)


def test_writes_leaf_in_place_without_gradients():
    x = numbers(37, requires_grad=True)
    with torch.no_grad():
        dropout(x, inplace=True, key=KEY)
    assert patterns(x) == expected_patterns(numbers(37), 0.5)


def test_writes_in_place_in_inference_mode():
    with torch.inference_mode():
        x = numbers(37)
        dropout(x, inplace=True, key=KEY)
        assert patterns(x) == expected_patterns(numbers(37), 0.5)


def test_keeps_strides_of_gradient_in_place():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = dropout(x * 1, 0.5, inplace=True, key=KEY)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert gradient.stride() == x.stride()
    assert torch.equal(gradient, dropout(torch.ones_like(x), 0.5, key=KEY))


def test_writes_view_in_place_and_its_base_follows():
    x = numbers(40, requires_grad=True)
    h = x * 1
    dropout(h[3:], inplace=True, key=KEY)
    h.sum().backward()
    assert patterns(h[3:]) == expected_patterns(x.detach()[3:], 0.5)
    assert torch.equal(x.grad, torch.cat([torch.ones(3), get_mask(KEY, 37) * 2.0]))


def test_reveals_in_place_change_of_saved_tensor():
    x = numbers(37, requires_grad=True)
    h = x.exp()
    y = dropout(h, inplace=True, key=KEY)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def leaf():
    x = numbers(37, requires_grad=True)
    return x, x


def view_of_leaf():
    x = numbers(40, requires_grad=True)
    return x, x[3:]


def one_of_several_views():
    x = numbers(40, requires_grad=True) * 1
    return x, x.chunk(2)[0]


def expanded():
    x = numbers(1)
    return x, x.expand(37)


@pytest.mark.parametrize("make", [leaf, view_of_leaf, one_of_several_views, expanded])
@pytest.mark.parametrize("how", ["function", "module", "seeded module"])
def test_refuses_in_place_what_torch_refuses(make, how):
    base, x = make()
    with pytest.raises(RuntimeError) as of_torch:
        native.dropout(x, inplace=True)
    base, x = make()
    before = base.detach().clone()
    module = Dropout(inplace=True, seed=SITE if how == "seeded module" else None)
    call = module if "module" in how else lambda x: dropout(x, inplace=True)
    state = torch.get_rng_state()
    message = re.escape(str(of_torch.value)).replace("Split", r"\w+")  # whichever made the view
    with pytest.raises(RuntimeError, match=message):
        call(x)
    assert torch.equal(base, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert getattr(module, "calls", 0) == 0


# --- Bad input ------------------------------------------------------------------------------------


ENTRIES = {
    "dropout": lambda p: dropout(torch.ones(3), p),
    "dropout in evaluation": lambda p: dropout(torch.ones(3), p, training=False),
} | {module.__name__: module for module in MODULES}


@pytest.fixture(params=ENTRIES)
def entry(request):
    """Return each way to give a rate, in turn."""
    return ENTRIES[request.param]


@pytest.mark.parametrize("p", [-0.1, 1.1, -1, 2, float("inf")])
def test_rejects_rate_outside_0_and_1_as_torch_does(entry, p):
    with pytest.raises(ValueError, match="probability") as of_torch:
        nn.Dropout(p)
    end = str(of_torch.value).removeprefix("dropout probability ")
    with pytest.raises(ValueError, match=rf"^dropout probability (p )?{re.escape(end)}$"):
        entry(p)


def test_rejects_rate_of_nan(entry):
    with pytest.raises(ValueError, match=r"probability p has to be between 0 and 1, but got nan"):
        entry(float("nan"))


@pytest.mark.parametrize(
    "p",
    [
        *(True, "0.5", None, np.float32(0.1), np.asarray(0.1), (0.1,)),
        *(torch.tensor(1), torch.tensor(True), torch.tensor([0.1]), torch.tensor(0.1).half()),
    ],
    ids=repr,
)
def test_rejects_non_python_rate(entry, p):
    with pytest.raises(TypeError, match=rf"probability p .*got {re.escape(repr(p))}"):
        entry(p)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool], ids=get_name)
@pytest.mark.parametrize("how", ["function", "module", "seeded module"])
def test_rejects_integers_and_changes_nothing(dtype, how):
    module = Dropout(seed=SITE if how == "seeded module" else None)
    call = module if "module" in how else dropout
    x, state = torch.ones(3, dtype=dtype), torch.get_rng_state()
    with pytest.raises(TypeError, match=rf"^input must be of a floating.*{dtype}"):
        call(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert getattr(module, "calls", 0) == 0


@pytest.mark.parametrize("x", [[1.0, 2.0], np.ones(3), 1.0, None], ids=repr)
def test_rejects_non_tensor(x):
    with pytest.raises(TypeError, match=r"^input must be"):
        dropout(x, key=KEY)


@pytest.mark.parametrize("key", [42, "encoder", torch.tensor(42)], ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_rejects_non_key(key, training):
    with pytest.raises(TypeError, match=rf"key must be a unidrop.Key.*{re.escape(repr(key))}"):
        dropout(torch.ones(3), key=key, training=training)


# --- Keys drawn from torch's generator ------------------------------------------------------------


DRAWING = {"function": dropout, "module": Dropout()}


@pytest.fixture(params=DRAWING)
def drawing(request):
    """Return each call that draws its key, in turn."""
    return DRAWING[request.param]


def test_reproduces_masks_by_manual_seed(drawing):
    torch.manual_seed(5)
    first = [drawing(torch.ones(370)) for _ in range(3)]
    torch.manual_seed(5)
    again = [drawing(torch.ones(370)) for _ in range(3)]
    assert all(map(torch.equal, first, again))


def test_reproduces_masks_within_fork_rng(drawing):
    torch.manual_seed(5)
    with torch.random.fork_rng():
        first = drawing(torch.ones(370))
    assert torch.equal(drawing(torch.ones(370)), first)


def test_draws_another_mask_at_each_call(drawing):
    assert not torch.equal(drawing(torch.ones(370)), drawing(torch.ones(370)))


@pytest.mark.parametrize("arguments", [{"p": 0}, {"training": False}, {"key": KEY}], ids=str)
def test_draws_no_key_that_is_not_needed(arguments):
    state = torch.get_rng_state()
    dropout(torch.ones(3), **arguments)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_nothing_in_seeded_module():
    state = torch.get_rng_state()
    Dropout(seed=SITE)(torch.ones(3))
    assert torch.equal(torch.get_rng_state(), state)


# --- The operator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("axes", [(), (0, 2)])
def test_keeps_rules_of_custom_operators(dtype, axes):
    x = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    key = torch.tensor(KEY.words, dtype=torch.int64)
    torch.library.opcheck(torch.ops.unidrop.dropout.default, (x, key, 0.3, axes))


def test_drops_in_operator_what_function_drops():
    x, key = numbers(3, 4, 5), torch.tensor(KEY.words, dtype=torch.int64)
    expected = unidrop.dropout(x, 0.3, KEY, broadcast_axes=(1,))
    assert torch.equal(torch.ops.unidrop.dropout(x, key, 0.3, (1,)), expected)
