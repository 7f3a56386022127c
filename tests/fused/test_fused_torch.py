"""The fused path of PyTorch's tensors: gradients, in place, and what sees each operation."""

from contextlib import contextmanager

import pytest
import torch
from fused_arrays import (
    KEY,
    assert_bits,
    dropped,
    from_torch,
    get_output,
    kept_by,
    portable,
    to_torch,
    values,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import unidrop
import unidrop.adapters.torch


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "complex64"])
def test_the_gradient_is_the_upstream_gradient_by_the_forwards_own_mask(order, name):
    x = to_torch(values((33, 9), name).copy(order)).requires_grad_()
    upstream = to_torch(values((33, 9), name))
    with unidrop.force_path("fused"):
        y = unidrop.dropout(x, 0.4, KEY)
        y.backward(upstream)
    assert_bits(from_torch(y), portable(from_torch(x), 0.4))
    assert_bits(from_torch(x.grad), portable(from_torch(upstream), 0.4))


def test_the_gradient_of_a_sum_whose_upstream_is_expanded_is_the_scale():
    x = torch.ones(4, 9, requires_grad=True)
    with unidrop.force_path("fused"):
        unidrop.dropout(x, 0.5, KEY).sum().backward()
    assert torch.equal(x.grad, 2.0 * kept_by(KEY, (4, 9)))


def test_the_second_gradient_has_the_same_mask():
    x = torch.from_numpy(values((9,), "float64")).requires_grad_()
    with unidrop.force_path("fused"):
        y = unidrop.dropout(x, 0.5, KEY)
        (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    keep = kept_by(KEY)
    assert torch.equal(first, keep * 3 * (2 * x) ** 2 * 2)
    assert torch.equal(second, keep * 6 * (2 * x) * 4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_derivatives_are_the_numerical_ones():
    x = torch.from_numpy(values((3, 5), "float64")).requires_grad_()

    def function(v):
        return unidrop.dropout(v, 0.5, KEY) ** 2

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x)


def test_nothing_is_saved_for_the_backward_pass():
    saved = []
    x = torch.ones(4096, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda none: none)
    with hooks, unidrop.force_path("fused"):
        y = unidrop.dropout(x, 0.5, KEY)
    assert saved == []
    assert y.requires_grad


IN_PLACE = {
    "a leaf that requires grad": lambda: torch.ones(9, requires_grad=True),
    "a view of such a leaf": lambda: torch.ones(9, requires_grad=True)[:5],
    "an expanded tensor": lambda: torch.ones(1, 3).expand(4, 3),
    "an inference tensor": lambda: inference_ones(),
    "a view of an inference tensor": lambda: inference_ones()[:5],
}


def inference_ones():
    with torch.inference_mode():
        return torch.ones(9)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_in_place_refuses_what_pytorchs_own_refuses_and_leaves_it_as_it_was(kind):
    with pytest.raises(RuntimeError) as native:
        torch.nn.functional.dropout(IN_PLACE[kind](), 0.5, inplace=True)
    x = IN_PLACE[kind]()
    version = None if x.is_inference() else x._version
    with pytest.raises(RuntimeError) as raised:
        unidrop.adapters.torch.dropout(x, 0.5, inplace=True, key=KEY)
    assert str(raised.value)[:30] == str(native.value)[:30]
    assert torch.equal(x, torch.ones(x.shape))
    assert x.is_inference() or x._version == version


@pytest.mark.parametrize("make", [inference_ones, lambda: torch.ones(9)], ids=["inference", "not"])
def test_in_place_in_inference_mode_writes_the_output(make):
    x = make()
    with torch.inference_mode(), unidrop.force_path("fused"):
        y = unidrop.adapters.torch.dropout(x, 0.5, inplace=True, key=KEY)
    assert y is x
    assert torch.equal(x, 2.0 * kept_by(KEY))


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:5], lambda x: x.T, lambda x: x[::2]])
def test_in_place_writes_the_output_over_the_input_and_counts_as_a_change(view):
    x = torch.from_numpy(values((20, 9)))
    part = view(x)
    expected = portable(part.numpy(), 0.4)
    version = x._version
    with unidrop.force_path("fused"):
        y = unidrop.adapters.torch.dropout(part, 0.4, inplace=True, key=KEY)
    assert y is part
    assert_bits(part.numpy(), expected)
    assert x._version > version


def test_in_place_on_what_a_backward_pass_needs_is_found_out():
    w = torch.ones(9, requires_grad=True)
    x = torch.ones(9)
    y = w * x
    unidrop.adapters.torch.dropout(x, 0.5, inplace=True, key=KEY)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_on_an_intermediate_result_has_the_gradient():
    x = torch.ones(9, requires_grad=True)
    with unidrop.force_path("fused"):
        y = unidrop.adapters.torch.dropout(x * 3, 0.5, inplace=True, key=KEY)
        y.sum().backward()
    assert torch.equal(x.grad, 6.0 * kept_by(KEY))


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


NO_PLAIN_TENSOR = {
    "conjugated": (lambda x: torch.complex(x, -x).conj(), "conj"),
    "negated": (lambda x: torch.complex(x, -x).conj().imag, "neg"),
    "a subclass": (lambda x: x.as_subclass(Plain), "Plain"),
    "meta": (lambda x: x.to("meta"), "meta"),
}


@pytest.mark.parametrize("kind", NO_PLAIN_TENSOR)
def test_tensors_whose_memory_does_not_hold_their_values_are_portable(kind):
    make, reason = NO_PLAIN_TENSOR[kind]
    x = make(torch.from_numpy(values((9,))))
    path = unidrop.explain_path(x)
    assert path.name == "portable"
    assert reason in path.reason
    y = unidrop.dropout(x, 0.4, KEY)
    assert y.shape == x.shape
    if kind != "meta":
        plain = torch.clone(x.as_subclass(torch.Tensor)).resolve_conj().resolve_neg()
        assert_bits(
            y.as_subclass(torch.Tensor).resolve_conj().resolve_neg().numpy(),
            portable((plain + 0).numpy(), 0.4),
        )


def test_a_tensor_of_zeros_that_lies_nowhere_is_portable():
    # In a process of its own, which a read of address 0 would end.
    program = """
import torch, unidrop
x = torch._efficientzerotensor((9,))
print(unidrop.explain_path(x).name)
print(unidrop.dropout(x, 0.5, unidrop.Key(1)).sum().item())
"""
    assert get_output(program) == ["portable", "0.0"]


@contextmanager
def recorded():
    """Record the names of the operations that PyTorch dispatches."""
    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Recorder():
        yield names


def test_a_dispatch_mode_sees_the_operation():
    x = torch.ones(9)
    with recorded() as names:
        assert unidrop.explain_path(x).name == "portable"
        y = unidrop.dropout(x, 0.5, KEY)
    assert "dropout" in names
    assert torch.equal(y, 2.0 * kept_by(KEY))


def dropped_in_place(x):
    return unidrop.adapters.torch.dropout(x * 1, 0.5, inplace=True, key=KEY)


def with_dual(function):
    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, 3 * x))).tangent

    return tangent


def batched_gradients(x):
    x = x.clone().requires_grad_()
    y = dropped(x)
    return torch.autograd.grad(y, x, torch.eye(9), is_grads_batched=True)[0]


jacobian = torch.autograd.functional.jacobian
TRANSFORMED = {
    "grad": torch.func.grad(lambda x: (dropped(x) ** 2).sum()),
    "grad of grad": torch.func.grad(
        lambda x: torch.func.grad(lambda v: (dropped(v) ** 3).sum())(x).sum()
    ),
    "grad by another": lambda x: torch.func.grad(lambda v: (v * dropped(x)).sum())(x),
    "vmap": lambda x: torch.func.vmap(dropped, randomness="same")(x.expand(4, 9)),
    "vmap by another": lambda x: torch.func.vmap(lambda v: v * dropped(x))(x.expand(4, 9)),
    "jvp": lambda x: torch.func.jvp(dropped, (x,), (3 * x,)),
    "vjp": lambda x: torch.func.vjp(dropped, x)[1](3 * x),
    "jacrev": torch.func.jacrev(dropped),
    "jacfwd": torch.func.jacfwd(dropped),
    "functionalize": torch.func.functionalize(dropped),
    "jacobian": lambda x: jacobian(dropped, x),
    "vectorized jacobian": lambda x: jacobian(dropped, x, vectorize=True),
    "forward-mode jacobian": lambda x: jacobian(
        dropped, x, vectorize=True, strategy="forward-mode"
    ),
    "batched gradients": batched_gradients,
    "forward mode": with_dual(dropped),
    "forward mode in place": with_dual(dropped_in_place),
    "in place, grad": torch.func.grad(lambda x: (dropped_in_place(x) ** 2).sum()),
    "in place, vmap": lambda x: torch.func.vmap(dropped_in_place, randomness="same")(
        x.expand(4, 9)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMED)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_what_transforms_functions_gives_what_it_gives_of_the_portable_path(transform):
    x = torch.from_numpy(values((9,)))
    with unidrop.force_path("portable"):
        expected = TRANSFORMED[transform](x)
    actual = TRANSFORMED[transform](x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_the_old_kind_records_dropout():
    x = torch.ones(9)
    traced = torch.jit.trace(dropped, x, check_trace=False)
    assert torch.equal(traced(x * 3), 6.0 * kept_by(KEY))


def test_fake_tensors_give_a_fake_one():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode() as mode:
        y = dropped(mode.from_tensor(torch.ones(9)))
    assert isinstance(y, FakeTensor)
