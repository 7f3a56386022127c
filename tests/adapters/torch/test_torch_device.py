"""PyTorch on a GPU: bits as on the CPU, no wait for the GPU, and CUDA graphs."""

import warnings
from contextlib import contextmanager

import pytest
import torch

import unidrop
from unidrop import Key
from unidrop.adapters.torch import Dropout, Dropout2d, dropout

if not torch.cuda.is_available():
    pytest.skip("PyTorch finds no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

KEY = Key(42).fold_in("encoder/0")
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 2),
    "every second element": lambda x: x[:, ::2, ::2],
    "broadcast": lambda x: x[:, :1].expand(-1, 5, -1),
    "channels last": lambda x: x[None].contiguous(memory_format=torch.channels_last),
}


def as_bits(x):
    return x.cpu().contiguous().view(torch.uint8)


@contextmanager
def no_wait():
    """Fail at each operation that waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_drops_the_elements_of_the_cpu(dtype, layout):
    x = LAYOUTS[layout](torch.randn(7, 33, 65, dtype=torch.float64).to(getattr(torch, dtype)))
    expected = dropout(x, 0.3, key=KEY)
    on_device = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)
    y = dropout(x.cuda() if 0 in x.stride() else on_device, 0.3, key=KEY)
    assert torch.equal(as_bits(y), as_bits(expected))


@pytest.mark.parametrize("seed", [7, None], ids=["seeded", "unseeded"])
def test_runs_a_layer_without_waiting(seed):
    layer = Dropout(0.3, seed=seed).cuda()
    x = torch.ones(64, 64, device="cuda", requires_grad=True)
    upstream, step = torch.ones_like(x), torch.zeros((), dtype=torch.int64, device="cuda")
    with no_wait():
        for _ in range(3):
            (gradient,) = torch.autograd.grad(layer(x), x, upstream)
        y = unidrop.dropout(x, 0.3, KEY.fold_in(step), global_shape=(128, 64), start=(step, 0))
    assert gradient.shape == y.shape == x.shape


def test_has_the_gradient_of_the_cpu():
    results = []
    for device in ("cpu", "cuda"):
        layer = Dropout2d(0.3, seed=7).to(device)
        x = torch.ones(3, 5, 4, 4, device=device, requires_grad=True)
        results.append(torch.autograd.grad(layer(x), x, torch.full_like(x, 2))[0])
    assert torch.equal(results[0], results[1].cpu())


def test_draws_the_masks_of_the_cpu():
    masks = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        masks.append([Dropout(0.3)(torch.ones(100, device=device)).cpu() for _ in range(2)])
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][1], masks[1][1])


def test_advances_the_call_number_in_a_cuda_graph():
    layer, expected = Dropout(0.3, seed=7).cuda(), Dropout(0.3, seed=7)
    x = torch.ones(1000, device="cuda")
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    layer.calls = 0
    for _ in range(20):
        graph.replay()
        assert torch.equal(y.cpu(), expected(x.cpu()))
    assert layer.calls == expected.calls


@pytest.mark.parametrize("layer", [Dropout(0.3), Dropout(0.3, seed=7)], ids=["unseeded", "cpu"])
def test_refuses_to_freeze_a_mask(layer):
    x = torch.ones(10, device="cuda")
    with (
        pytest.raises(RuntimeError, match="each replay would drop the same elements"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        layer(x)


def test_warns_of_a_constant_key():
    x = torch.ones(10, device="cuda")
    dropout(x, 0.3, key=KEY)
    with (
        pytest.warns(UserWarning, match="each replay of this CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        dropout(x, 0.3, key=KEY)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiles_to_the_masks_of_eager_calls(mode):
    layer, expected = Dropout(0.3, seed=7).cuda(), Dropout(0.3, seed=7)
    compiled = torch.compile(lambda x: layer(x * 2) + 1, mode=mode)
    x = torch.ones(64, 64, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of TF32 and of its cache
        for _ in range(5):
            assert torch.equal(compiled(x).cpu(), expected(x.cpu() * 2) + 1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_runs_on_a_gpu_that_is_not_the_current_one():
    x = torch.ones(1000, device="cuda:1")
    y = dropout(x, 0.3, key=KEY.fold_in(torch.tensor(3, device="cuda:0")))
    assert torch.equal(y.cpu(), dropout(x.cpu(), 0.3, key=KEY.fold_in(3)))
