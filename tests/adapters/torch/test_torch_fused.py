"""The fused path for PyTorch tensors: gradients, in-place calls and dispatch modes."""

import itertools
from contextlib import contextmanager

import pytest
import reference
import torch
from array_libraries import from_torch, to_torch
from fused_arrays import (
    DTYPES,
    KEY,
    assert_bits,
    fused,
    laid_out,
    patterns,
    portable,
    random_patterns,
    values,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import unidrop
import unidrop.adapters.torch


def kept_by(key, shape=(9,), p=0.5):
    """Return the mask of the specification."""
    keep = reference.keep_mask(shape, p, int(key))
    return torch.tensor(keep, dtype=torch.bool).reshape(shape)


def dropped(x, key=KEY):
    return unidrop.dropout(x, 0.5, key)


# --- Gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "complex64"])
def test_gives_gradient_by_forward_mask(order, name):
    x = to_torch(values((33, 9), name).copy(order)).requires_grad_()
    upstream = to_torch(values((33, 9), name))
    with unidrop.force_path("fused"):
        y = unidrop.dropout(x, 0.4, KEY)
        y.backward(upstream)
    assert_bits(from_torch(y), portable(from_torch(x), 0.4))
    assert_bits(from_torch(x.grad), portable(from_torch(upstream), 0.4))


def test_gives_gradient_of_expanded_upstream():
    x = torch.ones(4, 9, requires_grad=True)
    with unidrop.force_path("fused"):
        unidrop.dropout(x, 0.5, KEY).sum().backward()
    assert torch.equal(x.grad, 2.0 * kept_by(KEY, (4, 9)))


def test_gives_second_gradient_by_same_mask():
    x = torch.from_numpy(values((9,), "float64")).requires_grad_()
    with unidrop.force_path("fused"):
        y = unidrop.dropout(x, 0.5, KEY)
        (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    keep = kept_by(KEY)
    assert torch.equal(first, keep * 3 * (2 * x) ** 2 * 2)
    assert torch.equal(second, keep * 6 * (2 * x) * 4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_has_numerical_derivatives():
    x = torch.from_numpy(values((3, 5), "float64")).requires_grad_()

    def function(v):
        return unidrop.dropout(v, 0.5, KEY) ** 2

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x)


def test_saves_nothing_for_backward_pass():
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
def test_refuses_in_place_what_torch_refuses(kind):
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
def test_writes_in_place_in_inference_mode(make):
    x = make()
    with torch.inference_mode(), unidrop.force_path("fused"):
        y = unidrop.adapters.torch.dropout(x, 0.5, inplace=True, key=KEY)
    assert y is x
    assert torch.equal(x, 2.0 * kept_by(KEY))


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:5], lambda x: x.T, lambda x: x[::2]])
def test_writes_in_place_and_counts_as_change(view):
    x = torch.from_numpy(values((20, 9)))
    part = view(x)
    expected = portable(part.numpy(), 0.4)
    version = x._version
    with unidrop.force_path("fused"):
        y = unidrop.adapters.torch.dropout(part, 0.4, inplace=True, key=KEY)
    assert y is part
    assert_bits(part.numpy(), expected)
    assert x._version > version


def test_reveals_in_place_change_to_backward_pass():
    w = torch.ones(9, requires_grad=True)
    x = torch.ones(9)
    y = w * x
    unidrop.adapters.torch.dropout(x, 0.5, inplace=True, key=KEY)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_has_gradient_in_place_on_intermediate_result():
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
def test_takes_portable_path_if_memory_lacks_values(kind):
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


def test_takes_portable_path_for_zeros_without_memory():
    x = torch._efficientzerotensor((9,))
    assert unidrop.explain_path(x).name == "portable"  # kernels would read address 0
    assert unidrop.dropout(x, 0.5, KEY).sum().item() == 0


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


def test_shows_operation_to_dispatch_mode():
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
def test_transforms_as_portable_path_does(transform):
    x = torch.from_numpy(values((9,)))
    with unidrop.force_path("portable"):
        expected = TRANSFORMED[transform](x)
    actual = TRANSFORMED[transform](x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_is_recorded_by_torch_jit_trace():
    x = torch.ones(9)
    traced = torch.jit.trace(dropped, x, check_trace=False)
    assert torch.equal(traced(x * 3), 6.0 * kept_by(KEY))


def test_gives_fake_tensor_of_fake_tensor():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode() as mode:
        y = dropped(mode.from_tensor(torch.ones(9)))
    assert isinstance(y, FakeTensor)


# --- Layouts and values --------------------------------------------------------------------------


def test_is_fused_for_parameter():
    assert unidrop.explain_path(torch.nn.Parameter(torch.ones(9))).name == "fused"


@pytest.mark.parametrize("name", DTYPES)
def test_gives_portable_bits_in_any_order_of_axes(name):
    x = random_patterns((13, 70, 9), name)
    for axes in ((), (0,), (2,)):
        expected = portable(x, 0.4, broadcast_axes=axes)
        for order in itertools.permutations(range(3)):
            tensor = to_torch(laid_out(x, order))
            y = fused(tensor, 0.4, broadcast_axes=axes)
            assert_bits(from_torch(y), expected)
            assert y.stride() == torch.empty_like(tensor).stride()


TENSOR_VIEWS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1, :, :1].expand(4, 5, 6, 7),
    "transposed": lambda x: x.transpose(1, 3),
    "sliced": lambda x: x[:, ::2, 1:, ::3],
    "offset": lambda x: x.flatten()[5:],
    "diagonal": lambda x: x.diagonal(dim1=2, dim2=3),
    "unfolded": lambda x: x.flatten().unfold(0, 9, 4),
}


@pytest.mark.parametrize("view", TENSOR_VIEWS)
@pytest.mark.parametrize("axes", [(), (0,), (-1,), (-1, -2)], ids=str)
def test_gives_portable_bits_of_views(view, axes):
    x = TENSOR_VIEWS[view](torch.from_numpy(values((4, 5, 6, 7))))
    if len(axes) > x.dim():
        axes = axes[:1]
    y = fused(x, 0.4, broadcast_axes=axes)
    assert_bits(y.numpy(), portable(x.numpy(), 0.4, broadcast_axes=axes))
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_drops_same_channels_in_channels_last(rank):
    x = torch.from_numpy(values((2, 5, *(3, 4, 2)[:rank])))
    drop = getattr(unidrop.adapters.torch, f"dropout{rank}d")
    turned = x.movedim(1, -1).contiguous().movedim(-1, 1)
    with unidrop.force_path("fused"):
        assert torch.equal(drop(turned, 0.4, key=KEY), drop(x, 0.4, key=KEY))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_keeps_output_rule_if_thread_flushes_subnormals(name):
    x = random_patterns((4096,), name, seed=2)
    expected = portable(x, 0.3)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush subnormals")
    try:
        y = fused(x, 0.3)
    finally:
        torch.set_flush_denormal(False)
    form = reference.FORMATS[name]
    before, got, wanted = (patterns(array).tolist() for array in (x, y, expected))
    for bits, actual, right in zip(before, got, wanted, strict=True):
        small = name != "float16" and min(bits & ~form.sign, right & ~form.sign) < form.normal
        assert actual == right or (small and actual == bits & form.sign and right != 0), hex(bits)
