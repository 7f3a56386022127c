"""DropConnect in PyTorch and Flax: dropped weights of modules, gradients, calls and modes."""

import copy
import pickle

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from jax import numpy as jnp
from keras_models import assert_bits

import unidrop.adapters.flax as for_flax
import unidrop.adapters.jax as for_jax
import unidrop.adapters.torch as for_torch
from unidrop import Key

KEY = Key(42).fold_in("layer/0")
P = 0.4
X = np.random.default_rng(0).standard_normal((3, 5)).astype("float32")


def drop_torch(weight, n, name="weight"):
    return for_torch.dropout(weight, P, key=KEY.fold_in(n).fold_in(name))


def make_torch(module=None, names="weight", **options):
    module = torch.nn.Linear(5, 4) if module is None else module
    return for_torch.DropConnect(module, P, names, **{"seed": KEY, **options})


def get_gradients(module, y):
    module.zero_grad()
    y.square().sum().backward()
    return [parameter.grad for parameter in module.parameters()]


def test_drops_weights_of_each_call_in_torch():
    module, x = make_torch(), torch.from_numpy(X)
    linear = module.module
    for n in range(3):
        expected = torch.nn.functional.linear(x, drop_torch(linear.weight, n), linear.bias)
        y = module(x)
        assert torch.equal(y, expected)
        for a, b in zip(get_gradients(linear, y), get_gradients(linear, expected), strict=True):
            assert torch.equal(a, b)
    assert int(module.calls) == 3
    assert torch.equal(module.eval()(x), linear(x))
    assert int(module.calls) == 3


@pytest.mark.parametrize(
    "kind", [torch.nn.LSTM, pytest.param(torch.nn.GRU, marks=pytest.mark.slow)]
)
def test_drops_recurrent_weights_of_torch(kind):
    torch.manual_seed(0)
    names = ("weight_hh_l0", "weight_hh_l1")
    module, x = make_torch(kind(5, 6, num_layers=2), names), torch.randn(7, 2, 5)
    plain = kind(5, 6, num_layers=2)
    plain.load_state_dict(module.module.state_dict())
    with torch.no_grad():
        for name in names:
            getattr(plain, name).copy_(drop_torch(getattr(plain, name), 0, name))
    y = module(x)[0]
    assert torch.equal(y, plain(x)[0])
    y.sum().backward()
    slopes = [getattr(each, names[0]).grad for each in (module.module, plain)]
    plain(x)[0].sum().backward()
    kept = drop_torch(torch.ones(slopes[0].shape), 0, names[0])
    torch.testing.assert_close(slopes[0], plain.weight_hh_l0.grad * kept)
    # Evaluation, and the module itself, have the whole weights again.
    plain.load_state_dict(module.module.state_dict())
    assert torch.equal(module.module(x)[0], plain(x)[0])
    assert torch.equal(module.eval()(x)[0], plain(x)[0])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_has_eager_bits_compiled_in_torch(backend):
    torch._dynamo.reset()
    module, x = make_torch(), torch.from_numpy(X)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    linear = module.module
    for n in range(2):
        expected = torch.nn.functional.linear(x, drop_torch(linear.weight, n), linear.bias)
        assert torch.equal(compiled(x), expected)
    assert int(module.calls) == 2


def test_saves_and_copies_the_torch_module():
    module, x = make_torch(torch.nn.LSTM(5, 6), "weight_hh_l0"), torch.ones(2, 1, 5)
    module(x)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    copies.append(make_torch(torch.nn.LSTM(5, 6), "weight_hh_l0"))
    copies[2].load_state_dict(module.state_dict())
    y = module(x)[0]
    assert all(torch.equal(each(x)[0], y) for each in copies)
    assert set(module.module.state_dict()) == set(torch.nn.LSTM(5, 6).state_dict())


def test_runs_in_checkpoints_and_transformations_of_torch():
    module, x = make_torch(), torch.from_numpy(X)
    expected = get_gradients(module, module(x))
    module.calls = 0
    y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    assert all(map(torch.equal, get_gradients(module, y), expected))
    module.calls = 0
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    loss = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x,)).square().sum())
    assert all(map(torch.equal, loss(parameters).values(), expected))
    node = torch.fx.symbolic_trace(torch.nn.Sequential(module))
    assert [n.op for n in node.graph.nodes] == ["placeholder", "call_module", "output"]


def test_counts_no_call_that_raises():
    module = make_torch()
    with pytest.raises(RuntimeError):
        module(torch.ones(3, 6))
    assert int(module.calls) == 0
    own = module.module.weight
    assert isinstance(own, torch.nn.Parameter)
    module = make_flax()
    with pytest.raises(TypeError):
        module(jnp.ones((3, 6)))
    assert int(module.dropout.calls[...]) == 0


def test_describes_the_torch_module():
    module = for_torch.DropConnect(torch.nn.Linear(2, 2), 0.1)
    assert module.extra_repr() == "p=0.1, names=('weight',)"
    assert list(module.state_dict()) == ["module.weight", "module.bias"]


@pytest.mark.parametrize("names", ["weights", ("weight", "nothing"), ()])
def test_raises_for_names_that_do_not_exist_in_torch(names):
    with pytest.raises(ValueError, match="names must be parameters of the module"):
        make_torch(names=names)


def test_raises_for_integer_weights():
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False)
    with pytest.raises(TypeError, match="weight must be"):
        make_torch(module)


def make_flax(module=None, names="kernel", **options):
    module = nnx.Linear(5, 4, rngs=nnx.Rngs(0)) if module is None else module
    return for_flax.DropConnect(module, P, names, **{"seed": KEY, **options})


def drop_flax(weight, n, name="kernel", key=KEY):
    return for_jax.dropout(weight, P, key.fold_in(n).fold_in(name))


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_drops_weights_of_each_call_in_flax(wrap):
    module = make_flax()
    linear = module.module
    call = wrap(lambda module, x: module(x))
    for n in range(3):
        expected = X @ np.asarray(drop_flax(linear.kernel[...], n)) + np.asarray(linear.bias[...])
        np.testing.assert_allclose(call(module, X), expected, rtol=1e-5, atol=1e-6)
    assert int(module.dropout.calls[...]) == 3
    module.eval()
    assert_bits(np.asarray(module(X)), np.asarray(linear(X)))


def test_has_gradients_of_kept_weights_in_flax():
    module = make_flax()
    gradients = nnx.grad(lambda module: (module(X) * 2).sum())(module)
    kept = np.asarray(drop_flax(jnp.ones((5, 4)), 0))
    slope = gradients["module"]["kernel"][...]
    np.testing.assert_allclose(slope, kept * 2 * X.sum(0)[:, None], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradients["module"]["bias"][...], 6)
    assert int(module.dropout.calls[...]) == 1


@pytest.mark.slow
def test_drops_recurrent_weights_of_flax():
    def make_cell():
        return nnx.OptimizedLSTMCell(5, 6, rngs=nnx.Rngs(0))

    name = "cell.dense_h.kernel"
    module, x = make_flax(nnx.RNN(make_cell()), name), X[None]
    plain = nnx.RNN(make_cell())
    kernel = plain.cell.dense_h.kernel
    kernel[...] = drop_flax(kernel[...], 0, name)
    np.testing.assert_allclose(module(x), plain(x), rtol=1e-6)
    own = nnx.RNN(make_cell()).cell.dense_h.kernel
    assert_bits(np.asarray(module.module.cell.dense_h.kernel[...]), np.asarray(own[...]))


def test_keeps_other_updates_of_a_flax_module():
    class Block(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
            self.dropout = for_flax.Dropout(0.5, seed=3)

        def __call__(self, x):
            return self.dropout(self.norm(self.linear(x)))

    module = make_flax(Block(), "linear.kernel")
    nnx.jit(lambda module: module(X))(module)
    assert int(module.module.dropout.calls[...]) == int(module.dropout.calls[...]) == 1
    assert np.abs(module.module.norm.mean[...]).max() > 0


def test_draws_keys_and_runs_in_plain_jit_in_flax():
    module = make_flax(seed=None)
    key = jax.random.key(3)
    call = jax.jit(lambda x: module(x, rngs=key))
    kernel = for_jax.dropout(module.module.kernel[...], P, for_jax.as_key(key).fold_in("kernel"))
    np.testing.assert_allclose(call(X), X @ np.asarray(kernel), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", ["weight", "kernel.nothing", ("kernel", "use_bias"), ()])
def test_raises_for_names_that_do_not_exist_in_flax(names):
    with pytest.raises(ValueError, match="names must be variables of the module"):
        make_flax(names=names)


@pytest.mark.parametrize("make", [make_torch, make_flax])
def test_refuses_rates_outside_the_interval(make, monkeypatch):
    monkeypatch.setitem(globals(), "P", 1.5)
    with pytest.raises(ValueError, match=r"1\.5"):
        make()
