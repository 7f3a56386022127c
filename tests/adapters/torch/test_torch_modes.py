"""Tests of PyTorch's ways to run a module: threads, subclasses, replicas and the like."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map
from torch_checkpoints import saved_calls

from unidrop import Key, keep_mask
from unidrop.adapters.torch import Dropout, dropout

SITE = Key(42).fold_in("encoder/0")
SHAPE = (5, 7)


def mask(call, shape=SHAPE, p=0.5, site=SITE):
    """Return the scaled mask of a call, which NumPy makes."""
    keep = torch.from_numpy(keep_mask(shape, p, site.fold_in(call)))
    return keep.float() * torch.tensor(1 / (1 - p), dtype=torch.float32)


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# --- Threads -------------------------------------------------------------------------------------


def compiled_before():
    """Return a compiled module, whose graph is ready, and which counts from 0."""
    module = Dropout(seed=SITE)
    call = torch.compile(module, fullgraph=True, backend="eager")
    call(torch.ones(SHAPE))
    module.calls = 0
    return call


EAGER = {
    "module": lambda: Dropout(seed=SITE)(torch.ones(SHAPE)),
    "function": lambda: dropout(torch.ones(SHAPE), key=SITE.fold_in(0)),
    "gradient": lambda: torch.func.grad(lambda x: Dropout(seed=SITE)(x).sum())(torch.ones(SHAPE)),
    "operator": lambda: torch.ops.unidrop.dropout(
        torch.ones(SHAPE), torch.tensor(SITE.fold_in(0).words), 0.5, []
    ),
}


@pytest.mark.parametrize("how", [*EAGER, "compiled before"])
def test_keeps_masks_of_thread_while_another_compiles(how):
    actual, call = [], EAGER.get(how)
    if call is None:
        ready = compiled_before()
        call = partial(ready, torch.ones(SHAPE))

    def backend(graph, inputs):
        with ThreadPoolExecutor(1) as pool:
            actual.append(pool.submit(call).result(timeout=60))
        return graph.forward

    compiled = torch.compile(Dropout(seed=SITE), fullgraph=True, backend=backend)
    assert torch.equal(compiled(torch.ones(3, 11)), mask(0, (3, 11)))
    assert torch.equal(actual[0], mask(0))


# --- Errors in a compiled call -------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("x", "p", "error", "message"),
    [
        (torch.ones(SHAPE, dtype=torch.int32), 0.5, TypeError, "int32"),
        (torch.ones(SHAPE), 1.5, ValueError, "between 0 and 1"),
    ],
    ids=["dtype", "rate"],
)
def test_counts_no_compiled_call_that_raises(x, p, error, message, backend):
    torch._dynamo.reset()  # which has forgotten then what it could not compile
    module = Dropout(seed=SITE)
    module.p = p
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        torch.compile(module, fullgraph=True, backend=backend)(x)
    assert module.calls == 0
    with pytest.raises(error, match=message):
        torch.compile(module, backend=backend)(x)
    assert module.calls == 0
    module.p = 0.5
    torch._dynamo.reset()
    y = torch.compile(module, fullgraph=True, backend=backend)(torch.ones(SHAPE))
    assert torch.equal(y, mask(0))


# --- Autocast, and subclasses of tensors ---------------------------------------------------------


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_keeps_dtype_under_autocast(mode):
    layer, linear = Dropout(seed=SITE), nn.Linear(7, 7)

    def function(x):
        hidden = linear(x)
        return hidden, layer(hidden), layer(x)

    call = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, y, whole = (call if mode == "compiled" else function)(torch.ones(SHAPE))
    y.float().sum().backward()
    assert (x.dtype, y.dtype, whole.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert linear.weight.grad.dtype == torch.float32
    assert torch.equal(y, (x.float() * mask(0)).bfloat16())
    assert torch.equal(whole, mask(1))


class Named(torch.Tensor):
    """A subclass that sees functions, by ``__torch_function__``, and hands itself on."""


class Wrapped(torch.Tensor):
    """A subclass that sees operators, by ``__torch_dispatch__``, and holds another tensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(plain, (args, kwargs or {}))
        return tree_map(
            lambda x: cls(x) if isinstance(x, torch.Tensor) else x, func(*args, **kwargs)
        )


def plain(x):
    if isinstance(x, Wrapped):
        return x.inner
    return x.as_subclass(torch.Tensor) if isinstance(x, Named) else x


SUBCLASSES = pytest.mark.parametrize(
    "of",
    [lambda x: x.as_subclass(Named), Wrapped],
    ids=["__torch_function__", "__torch_dispatch__"],
)


@SUBCLASSES
@pytest.mark.parametrize("shape", [SHAPE, (700, 800)])
def test_drops_and_differentiates_subclass_of_tensor(of, shape):
    module = Dropout(seed=SITE)
    x = of(numbers(*shape)).requires_grad_()
    y = module(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones(shape))
    assert type(y) is type(x)
    assert torch.equal(plain(y.detach()), numbers(*shape) * mask(0, shape))
    assert torch.equal(plain(gradient), mask(0, shape))
    assert module.calls == 1


@SUBCLASSES
def test_writes_subclass_of_tensor_in_place(of):
    x = of(torch.ones(SHAPE))
    assert Dropout(inplace=True, seed=SITE)(x) is x
    assert torch.equal(plain(x), mask(0))


def test_gives_meta_tensor_in_meta_module():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 3), Dropout(seed=SITE), Dropout())
        y = model(torch.ones(SHAPE))
    assert (y.device.type, y.shape) == ("meta", (5, 3))


# --- Modules that share, average and replicate ---------------------------------------------------


def test_counts_each_call_of_shared_module():
    shared = Dropout(seed=SITE)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Identity(), shared), "b": nn.Sequential(shared)})
    for step in range(3):
        assert torch.equal(model["a"](torch.ones(SHAPE)), mask(2 * step))
        assert torch.equal(model["b"](torch.ones(SHAPE)), mask(2 * step + 1))
    assert saved_calls(model.state_dict()) == {"a.1": 6, "b.0": 6}
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin["b"](torch.ones(SHAPE)), mask(6))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_keeps_integer_call_number_in_averaged_model(use_buffers):
    model = nn.Sequential(nn.Linear(7, 7), Dropout(seed=SITE))
    averaged = AveragedModel(model, use_buffers=use_buffers)
    for _ in range(4):
        model(torch.ones(SHAPE))
        averaged.update_parameters(model)
    assert model[1].calls == 4
    assert averaged.module[1].calls.dtype == torch.int64
    if not use_buffers:
        # PyTorch copies buffers then, and averages them otherwise.
        assert averaged.module[1].calls == 4
    before = averaged.module[1].calls.clone()
    x = torch.ones(SHAPE)
    assert torch.equal(averaged.eval()(x), averaged.module[0](x))
    assert averaged.module[1].calls == before


def test_gives_replicas_one_call_number():
    model = nn.Sequential(nn.Identity(), Dropout(seed=SITE))
    for step in range(2):
        replicas = [copy_for_data_parallel(model) for _ in range(2)]
        for replica in replicas:
            assert torch.equal(replica(torch.ones(SHAPE)), mask(step))
        assert model[1].calls == step
        model[1].calls = step + 1


def copy_for_data_parallel(model):
    """Return what `torch.nn.parallel.replicate` makes, which itself needs a GPU."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            setattr(replica, name, replicas[child])
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer.clone())
    return replicas[model]


@pytest.fixture
def one_process():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"static_graph": True}])
def test_counts_call_of_distributed_model_once(one_process, options):
    model = nn.Sequential(nn.Linear(7, 7), Dropout(seed=SITE))
    twin = copy.deepcopy(model)
    distributed = DistributedDataParallel(model, **options)
    x = numbers(*SHAPE)
    for step in range(3):
        y, expected = distributed(x), twin(x)
        assert torch.equal(y, expected)
        assert torch.equal(y != 0, mask(step) != 0)
        for loss in (y, expected):
            loss.square().sum().backward()
        torch.testing.assert_close(model[0].weight.grad, twin[0].weight.grad)
    assert model[1].calls == 3


# --- State ---------------------------------------------------------------------------------------


def test_saves_checkpoint_that_torch_loads_unless_strict():
    mine = nn.Sequential(nn.Linear(3, 3), Dropout(seed=SITE))
    of_torch = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "1._extra_state"'):
        of_torch.load_state_dict(mine.state_dict())
    loaded = of_torch.load_state_dict(mine.state_dict(), strict=False)
    assert loaded.unexpected_keys == ["1._extra_state"]
    assert torch.equal(of_torch[0].weight, mine[0].weight)


@pytest.mark.parametrize("seed", [SITE, None], ids=["seeded", "unseeded"])
def test_runs_on_cpu_while_another_device_is_the_default(seed):
    module = Dropout(seed=seed)
    with torch.device("meta"):
        if seed is not None:
            module.calls = 5
        torch.manual_seed(0)
        actual = module(torch.ones(SHAPE, device="cpu"))
    torch.manual_seed(0)
    assert torch.equal(actual, dropout(torch.ones(SHAPE), key=seed and seed.fold_in(5)))
