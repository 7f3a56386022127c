"""Tests of the PyTorch adapter: what torch.nn's dropout does, and what it does not."""

import copy
import gc
import io
import pickle
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as native
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import unidrop
import unidrop.adapters.torch as ours
from unidrop import Key, keep_mask
from unidrop.adapters.torch import Dropout, Dropout1d, Dropout2d, Dropout3d, dropout
from unidrop.plan import DropoutPlan

KEY = Key(42).fold_in("encoder/0").fold_in(7)
SITE = Key(42).fold_in("encoder/0")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
MODULES = [Dropout, Dropout1d, Dropout2d, Dropout3d]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def get_name(dtype):
    """Return a dtype's name without its module."""
    return str(dtype).removeprefix("torch.")


def patterns(tensor):
    """Return the bit patterns of a tensor's real components, in logical order."""
    tensor = tensor.detach().contiguous().reshape(-1)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).reshape(-1)
    bits = 8 * tensor.element_size()
    return [pattern % 2**bits for pattern in tensor.view(INTEGERS[bits // 8]).tolist()]


def expected_patterns(x, p, key=KEY, axes=()):
    """Return the output's bit patterns by the specification."""
    keep = np.reshape(
        reference.keep_mask(x.shape, p, int(key), broadcast_axes=axes),
        reference.mask_shape(x.shape, axes),
    )
    decisions = np.broadcast_to(keep, x.shape).reshape(-1).tolist()
    return reference.dropout_bits(patterns(x), get_name(x.dtype), decisions, p)


def numbers(*shape, dtype=torch.float32, requires_grad=False):
    """Return the same ordinary numbers at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(requires_grad)


def get_mask(key, *shape, p=0.5):
    """Return a mask of the specification."""
    return torch.tensor(reference.keep_mask(shape, p, int(key))).reshape(shape) == 1


# --- The function ------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 3, 1])
@pytest.mark.parametrize("dtype", DTYPES + COMPLEX, ids=get_name)
def test_the_output_is_that_of_the_specification(dtype, p):
    x = numbers(3, 37, dtype=dtype)
    y = dropout(x, p, key=KEY)
    assert y.dtype == x.dtype
    assert patterns(y) == expected_patterns(x, p)


def test_the_rate_is_a_half_by_default():
    assert torch.equal(dropout(torch.ones(37), key=KEY), get_mask(KEY, 37) * 2.0)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)], ids=str)
def test_0_d_and_empty_tensors_keep_their_shape(shape):
    x = torch.ones(shape)
    assert patterns(dropout(x, key=KEY)) == expected_patterns(x, 0.5)
    assert dropout(x, key=KEY).shape == shape


def test_dropped_nan_and_infinities_are_positive_zeros():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0])
    assert patterns(dropout(x, 1, key=KEY)) == [0, 0, 0, 0]


@pytest.mark.parametrize("arguments", [{"p": 0}, {"p": 0.0}, {"training": False}], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_where_nothing_is_dropped_the_input_itself_is_returned(arguments, inplace):
    x = numbers(37)
    assert dropout(x, inplace=inplace, key=KEY, **arguments) is x
    assert torch.equal(x, numbers(37))


def test_the_input_is_left_as_it_was():
    x = numbers(37)
    dropout(x, key=KEY)
    assert torch.equal(x, numbers(37))


def test_a_step_may_be_a_tensor():
    x = numbers(37)
    assert torch.equal(dropout(x, key=SITE.fold_in(torch.tensor(7))), dropout(x, key=KEY))


@pytest.mark.parametrize("dtype", DTYPES, ids=get_name)
def test_a_tensor_without_data_gives_one(dtype):
    y = dropout(torch.empty(3, 5, dtype=dtype, device="meta"), key=KEY)
    assert (y.device.type, y.dtype, y.shape) == ("meta", dtype, (3, 5))


@pytest.mark.parametrize("whole", [(99, 8), (99, 9)], ids=str)
def test_a_window_may_start_at_a_number_on_another_device_than_the_input(whole):
    x = torch.empty(3, 5, device="meta")
    start = (torch.tensor(8), 0)
    y = unidrop.dropout(x, 0.4, KEY, global_shape=whole, start=start)
    assert (y.device.type, y.shape) == ("meta", (3, 5))


# --- Memory layouts ----------------------------------------------------------------------------

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
def test_the_mask_follows_logical_indices_in_every_layout(layout, size):
    x = LAYOUTS[layout](numbers(3, 8, size, 5 * size * size // 25))
    assert torch.equal(dropout(x, 0.1, key=KEY), dropout(x.contiguous(), 0.1, key=KEY))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=get_name)
@pytest.mark.parametrize("p", [0.5, 1])
def test_the_output_has_the_strides_that_torch_gives_to_a_tensor_like_the_input(layout, dtype, p):
    x = LAYOUTS[layout](numbers(3, 8, 4, 5, dtype=dtype))
    assert dropout(x, p, key=KEY).stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_follows_logical_indices_in_every_layout(layout):
    x = numbers(3, 8, 4, 5, requires_grad=True)
    view = LAYOUTS[layout](x)
    (dropout(view, key=KEY) * numbers(*view.shape)).sum().backward()
    twin = numbers(3, 8, 4, 5, requires_grad=True)
    view = LAYOUTS[layout](twin)
    (view * (get_mask(KEY, *view.shape) * 2.0) * numbers(*view.shape)).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-6, atol=0)


# --- Gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5, 1])
@pytest.mark.parametrize("dtype", DTYPES + COMPLEX, ids=get_name)
def test_the_gradient_is_the_same_function_of_the_upstream_gradient(dtype, p, inplace):
    x = numbers(3, 37, dtype=dtype, requires_grad=True)
    upstream = numbers(37, 3, dtype=dtype).T
    dropout(x * 1, p, inplace=inplace, key=KEY).backward(upstream)
    assert patterns(x.grad) == expected_patterns(upstream, p)


def test_a_dropped_nan_of_the_upstream_gradient_is_dropped():
    x = numbers(37, requires_grad=True)
    dropout(x, key=KEY).backward(torch.where(get_mask(KEY, 37), 1.0, float("nan")))
    assert torch.equal(x.grad, get_mask(KEY, 37) * 2.0)


def test_the_gradient_of_a_drawn_key_is_that_of_its_mask():
    x = torch.ones(370, requires_grad=True)
    y = dropout(x)
    dropout(torch.ones(3))  # draws in between must not matter
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_the_backward_pass_can_run_twice():
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
def test_first_and_second_derivatives_are_the_numerical_ones(check, function, dtype):
    assert check(function, numbers(3, 5, dtype=dtype, requires_grad=True))


def test_the_second_derivative_has_the_forward_calls_mask():
    x = numbers(37, requires_grad=True)
    (gradient,) = torch.autograd.grad((dropout(x, key=KEY) ** 2).sum(), x, create_graph=True)
    gradient.sum().backward()
    assert torch.equal(x.grad, get_mask(KEY, 37) * 8.0)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training_key", [KEY, None], ids=["key", "drawn key"])
def test_no_tensor_is_saved_for_the_backward_pass(inplace, training_key):
    saved = []
    x = numbers(370, requires_grad=True)
    h = x + 1
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        y = dropout(h, inplace=inplace, key=training_key)
    assert saved == []
    assert getattr(y.grad_fn, "saved_tensors", ()) == ()


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_of_the_inputs_size_lives_until_the_backward_pass(inplace):
    x = numbers(12_345, requires_grad=True)
    h = x + 1
    y = dropout(h, inplace=inplace, key=KEY)
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.numel() == 12_345]
    assert {id(tensor) for tensor in alive} <= {id(x), id(h), id(y)}


def test_the_functional_gradient_of_torch_is_the_autograd_one():
    x = numbers(37)
    gradient = torch.func.grad(lambda x: dropout(x, key=KEY).sum())(x)
    assert torch.equal(gradient, get_mask(KEY, 37) * 2.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call_with_a_drawn_key_has_one_mask_in_both_passes(reentrant):
    x = torch.ones(370, requires_grad=True)
    y = checkpoint(lambda x: dropout(x) * 1.0, x, use_reentrant=reentrant)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


# --- In place ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_in_place_the_input_becomes_the_output(layout):
    x = LAYOUTS[layout](numbers(3, 8, 4, 5))
    expected, strides = dropout(x, key=KEY), x.stride()
    assert dropout(x, inplace=True, key=KEY) is x
    assert x.stride() == strides
    assert torch.equal(x, expected)


def test_in_place_without_gradients_a_leaf_is_written():
    x = numbers(37, requires_grad=True)
    with torch.no_grad():
        dropout(x, inplace=True, key=KEY)
    assert patterns(x) == expected_patterns(numbers(37), 0.5)


def test_in_place_in_inference_mode_the_input_is_written():
    with torch.inference_mode():
        x = numbers(37)
        dropout(x, inplace=True, key=KEY)
        assert patterns(x) == expected_patterns(numbers(37), 0.5)


def test_in_place_on_a_view_the_base_and_its_gradient_follow():
    x = numbers(40, requires_grad=True)
    h = x * 1
    dropout(h[3:], inplace=True, key=KEY)
    h.sum().backward()
    assert patterns(h[3:]) == expected_patterns(x.detach()[3:], 0.5)
    assert torch.equal(x.grad, torch.cat([torch.ones(3), get_mask(KEY, 37) * 2.0]))


def test_in_place_what_another_operation_saved_is_known_to_have_changed():
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
def test_in_place_what_torch_forbids_raises_its_message_and_changes_nothing(make, how):
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


# --- Bad input ---------------------------------------------------------------------------------

ENTRIES = {
    "dropout": lambda p: dropout(torch.ones(3), p),
    "dropout in evaluation": lambda p: dropout(torch.ones(3), p, training=False),
} | {module.__name__: module for module in MODULES}


@pytest.fixture(params=ENTRIES)
def entry(request):
    """Return each way to give a rate, in turn."""
    return ENTRIES[request.param]


@pytest.mark.parametrize("p", [-0.1, 1.1, -1, 2, float("inf")])
def test_a_rate_outside_0_and_1_raises_as_in_torch(entry, p):
    with pytest.raises(ValueError, match="probability") as of_torch:
        nn.Dropout(p)
    end = str(of_torch.value).removeprefix("dropout probability ")
    with pytest.raises(ValueError, match=rf"^dropout probability (p )?{re.escape(end)}$"):
        entry(p)


def test_a_rate_of_nan_raises_and_is_named(entry):
    with pytest.raises(ValueError, match=r"probability p has to be between 0 and 1, but got nan"):
        entry(float("nan"))


@pytest.mark.parametrize(
    "p", [True, "0.5", None, np.float32(0.1), torch.tensor(0.1), (0.1,)], ids=repr
)
def test_a_rate_that_is_no_python_number_raises_and_is_named(entry, p):
    with pytest.raises(TypeError, match=rf"probability p .*got {re.escape(repr(p))}"):
        entry(p)


def test_a_rate_that_is_assigned_later_is_checked_too():
    module = Dropout(seed=SITE)
    module.p = 1.5
    with pytest.raises(ValueError, match=r"probability p has to be .*got 1\.5"):
        module(torch.ones(3))
    assert module.calls == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool], ids=get_name)
@pytest.mark.parametrize("how", ["function", "module", "seeded module"])
def test_integers_raise_name_the_input_and_its_dtype_and_change_nothing(dtype, how):
    module = Dropout(seed=SITE if how == "seeded module" else None)
    call = module if "module" in how else dropout
    x, state = torch.ones(3, dtype=dtype), torch.get_rng_state()
    with pytest.raises(TypeError, match=rf"^input must be of a floating.*{dtype}"):
        call(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert getattr(module, "calls", 0) == 0


@pytest.mark.parametrize("x", [[1.0, 2.0], np.ones(3), 1.0, None], ids=repr)
def test_what_is_no_tensor_raises_and_is_named(x):
    with pytest.raises(TypeError, match=r"^input must be"):
        dropout(x, key=KEY)


@pytest.mark.parametrize("key", [42, "encoder", torch.tensor(42)], ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_a_key_that_is_none_raises_and_is_named(key, training):
    with pytest.raises(TypeError, match=rf"key must be a unidrop.Key.*{re.escape(repr(key))}"):
        dropout(torch.ones(3), key=key, training=training)


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
def test_a_seed_that_is_none_raises_and_is_named(module, seed, error):
    with pytest.raises(error, match=rf"^seed must be .*{re.escape(str(seed))}"):
        module(seed=seed)


# --- The generator of torch --------------------------------------------------------------------

DRAWING = {"function": dropout, "module": Dropout()}


@pytest.fixture(params=DRAWING)
def drawing(request):
    """Return each call that draws its key, in turn."""
    return DRAWING[request.param]


def test_manual_seed_reproduces_the_masks(drawing):
    torch.manual_seed(5)
    first = [drawing(torch.ones(370)) for _ in range(3)]
    torch.manual_seed(5)
    again = [drawing(torch.ones(370)) for _ in range(3)]
    assert all(map(torch.equal, first, again))


def test_fork_rng_reproduces_the_masks_and_restores_the_generator(drawing):
    torch.manual_seed(5)
    with torch.random.fork_rng():
        first = drawing(torch.ones(370))
    assert torch.equal(drawing(torch.ones(370)), first)


def test_calls_that_draw_have_masks_of_their_own(drawing):
    assert not torch.equal(drawing(torch.ones(370)), drawing(torch.ones(370)))


@pytest.mark.parametrize("arguments", [{"p": 0}, {"training": False}, {"key": KEY}], ids=str)
def test_where_no_key_is_needed_none_is_drawn(arguments):
    state = torch.get_rng_state()
    dropout(torch.ones(3), **arguments)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seeded_module_draws_nothing():
    state = torch.get_rng_state()
    Dropout(seed=SITE)(torch.ones(3))
    assert torch.equal(torch.get_rng_state(), state)


# --- Modules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seed", [SITE, int(SITE), np.uint64(int(SITE))], ids=["Key", "int", "numpy"]
)
def test_training_call_n_has_the_key_with_n_folded_in(seed):
    module, x = Dropout(0.1, seed=seed), numbers(3, 37)
    for n in range(3):
        assert patterns(module(x)) == expected_patterns(x, 0.1, SITE.fold_in(n))


def test_a_module_in_place_returns_its_input():
    x = numbers(37)
    assert Dropout(inplace=True, seed=SITE)(x) is x
    assert patterns(x) == expected_patterns(numbers(37), 0.5, SITE.fold_in(0))


def test_the_gradient_of_an_earlier_call_has_that_calls_mask():
    module, x = Dropout(seed=SITE), numbers(37, requires_grad=True)
    y = module(x)
    module(x)
    y.sum().backward()
    assert torch.equal(x.grad, get_mask(SITE.fold_in(0), 37) * 2.0)


def test_evaluation_is_the_identity_and_does_not_count():
    module, x = Dropout(seed=SITE).eval(), numbers(37)
    assert module(x) is x
    assert module.calls == 0


def test_training_goes_on_after_evaluation_where_it_was():
    module, x = Dropout(seed=SITE), numbers(37)
    module(x)
    module.eval()(x)
    assert patterns(module.train()(x)) == expected_patterns(x, 0.5, SITE.fold_in(1))


def test_a_call_at_rate_0_is_the_identity_and_does_not_count():
    module, x = Dropout(0, seed=SITE), numbers(37)
    assert module(x) is x
    assert module.calls == 0


def test_a_call_at_rate_1_counts():
    module = Dropout(1, seed=SITE)
    module(numbers(37))
    assert module.calls == 1


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("arguments", [{}, {"p": 0.2}, {"p": 0.2, "inplace": True}], ids=str)
def test_repr_is_that_of_torch(module, arguments):
    assert repr(module(**arguments)) == repr(getattr(nn, module.__name__)(**arguments))


def test_repr_shows_the_seed():
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
def test_converting_a_module_keeps_its_call_number_whole(convert):
    module = Dropout(seed=SITE)
    module.calls = 2**40 + 1
    module = convert(module)
    x = numbers(37)
    assert patterns(module(x)) == expected_patterns(x, 0.5, SITE.fold_in(2**40 + 1))
    assert module.calls == 2**40 + 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_goes_on_by_itself_from_the_call_number(copied):
    module, x = Dropout(0.1, seed=SITE), numbers(37)
    module(x)
    twin = copied(module)
    for n in (1, 2):
        assert patterns(twin(x)) == expected_patterns(x, 0.1, SITE.fold_in(n))
    assert (module.calls, twin.calls) == (1, 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_an_unseeded_module_has_no_state(copied):
    assert copied(Dropout(0.1)).state_dict() == {}


def test_a_model_with_the_module_is_saved_and_loaded_whole():
    model, file = nn.Sequential(nn.Linear(3, 3), Dropout(0.1, seed=SITE)), io.BytesIO()
    model(torch.ones(2, 3))
    torch.save(model, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)[1].calls == 1


# --- The call number ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 5, 2**40, 2**63 - 2])
@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
def test_the_call_number_can_be_set(value, kind):
    module, x = Dropout(seed=SITE), numbers(37)
    module.calls = kind(value)
    assert patterns(module(x)) == expected_patterns(x, 0.5, SITE.fold_in(value))
    assert module.calls == value + 1


def test_a_tensor_that_set_the_call_number_does_not_advance_with_it():
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
def test_a_call_number_that_is_none_raises_is_named_and_changes_nothing(value, error):
    module = Dropout(seed=SITE)
    module.calls = 3
    with pytest.raises(error, match=rf"^calls must be .*{re.escape(str(value))}"):
        module.calls = value
    assert module.calls == 3
    assert module.calls.dtype == torch.int64


# --- Checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_without_a_seed_the_state_is_that_of_torch(module):
    assert module().state_dict() == getattr(nn, module.__name__)().state_dict() == {}


def test_a_call_without_a_seed_leaves_the_module_without_state():
    module = Dropout()
    module(torch.ones(3))
    assert module.state_dict() == {}


def test_with_a_seed_the_state_is_the_call_number():
    module = Dropout(seed=SITE)
    module(torch.ones(3))
    assert module.state_dict() == {"calls": torch.tensor(1)}


def test_a_run_that_is_loaded_goes_on_as_if_never_stopped():
    model, x = nn.Sequential(nn.Identity(), Dropout(seed=SITE)), numbers(37)
    model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    resumed = nn.Sequential(nn.Identity(), Dropout(seed=SITE))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed(x), model(x))
    assert resumed[1].calls == 2


def test_loading_leaves_the_checkpoint_as_it_was():
    state = {"calls": torch.tensor(5)}
    module = Dropout(seed=SITE)
    module.load_state_dict(state)
    module(torch.ones(3))
    assert (module.calls, state["calls"]) == (6, 5)


def network(make, depth=0):
    """Return a small network with a dropout, nested ``depth`` deep."""
    inner = nn.Sequential(nn.Linear(3, 3), make(), nn.Linear(3, 2))
    for _ in range(depth):
        inner = nn.Sequential(nn.ReLU(), inner)
    return inner


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("seed", [None, SITE], ids=["unseeded", "seeded"])
@pytest.mark.parametrize("module", MODULES)
def test_a_checkpoint_of_torchs_dropout_loads_strictly(module, seed, depth):
    of_torch = network(getattr(nn, module.__name__), depth)
    mine = network(lambda: module(seed=seed), depth)
    loaded = mine.load_state_dict(of_torch.state_dict(), strict=True)
    assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
    assert torch.equal(mine.state_dict().popitem()[1], of_torch.state_dict().popitem()[1])


def test_a_checkpoint_without_a_call_number_leaves_it():
    module = Dropout(seed=SITE)
    module.calls = 5
    module.load_state_dict(nn.Dropout().state_dict())
    assert module.calls == 5


def test_a_checkpoint_of_an_unseeded_network_loads_into_torchs():
    network(nn.Dropout).load_state_dict(network(Dropout).state_dict(), strict=True)


def test_what_else_is_missing_from_a_checkpoint_still_raises():
    mine = network(lambda: Dropout(seed=SITE))
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        mine.load_state_dict({}, strict=True)


# --- Channels ----------------------------------------------------------------------------------

FEATURES = [
    pytest.param(1, (4, 5), (1,), id="dropout1d of (C, L)"),
    pytest.param(1, (3, 4, 5), (2,), id="dropout1d of (N, C, L)"),
    pytest.param(2, (3, 4, 5, 6), (2, 3), id="dropout2d of (N, C, H, W)"),
    pytest.param(3, (3, 4, 5, 6), (1, 2, 3), id="dropout3d of (C, D, H, W)"),
    pytest.param(3, (2, 3, 4, 5, 6), (2, 3, 4), id="dropout3d of (N, C, D, H, W)"),
]


@pytest.mark.parametrize(("n", "shape", "axes"), FEATURES)
@pytest.mark.parametrize("inplace", [False, True])
def test_whole_channels_are_dropped(n, shape, axes, inplace):
    x = numbers(*shape)
    expected = expected_patterns(x, 0.1, KEY, axes)
    y = getattr(ours, f"dropout{n}d")(x, 0.1, inplace=inplace, key=KEY)
    assert patterns(y) == expected
    assert (y is x) == inplace


@pytest.mark.parametrize(("n", "shape", "axes"), FEATURES)
def test_a_module_drops_whole_channels_and_counts(n, shape, axes):
    x, module = numbers(*shape), getattr(ours, f"Dropout{n}d")(0.1, seed=SITE)
    for call in range(2):
        assert patterns(module(x)) == expected_patterns(x, 0.1, SITE.fold_in(call), axes)
    assert module.calls == 2


@pytest.mark.parametrize(("n", "shape", "axes"), FEATURES)
def test_the_gradient_drops_the_forward_calls_channels(n, shape, axes):
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
def test_an_input_of_any_rank_is_treated_as_by_torch(n, dimensions, mode):
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
def test_an_input_of_too_few_dimensions_raises_what_torch_raises(n, dimensions):
    of_torch, mine = (
        behaviour(getattr(module, f"dropout{n}d"), (6,) * dimensions) for module in (native, ours)
    )
    assert "RuntimeError" in of_torch[0]
    assert mine == of_torch


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_rank_that_raises_does_not_count(n):
    module = getattr(ours, f"Dropout{n}d")(seed=SITE)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(RuntimeError, match=r"Expected 2D or 3D|at least 2 dimensions"),
    ):
        module(torch.ones(()))
    assert module.calls == 0


# --- The same mask everywhere ------------------------------------------------------------------


def test_the_functions_mask_is_the_cores():
    assert torch.equal(
        dropout(torch.ones(3, 37), key=KEY) != 0, keep_mask((3, 37), 0.5, KEY, xp=torch)
    )


def test_a_network_trains():
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


def test_a_module_without_a_seed_says_what_a_call_number_needs():
    module = Dropout()
    with pytest.raises(AttributeError, match=r"without a seed .* make it with seed="):
        module.calls = 3
    with pytest.raises(AttributeError, match=r"without a seed .* make it with seed=") as raised:
        module.calls  # noqa: B018 # reading it is what raises
    assert raised.value.name == "calls"
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        module.other  # noqa: B018


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_module_without_a_seed_has_no_calls(copied):
    module = copied(Dropout())
    assert not hasattr(module, "calls")
    assert not module.state_dict()


def masks_of_calls_in_threads(layer, ones, calls, as_bytes):
    """Call one layer from many threads; return each call's mask."""
    with ThreadPoolExecutor(8) as pool:
        return sorted(pool.map(lambda _: as_bytes(layer(ones)), range(calls)))


def test_threads_that_share_a_module_never_share_a_call_number():
    module = Dropout(seed=SITE)
    ones = torch.ones(257)
    masks = masks_of_calls_in_threads(module, ones, 200, lambda y: y.numpy().tobytes())
    expected = [dropout(ones, key=SITE.fold_in(n)).numpy().tobytes() for n in range(200)]
    assert masks == sorted(expected)
    assert module.calls == 200


def test_a_data_parallel_replica_has_a_call_number_of_its_own_and_the_same():
    module, masks = Dropout(seed=SITE), []
    for _ in range(2):
        replica = module._replicate_for_data_parallel()
        replica.calls = module.calls.clone()  # as torch.nn.parallel.replicate sets it
        masks.append(patterns(replica(torch.ones(37))))
        assert replica.calls == 1
    assert masks[0] == masks[1]
    assert module.calls == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=get_name)
def test_a_cast_of_the_module_leaves_the_call_number_an_integer(dtype):
    module = Dropout(seed=SITE)
    module.calls = 2049
    module.type(dtype)
    assert module.calls.dtype == torch.int64
    assert module.calls == 2049


@pytest.mark.parametrize(
    "prepare",
    [
        lambda module: setattr(module, "calls", 5),
        lambda module: module.load_state_dict({"calls": torch.tensor(5)}, assign=True),
    ],
    ids=["set", "loaded"],
)
def test_a_call_number_that_meets_a_meta_buffer_takes_its_place(prepare):
    with torch.device("meta"):
        module = Dropout(seed=SITE)
    prepare(module)
    assert patterns(module(torch.ones(37))) == patterns(
        dropout(torch.ones(37), key=SITE.fold_in(5))
    )
    assert module.calls == 6


def test_a_module_from_the_meta_device_counts_from_0_after_reset_parameters():
    with torch.device("meta"):
        module = Dropout(seed=SITE)
    module.to_empty(device="cpu").reset_parameters()
    assert module.calls == 0


def test_a_checkpoint_of_nn_dropout_assigned_to_the_meta_device_counts_from_0():
    with torch.device("meta"):
        module = Dropout(seed=SITE)
    module.load_state_dict(nn.Dropout().state_dict(), assign=True)
    module(torch.ones(3))
    assert module.calls == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own making
def test_the_tangent_in_forward_mode_has_the_forward_calls_mask():
    x, tangent = numbers(37, requires_grad=True), numbers(37)
    with torch.autograd.forward_ad.dual_level():
        y = dropout(torch.autograd.forward_ad.make_dual(x, tangent), 0.1, key=KEY)
        actual = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert patterns(actual) == patterns(dropout(tangent, 0.1, key=KEY))


def test_a_call_that_fails_while_it_drops_is_not_counted(monkeypatch):
    module = Dropout(seed=SITE)

    def out_of_memory(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(DropoutPlan, "run", out_of_memory)
        with pytest.raises(MemoryError):
            module(torch.ones(3))
    assert module.calls == 0


@pytest.mark.parametrize("x", [nn.Linear(2, 2), torch.float32], ids=["module", "dtype"])
def test_what_torch_has_that_is_no_tensor_raises_in_the_core_and_is_named(x):
    with pytest.raises(TypeError, match=r"^x must be an array"):
        unidrop.dropout(x, 0.5, KEY)


def test_a_seed_in_the_place_of_inplace_raises_and_says_so():
    with pytest.raises(TypeError, match=r"inplace must be a bool, got 42; seed= goes by name"):
        Dropout(0.2, 42)


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("functional", [dropout, ours.dropout2d])
def test_a_compiled_call_is_one_graph_whatever_the_step_and_drops_what_the_eager_one_does(
    backend, functional
):
    graphs = CompileCounterWithBackend(backend)
    call = compiled(lambda x, step: functional(x, 0.3, key=SITE.fold_in(step)), graphs)
    x, upstream = numbers(2, 5, 7, 9, requires_grad=True), numbers(2, 5, 7, 9)
    for step in range(3):
        actual = call(x, torch.tensor(step))
        expected = functional(x, 0.3, key=SITE.fold_in(step))
        assert torch.equal(actual, expected)
        assert torch.equal(
            torch.autograd.grad(actual, x, upstream)[0],
            torch.autograd.grad(expected, x, upstream)[0],
        )
    assert graphs.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_is_one_graph_and_counts_its_calls(backend):
    graphs = CompileCounterWithBackend(backend)
    module, eager = Dropout(0.3, seed=SITE), Dropout(0.3, seed=SITE)
    call, x = compiled(module, graphs), numbers(5, 7)
    for _ in range(3):
        assert torch.equal(call(x), eager(x))
    assert int(module.calls) == 3
    assert graphs.frame_count == 1


def test_a_compiled_call_keeps_a_key_for_its_backward_pass_and_no_mask():
    kept = []
    call = compiled(lambda x, step: dropout(x, 0.3, key=SITE.fold_in(step)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(numbers(64, 64, requires_grad=True), torch.tensor(1))
    assert sum(tensor.numel() for tensor in kept) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("axes", [(), (0, 2)])
def test_the_operator_keeps_the_rules_of_operators(dtype, axes):
    x = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    key = torch.tensor(KEY.words, dtype=torch.int64)
    torch.library.opcheck(torch.ops.unidrop.dropout.default, (x, key, 0.3, axes))


def test_the_operator_drops_what_the_function_does():
    x, key = numbers(3, 4, 5), torch.tensor(KEY.words, dtype=torch.int64)
    expected = unidrop.dropout(x, 0.3, KEY, broadcast_axes=(1,))
    assert torch.equal(torch.ops.unidrop.dropout(x, key, 0.3, (1,)), expected)
