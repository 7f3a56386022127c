"""SavedModels of our dropout, loaded by a process that knows TensorFlow alone."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import unidrop
from unidrop import Key
from unidrop.adapters.keras import Dropout
from unidrop.adapters.tensorflow import dropout

pytestmark = pytest.mark.slow  # a further process imports TensorFlow

SITE = Key(42).fold_in("encoder/0")
X = np.random.default_rng(0).standard_normal((4, 10)).astype("float32")
BATCH = tf.TensorSpec((None, 10))

LOADS = """
import sys

import numpy as np
import tensorflow as tf

folder = sys.argv[1]
x = np.load(f"{folder}/x.npy")
loaded = {name: tf.saved_model.load(f"{folder}/{name}") for name in ("export", "archive", "module")}
np.savez(
    f"{folder}/actual.npz",
    export=loaded["export"].serve(x),
    serve=loaded["archive"].serve(x),
    train_3=loaded["archive"].train(x),
    train_4=loaded["archive"].train(x[:2]),
    step_7=loaded["module"].train(x, tf.constant(7, tf.int64)),
    step_8=loaded["module"].train(x[:2], tf.constant(8, tf.int64)),
    large=loaded["module"].train_large(np.tile(x, (10, 100)), tf.constant(9, tf.int64)),
)
assert "unidrop" not in sys.modules
"""


class Module(tf.Module):
    """A training step that accepts its number."""

    @tf.function(input_signature=[BATCH, tf.TensorSpec((), tf.int64)])
    def train(self, x, step):
        return dropout(x, 0.5, key=SITE.fold_in(step))

    @tf.function(input_signature=[tf.TensorSpec((None, 1000)), tf.TensorSpec((), tf.int64)])
    def train_large(self, x, step):
        return dropout(x, 0.5, key=SITE.fold_in(step))


@pytest.fixture(scope="module")
def actual(tmp_path_factory):
    """Return what a process without unidrop makes of the models that are saved here."""
    folder = tmp_path_factory.mktemp("models")
    model = keras.Sequential([keras.Input((10,)), Dropout(0.5, seed=SITE)])
    model.layers[0].calls = 3
    model.export(folder / "export", verbose=False)
    archive = keras.export.ExportArchive()
    archive.track(model)
    for name, training in (("serve", False), ("train", True)):
        archive.add_endpoint(name, lambda x, t=training: model(x, training=t), [BATCH])
    archive.write_out(folder / "archive", verbose=False)
    assert model.layers[0].calls == 3
    tf.saved_model.save(Module(), str(folder / "module"))
    np.save(folder / "x.npy", X)
    command = [sys.executable, "-c", LOADS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "actual.npz")


@pytest.mark.parametrize("name", ["export", "serve"])
def test_returns_input_in_inference(actual, name):
    assert actual[name].tobytes() == X.tobytes()


@pytest.mark.parametrize(("name", "rows"), [("train_3", 4), ("train_4", 2)])
def test_continues_counting_in_training_signature(actual, name, rows):
    key = SITE.fold_in(int(name[-1]))
    assert actual[name].tobytes() == unidrop.dropout(X[:rows], 0.5, key).tobytes()


@pytest.mark.parametrize(("name", "rows"), [("step_7", 4), ("step_8", 2)])
def test_gives_mask_of_step_in_signature_of_function(actual, name, rows):
    key = SITE.fold_in(int(name[-1]))
    assert actual[name].tobytes() == unidrop.dropout(X[:rows], 0.5, key).tobytes()


def test_gives_large_mask_by_saved_program(actual):
    x = np.tile(X, (10, 100))
    assert actual["large"].tobytes() == unidrop.dropout(x, 0.5, SITE.fold_in(9)).tobytes()
    operations = Module().train_large.get_concrete_function().graph.get_operations()
    assert any(operation.type == "PartitionedCall" for operation in operations)
