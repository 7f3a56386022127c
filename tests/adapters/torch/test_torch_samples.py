"""PyTorch's own sample inputs of its dropout functions, through the functions of the adapter."""

from functools import cache

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.testing import make_tensor

import unidrop
from unidrop import Key
from unidrop.adapters import torch as adapter

KEY = Key(42).fold_in("encoder/0")
FUNCTIONS = ("dropout", "dropout2d", "dropout3d")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

pytestmark = [
    pytest.mark.slow,  # PyTorch's description of its functions takes seconds to import
    # PyTorch's samples hold what it warns of, and dropout3d of the adapter warns of the same.
    pytest.mark.filterwarnings("ignore:dropout.d. Received"),
]


@cache
def operators():
    """Return PyTorch's description of each function; looked up late, as it takes seconds."""
    pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
    from torch.testing._internal.common_methods_invocations import op_db

    names = {op.name.removeprefix("nn.functional."): op for op in op_db}
    return {name: names[name] for name in FUNCTIONS}


def samples(name, dtype):
    """Return the samples, as they are and with gaps in memory, on leaves that need gradients."""
    torch.manual_seed(0)
    made = list(operators()[name].sample_inputs("cpu", dtype, requires_grad=True))
    assert {sample.kwargs.get("p") for sample in made} == {None, 0.0, 0.5, 1.0}
    return made + [sample.noncontiguous() for sample in made]


def bits(x):
    """Return a tensor's bytes, so that 0 and -0 differ."""
    return x.detach().contiguous().view(torch.uint8).numpy().tobytes() if x.dim() else bits(x[None])


def axes(name, x):
    """Return the axes along which PyTorch's function shares a decision, from its documentation."""
    if name == "dropout":
        return ()
    batched = not (name == "dropout3d" and x.dim() == 4)
    return tuple(range(2 if batched else 1, x.dim()))


def specified(x, p, training, shared):
    """Return the output by the core's portable path, which a float32 NumPy array takes."""
    values = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32).numpy()
    with unidrop.force_path("portable"):
        y = unidrop.dropout(values, p, KEY, training=training, broadcast_axes=shared)
    return torch.from_numpy(np.array(y)).to(x.dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_accepts_each_dtype_of_torch_functions(name):
    assert operators()[name].dtypes <= set(DTYPES)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gives_specified_output_and_gradient(name, dtype, inplace):
    function = getattr(adapter, name)
    for sample in samples(name, dtype):
        leaf, kwargs = sample.input, sample.kwargs
        x = leaf * 1 if inplace else leaf
        y = function(x, *sample.args, inplace=inplace, key=KEY, **kwargs)
        assert (y is x) == (inplace or kwargs.get("p") == 0 or kwargs.get("training") is False)
        call = kwargs.get("p", 0.5), kwargs.get("training", True), axes(name, leaf)
        assert bits(y) == bits(specified(leaf, *call))
        upstream = make_tensor(y.shape, dtype=dtype, device="cpu")
        (gradient,) = torch.autograd.grad(y, leaf, upstream)
        assert bits(gradient) == bits(specified(upstream, *call))


@pytest.mark.parametrize("keys", [{"key": KEY}, {}], ids=["key", "drawn"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_torch_but_for_choice_of_elements(name, dtype, keys):
    for sample in samples(name, dtype):
        x, kwargs = sample.input, sample.kwargs
        y = getattr(adapter, name)(x, *sample.args, **keys, **kwargs)
        expected = getattr(functional, name)(x, *sample.args, **kwargs)
        for what in ("shape", "dtype", "device", "requires_grad"):
            assert getattr(y, what) == getattr(expected, what)
        assert y.stride() == expected.stride()
        if kwargs.get("p") in (0.0, 1.0) or kwargs.get("training") is False:
            assert torch.equal(y, expected)
            continue
        both = (y != 0) & (expected != 0)
        assert torch.equal(y[both], expected[both])
        if shared := axes(name, y):
            kept = (y != 0).flatten(shared[0])
            assert torch.equal(kept.all(-1), kept.any(-1))


@pytest.mark.parametrize("p", [-0.1, 1.1])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rejects_rate_as_torch_does(name, p):
    x = torch.ones(2, 3, 4, 5)
    message = rf"^dropout probability .*has to be between 0 and 1, but got {p}$"
    for function, keys in ((getattr(functional, name), {}), (getattr(adapter, name), {"key": KEY})):
        with pytest.raises(ValueError, match=message):
            function(x, p, **keys)
