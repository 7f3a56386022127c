"""Training graphs of torch.onnx.export drop, in ONNX Runtime, the elements of eager calls."""

import runpy
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from without_unidrop import run_without_unidrop

from unidrop import Key
from unidrop.adapters.torch import Dropout, MultiheadAttention, dropout, onnx

for _package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package)

pytestmark = [
    pytest.mark.slow,  # an export takes seconds
    pytest.mark.filterwarnings("ignore"),  # the exporter's own
]

KEY = Key(42)
STEPS = 20


def export(model, *inputs, **options):
    """Return the program of a model and example inputs, in half of the exporter's usual time."""
    return torch.onnx.export(model, inputs, dynamo=True, verbose=False, optimize=False, **options)


def load(program):
    """Return a function that runs a program in this process."""
    import onnxruntime

    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    return lambda *inputs: session.run(
        None,
        {spec.name: x.numpy() for spec, x in zip(session.get_inputs(), inputs, strict=True)},
    )


class Model(nn.Module):
    """Layers whose calls are an input, and functions with a key."""

    def __init__(self):
        super().__init__()
        self.drop = Dropout(0.3, seed=1)

    def forward(self, x, step):
        self.drop.calls = step
        window = {"global_shape": (50, 4, 6), "start": (step, 0, 0), "broadcast_axes": (2,)}
        _, mask = dropout(x, 0.3, key=KEY, **window, return_mask=True)
        return self.drop(self.drop(x)), mask


RUN = f"""
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
x = np.load("x.npy")
for step in range({STEPS}):
    outputs = session.run(None, dict(x=x, step=np.array(step, "int32")))
    expected = np.load(f"{{step}}.npz")
    for output, name in zip(outputs, expected, strict=True):
        assert output.dtype == expected[name].dtype
        assert output.tobytes() == expected[name].tobytes(), (step, name)
"""


def test_gives_bits_of_eager_calls_without_unidrop(tmp_path):
    model, x = Model(), torch.randn(3, 4, 6)
    program = export(model, x, torch.tensor(0, dtype=torch.int32), opset_version=18)
    assert {node.domain for node in program.model.graph} <= {"", "pkg.onnxscript.torch_lib"}
    program.save(tmp_path / "model.onnx")
    assert model.drop.calls == 0
    np.save(tmp_path / "x.npy", x.numpy())
    for step in range(STEPS):
        expected = model(x, torch.tensor(step, dtype=torch.int32))
        np.savez(tmp_path / f"{step}.npz", *(y.numpy() for y in expected))
    run_without_unidrop(RUN, tmp_path)


class Function(nn.Module):
    def forward(self, x, step):
        return dropout(x, 0.3, key=KEY.fold_in(step))


def test_gives_bits_of_eager_calls_at_other_lengths_and_steps():
    lengths = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, "step": {}}
    x = torch.ones(5, 7, dtype=torch.float64)
    run = load(export(Function(), x, torch.tensor(0), dynamic_shapes=lengths))
    for shape, step in (((2, 3), 0), ((9, 11), 2**40 + 5), ((8, 64), -1)):
        x, step = torch.randn(shape, dtype=torch.float64), torch.tensor(step)
        (actual,) = run(x, step)
        assert actual.tobytes() == Function()(x, step).numpy().tobytes()


def test_warns_of_layer_whose_calls_are_constant_in_graph():
    layer, x = Dropout(seed=1), torch.ones(64)
    layer.calls = 5
    with pytest.warns(UserWarning, match=r"so Dropout\(.*seed=.*\) will drop the same units"):
        run = load(export(layer, x))
    expected = layer(x).numpy()
    for _ in range(2):
        (actual,) = run(x)
        assert np.array_equal(actual, expected)


def test_refuses_vmap_whose_randomness_it_would_ignore():
    class Batched(nn.Module):
        def forward(self, x):
            return torch.vmap(lambda row: dropout(row, 0.5, key=KEY), randomness="different")(x)

    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        export(Batched(), torch.ones(3, 8))
    assert "under torch.func, such as vmap" in str(error.value.__cause__)


def test_changes_nothing_in_threads_that_export_nothing(monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)  # as in another thread
    x, layer = torch.ones(8, 64), Dropout(seed=KEY)
    batched = torch.vmap(lambda row: dropout(row, 0.5, key=KEY), randomness="different")(x)
    assert torch.equal(batched, dropout(x, 0.5, key=KEY))
    with FlopCounterMode(display=False):
        assert torch.equal(layer(x), dropout(x, 0.5, key=KEY.fold_in(0)))
    assert layer.calls == 1


def test_imports_with_versions_that_do_not_mark_exports(monkeypatch):
    name = "torch.onnx._internal.exporter"
    monkeypatch.setitem(sys.modules, f"{name}._flags", None)
    monkeypatch.delattr(f"{name}._flags", raising=False)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: False)
    module = runpy.run_path(onnx.__file__)
    assert module["_flags"] is None
    assert not module["is_exporting"]()


def test_exports_no_dropout_in_evaluation():
    model = nn.Sequential(nn.Linear(3, 3), Dropout(seed=1), Dropout()).eval()
    program = export(model, torch.ones(2, 3))
    assert [node.op_type for node in program.model.graph] == ["Gemm"]


def test_draws_keys_of_unseeded_layer_in_the_runtime():
    x = torch.ones(1000)
    run = load(export(Dropout(), x))
    (first,), (second,) = run(x), run(x)
    assert set(first) == set(second) == {0, 2}
    assert not np.array_equal(first, second)


class AttentionModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = MultiheadAttention(8, 2, 0.4, seed=1)

    def forward(self, x, step):
        self.attention.calls = step
        return self.attention(x, x, x, need_weights=False)[0]


def test_attention_has_the_mask_of_eager_calls():
    model, inputs = AttentionModel(), (torch.randn(5, 3, 8), torch.tensor(4))
    (found,) = load(export(model, *inputs))(*inputs)
    np.testing.assert_allclose(found, model(*inputs).detach().numpy(), rtol=0, atol=1e-6)
