"""Training graphs drop the same elements in TensorFlow Lite, by operators that it has."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from without_unidrop import run_without_unidrop

import unidrop
import unidrop.adapters.keras as keras_adapter
from unidrop import Key
from unidrop.adapters.tensorflow import dropout

pytestmark = pytest.mark.slow  # a conversion takes seconds

KEY = Key(42)
STEPS = 20
X = np.random.default_rng(0).standard_normal((5, 7)).astype("float32")
SHAPE = tf.TensorSpec(X.shape, tf.float32)

RUN = f"""
import numpy as np
from ai_edge_litert.interpreter import Interpreter

sys.modules["tensorflow"] = None
expected = np.load("expected.npz")
train = Interpreter("model.tflite").get_signature_runner("train")
for step in range({STEPS}):
    outputs = train(x=expected["x"], step=np.array(step, "int32"))
    for name, output in outputs.items():
        assert output.tobytes() == expected[name][step].tobytes(), (step, name)
"""


class Module(tf.Module):
    """A function whose step is an input, its gradient, and a layer that counts its calls."""

    def __init__(self):
        super().__init__()
        self.layer = keras_adapter.Dropout(0.5, seed=1)
        self.layer(X)
        self.state = self.layer.seed_generator.state.value

    @tf.function(input_signature=[SHAPE, tf.TensorSpec((), tf.int32)])
    def train(self, x, step):
        key = KEY.fold_in(step)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, mask = dropout(x, 0.3, (5, 1), key=key, return_mask=True)
        gradient = tape.gradient(y, x)
        counted = self.layer(x, training=True)
        return {"function": y, "mask": mask, "gradient": gradient, "layer": counted}


def test_gives_bits_of_eager_calls_without_unidrop(tmp_path):
    pytest.importorskip("ai_edge_litert")
    module = Module()
    with unidrop.force_path("portable"):
        signatures = {"train": module.train.get_concrete_function()}
        tf.saved_model.save(module, str(tmp_path / "saved"), signatures=signatures)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved"))
    converter.experimental_enable_resource_variables = True
    (tmp_path / "model.tflite").write_bytes(converter.convert())
    assert module.layer.calls == 0

    expected = {"function": [], "mask": [], "gradient": [], "layer": []}
    for step in range(STEPS):
        options = {"noise_shape": (5, 1), "key": KEY.fold_in(step)}
        y, mask = dropout(X, 0.3, **options, return_mask=True)
        gradient = dropout(tf.ones(X.shape), 0.3, **options)
        layer = module.layer(X, training=True)
        for name, value in zip(expected, (y, mask, gradient, layer), strict=True):
            expected[name].append(value.numpy())
    np.savez(tmp_path / "expected.npz", x=X, **expected)
    run_without_unidrop(RUN, tmp_path)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint32", "int64"])
def test_folds_steps_of_each_width_into_key_of_portable_graph(dtype):
    @tf.function(input_signature=[SHAPE, tf.TensorSpec((), dtype)])
    def call(x, step):
        return dropout(x, 0.3, key=KEY.fold_in(step))

    with unidrop.force_path("portable"):
        traced = call.get_concrete_function()
    names = {operation.type for operation in traced.graph.get_operations()}
    assert not names & {"StatelessRandomUniformFullIntV2", "BitwiseAnd", "LeftShift", "RightShift"}
    info = np.iinfo(dtype)
    for step in (info.min, info.max, 0, 1, info.max // 3):
        step = tf.constant(step, dtype)
        assert np.array_equal(traced(tf.constant(X), step), dropout(X, 0.3, key=KEY.fold_in(step)))


def test_converts_no_dropout_in_evaluation():
    model = keras.Sequential([keras.Input((7,)), keras_adapter.Dropout(0.5, seed=1)])
    names = []

    @tf.function(input_signature=[SHAPE])
    def evaluate(x):
        return model(x)

    names = [
        operation.type for operation in evaluate.get_concrete_function().graph.get_operations()
    ]
    assert set(names) <= {"Placeholder", "Identity", "NoOp"}
