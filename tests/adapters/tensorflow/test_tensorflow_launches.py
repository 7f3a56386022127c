"""How many operations TensorFlow runs for one eager call on a device other than the CPU.

TensorFlow has kernels for a GPU of each operation here, and launches one for each that is neither
a view nor an allocation.
"""

from collections import Counter

import pytest
import tensorflow as tf
from tensorflow.python.framework import op_callbacks

import unidrop
from unidrop import Key
from unidrop.adapters.tensorflow import dropout
from unidrop.adapters.tensorflow.arrays import LIBRARY

KEY = Key(42)
WINDOW = {"global_shape": (1280, 1001), "start": (64, 0)}


@pytest.fixture
def off_the_cpu(monkeypatch):
    monkeypatch.setattr(type(LIBRARY.arrays), "is_on_cpu", lambda self, x: False)
    with unidrop.force_path("portable"):
        yield


def operations(run):
    """Return how many operations a call runs, by name."""
    counts = Counter()

    def count(name, inputs, attributes, outputs, op_name=None, graph=None):
        counts[tf.compat.as_str(name)] += 1

    run()
    op_callbacks.add_op_callback(count)
    try:
        run()
    finally:
        op_callbacks.remove_op_callback(count)
    return counts


@pytest.mark.parametrize(
    ("shape", "options", "most"),
    [((1 << 12,), {}, 13), ((4, 1 << 20), {}, 13), ((640, 1000), WINDOW, 197)],
    ids=["small", "large", "window"],
)
def test_runs_no_more_operations(off_the_cpu, shape, options, most):
    x = tf.ones(shape)
    counts = operations(lambda: dropout(x, 0.1, key=KEY, **options))
    assert 10 <= sum(counts.values()) <= most, counts
