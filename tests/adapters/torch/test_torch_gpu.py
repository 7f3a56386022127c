"""Tensors on a GPU: which kernels a call launches, and that no call waits for the GPU.

No test needs a GPU. CPU tensors stand for tensors on one, as in the matrix's backend
"torch-triton"; a package that records launches stands for the kernels.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import unidrop
from unidrop import Key
from unidrop.adapters.torch import (
    Dropout,
    Dropout2d,
    MultiheadAttention,
    buffers,
    dropout,
    scaled_dot_product_attention,
)
from unidrop.dispatch import forbid_plain_calls, force_path
from unidrop.fused.triton import MAX_FEATURES, Attention

# Operations of PyTorch that launch nothing on a GPU.
LAUNCHES_NOTHING = {
    "empty", "empty_like", "empty_strided", "new_empty", "detach", "view", "view_as", "slice",
    "select", "alias",
    "as_strided", "unbind", "to", "contiguous", "view_as_real", "resolve_conj", "resolve_neg",
    "requires_grad_", "expand", "ones_like", "result_type", "set_", "t", "transpose",
}  # fmt: skip


class Recorder:
    """Stands for the package of kernels: records their names."""

    MAX_FEATURES, Attention = MAX_FEATURES, Attention

    def __init__(self):
        self.launched = []

    def unavailable(self):
        return None

    def dropout(self, *arguments):
        self.launched.append("dropout")

    def next_key(self, calls, key, out, count=1):
        self.launched.append("next_key")

    def fold_in(self, key, data, tag, out):
        self.launched.append("fold_in")

    def attend(self, *arguments):
        self.launched.append("attend")

    def differentiate(self, *arguments):
        self.launched.append("differentiate")


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(buffers.BUFFERS, "is_interpreted", True)
    get = unidrop.dispatch._get_package

    def get_package(*names):
        return recorder if names == ("unidrop.fused.triton",) else get(*names)

    monkeypatch.setattr(unidrop.dispatch, "_get_package", get_package)
    with forbid_plain_calls():
        yield recorder


@pytest.fixture
def capturing(monkeypatch):
    """Let a CUDA graph capture what any device runs."""
    monkeypatch.setattr(buffers, "is_capturing", lambda device: True)


def count_operations(call):
    """Return the operations of PyTorch during a call that would launch kernels on a GPU."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    names = {event.name.removeprefix("aten::") for event in profiler.events() if "::" in event.name}
    return {name for name in names if not name.startswith("autograd::")} - LAUNCHES_NOTHING


@pytest.mark.parametrize(
    ("make_input", "layer"),
    [
        (lambda: torch.ones(33, 7), Dropout(0.3, seed=1)),
        (lambda: torch.ones(33, 7, dtype=torch.complex64), Dropout(0.3, seed=1)),
        (lambda: torch.ones(7, 33).t(), Dropout(0.3, seed=1)),
        (lambda: torch.ones(2, 3, 4, 5), Dropout2d(0.3, seed=1)),
    ],
    ids=["contiguous", "complex", "transposed", "channels"],
)
def test_launches_two_kernels_forward_and_one_backward(recorder, make_input, layer):
    x = make_input().requires_grad_()
    outputs = []
    assert not count_operations(lambda: outputs.append(layer(x)))
    assert recorder.launched == ["next_key", "dropout"]
    recorder.launched.clear()
    upstream = torch.ones_like(outputs[0])
    assert not count_operations(lambda: torch.autograd.grad(outputs[0], x, upstream))
    assert recorder.launched == ["dropout"]


def test_launches_one_kernel_for_a_key_of_integers(recorder):
    x = torch.ones(33)
    assert not count_operations(lambda: dropout(x, 0.3, key=Key(7)))
    assert recorder.launched == ["dropout"]


def test_launches_one_kernel_for_a_drawn_key(recorder):
    x, layer = torch.ones(33), Dropout(0.3)
    assert count_operations(lambda: layer(x)) <= {"random_"}  # on the CPU
    assert recorder.launched == ["dropout"]


def test_folds_a_step_by_one_kernel(recorder):
    x, step = torch.ones(33), torch.tensor(7)
    assert not count_operations(lambda: dropout(x, 0.3, key=Key(7).fold_in(step)))
    assert recorder.launched == ["fold_in", "dropout"]


def test_makes_a_mask_by_one_kernel(recorder):
    assert unidrop.keep_mask((3, 4), 0.3, Key(7), xp=torch).dtype is torch.bool
    assert recorder.launched == ["dropout"]


def test_recomputes_without_another_call_number(recorder):
    layer, x = Dropout(0.3, seed=1), torch.ones(33, requires_grad=True)
    checkpoint(lambda x: layer(x) ** 2, x, use_reentrant=False).sum().backward()
    assert recorder.launched == ["next_key", "dropout", "dropout", "dropout"]


def test_reads_no_number_of_the_device(recorder, monkeypatch):
    layer, x = Dropout(0.3, seed=1), torch.ones(4, 6, requires_grad=True)
    start, step = torch.tensor(8), torch.tensor(3)
    upstream = torch.ones_like(x)

    def refuse(*arguments):
        raise AssertionError("the call reads a number of the device")

    for name in ("item", "tolist", "__int__", "__index__", "__bool__", "__float__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    torch.autograd.grad(layer(x), x, upstream)
    key = Key(7).fold_in(step)
    y = unidrop.dropout(x, 0.3, key, global_shape=(100, 6), start=(start, 0))
    torch.autograd.grad(y, x, upstream)


def test_rolls_back_a_call_that_raises_on_the_device(recorder, monkeypatch):
    layer = Dropout(0.3, seed=1)

    def fail(*arguments):
        raise MemoryError("out of memory")

    def next_key(calls, key, out, count=1):
        out.copy_(torch.tensor([5, 6, int(calls[0])]))
        calls.add_(torch.tensor([1, -1]))

    monkeypatch.setattr(recorder, "dropout", fail)
    monkeypatch.setattr(recorder, "next_key", next_key)
    layer.calls = 7
    with pytest.raises(MemoryError):
        layer(torch.ones(3))
    assert layer._buffers["_calls"].tolist() == [7, ~7]


def test_writes_in_place(recorder):
    x = torch.ones(3, 4)
    assert dropout(x, 0.3, inplace=True, key=Key(1)) is x
    assert recorder.launched == ["dropout"]


@pytest.mark.parametrize("call", ["layer without a seed", "layer on the CPU", "function"])
def test_refuses_to_freeze_a_mask_in_a_cuda_graph(capturing, call):
    layer = Dropout(0.3, seed=1 if call == "layer on the CPU" else None)
    function = dropout if call == "function" else layer
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="each replay would drop the same elements: move the"):
        function(torch.ones(3, device="meta"))
    assert torch.equal(torch.get_rng_state(), state)
    assert call != "layer on the CPU" or layer.calls == 0


WITH_A_KEY = {
    "function": lambda key: dropout(torch.ones(3), 0.3, key=key),
    "window": lambda key: dropout(torch.ones(3), 0.3, key=key, global_shape=(9,), start=(3,)),
    "core": lambda key: unidrop.dropout(torch.ones(3), 0.3, key),
    "mask": lambda key: unidrop.keep_mask((3,), 0.3, key, xp=torch),
}


@pytest.mark.parametrize("call", WITH_A_KEY.values(), ids=WITH_A_KEY)
def test_warns_of_a_constant_key_in_a_cuda_graph(recorder, capturing, call):
    with pytest.warns(UserWarning, match="because the key is a number of Python: fold in the"):
        call(Key(7))


@pytest.mark.parametrize("call", WITH_A_KEY.values(), ids=WITH_A_KEY)
def test_refuses_a_key_of_the_cpu_in_a_cuda_graph(recorder, capturing, monkeypatch, call):
    monkeypatch.setattr(buffers, "must_stay", lambda number: False)
    words = torch.tensor(7), torch.tensor(0)
    with pytest.raises(RuntimeError, match="must take its key from the GPU"):
        call(Key.from_words(*words))
    assert recorder.launched == []


def test_refuses_a_start_of_the_cpu_in_a_cuda_graph(recorder, capturing, monkeypatch):
    key = Key.from_words(torch.tensor(7), torch.tensor(0))
    start = torch.tensor(3)
    monkeypatch.setattr(buffers, "must_stay", lambda number: number is not start)
    with pytest.raises(RuntimeError, match="must take its key from the GPU"):
        unidrop.dropout(torch.ones(3), 0.3, key, global_shape=(9,), start=(start,))


def test_recomputes_after_a_move_of_the_layer(recorder, monkeypatch):
    """A model may be moved between its passes; the recomputation has the number of the call."""
    numbers = []

    def next_key(calls, key, out, count=1):
        out.copy_(torch.tensor([5, 6, 7]))

    monkeypatch.setattr(recorder, "next_key", next_key)
    monkeypatch.setattr(recorder, "fold_in", lambda key, data, tag, out: numbers.append(int(data)))
    monkeypatch.setattr(recorder, "dropout", lambda *arguments: arguments[1].pointer.fill_(1))
    layer, x = Dropout(0.3, seed=1), torch.ones(3, requires_grad=True)
    layer.calls = 7
    for before, after in ((True, False), (False, True)):
        monkeypatch.setattr(buffers.BUFFERS, "is_interpreted", before)
        y = checkpoint(lambda x: layer(x) ** 2, x, use_reentrant=False)
        monkeypatch.setattr(buffers.BUFFERS, "is_interpreted", after)
        y.sum().backward()
    assert numbers == [7]
    assert int(layer.calls) == 8  # the recorder advances no number


def test_folds_on_the_device_of_the_step_without_kernels():
    step, words = torch.tensor(7, device="meta"), torch.tensor([1, 0], device="meta")
    assert torch.ops.unidrop.fold_in(words, step).device.type == "meta"


def test_captures_a_layer_on_the_device(recorder, capturing):
    Dropout(0.3, seed=1)(torch.ones(3))
    assert recorder.launched == ["next_key", "dropout"]


def test_attention_reads_no_number_of_the_device(recorder, monkeypatch):
    layer, x = MultiheadAttention(8, 2, 0.3, seed=1), torch.ones(5, 3, 8)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    monkeypatch.setattr(torch.Tensor, "item", None)
    layer(x, x, x, need_weights=False)[0].sum().backward()
    assert recorder.launched == ["next_key", "attend", "differentiate"]


def test_attention_launches_few_kernels(recorder):
    query, key, value = (torch.ones(2, 3, 4, 8, requires_grad=True) for _ in range(3))
    upstream, outputs = torch.ones(2, 3, 4, 8), []

    def attend():
        options = {"dropout_p": 0.3, "is_causal": True, "dropout_key": Key(7)}
        outputs.append(scaled_dot_product_attention(query, key, value, **options))

    def differentiate():
        torch.autograd.grad(outputs[0], (query, key, value), upstream)

    assert not count_operations(attend)
    assert recorder.launched == ["attend"]
    # PyTorch makes zeros, the gradient of the totals, and the kernels get a copy of a half.
    assert count_operations(differentiate) <= {"zeros", "zero_", "fill_", "clone", "copy_"}
    assert recorder.launched == ["attend", "differentiate"]


def test_attention_runs_in_tiles_if_kernels_cannot(recorder):
    x = torch.ones(2, 3, 4, 8)
    options = {"dropout_p": 0.3, "dropout_key": Key(7)}
    with force_path("portable"):
        scaled_dot_product_attention(x, x, x, **options)
    assert recorder.launched == []
    scaled_dot_product_attention(*(x.double(),) * 3, **options)
    mask = torch.zeros(4, 4, requires_grad=True)
    y = scaled_dot_product_attention(x, x, x, mask, **options)
    assert recorder.launched == ["dropout", "attend"]
    y.sum().backward()
    assert recorder.launched == ["dropout", "attend", "dropout"]


def test_attention_without_dropout_reads_no_key(recorder, capturing):
    x = torch.ones(2, 3, 4)
    for p in (0, 1):  # the key of Python integers would be the same in each replay
        scaled_dot_product_attention(x, x, x, None, p, dropout_key=Key(7), return_lse=True)
    assert recorder.launched == ["attend", "attend"]


def test_attention_in_a_cuda_graph_warns_of_a_constant_key(recorder, capturing):
    x = torch.ones(2, 3, 4)
    with pytest.warns(UserWarning, match="because the key is a number of Python: fold in the"):
        scaled_dot_product_attention(x, x, x, dropout_p=0.3, dropout_key=Key(7))
    with pytest.raises(RuntimeError, match="in a CUDA graph must take its key from the GPU"):
        scaled_dot_product_attention(x, x, x, dropout_p=0.3)


@pytest.mark.parametrize("name", ["draw_key", "integers"])
def test_keeps_operators_that_read_the_cpu_out_of_cuda_graphs(name):
    operator = getattr(torch.ops.unidrop, name).default
    assert torch.Tag.cudagraph_unsafe in operator.tags


def test_explains_the_kernels_of_a_gpu(recorder):
    path = unidrop.explain_path(torch.ones(3))
    assert str(path) == "fused: float32 on cpu, by one kernel of Triton"


@pytest.mark.slow  # imports Dynamo
def test_attention_in_one_compiled_graph_launches_kernels(recorder):
    query, key, value = (torch.ones(2, 3, 4, 8, requires_grad=True) for _ in range(3))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(start):
        options = {"dropout_key": Key(7), "global_shape": (2, 3, 9, 9), "start": (0, 0, start, 0)}
        return scaled_dot_product_attention(query, key, value, None, 0.3, True, **options)

    run(torch.tensor(3)).sum().backward()
    assert recorder.launched == ["attend", "differentiate"]
