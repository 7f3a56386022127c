"""Eager tapes and accumulators, with the function of `tf.custom_gradient` and without it."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import record

import unidrop
from unidrop import Key
from unidrop.adapters.tensorflow import dropout
from unidrop.adapters.tensorflow import tape as tensorflow_tape

KEY = Key(42)
X = np.random.default_rng(0).standard_normal((3, 37)).astype("float32")


@pytest.fixture(params=["recorded", "custom_gradient"], autouse=True)
def way(request, monkeypatch):
    """Return each way to define a gradient, in turn."""
    if request.param == "custom_gradient":
        monkeypatch.setattr(tensorflow_tape, "could_possibly_record", None)
    return request.param


@pytest.fixture(params=["fused", "portable"], autouse=True)
def path(request):
    """Force each path, in turn."""
    with unidrop.force_path(request.param):
        yield


def assert_bits(actual, x):
    expected = unidrop.dropout(np.ascontiguousarray(x), 0.5, KEY)
    assert actual.numpy().tobytes() == expected.tobytes()


def drop(x):
    return dropout(x, 0.5, key=KEY)


def test_uses_custom_gradient_only_without_record(way, monkeypatch):
    used = []
    monkeypatch.setattr(tf, "custom_gradient", lambda f: used.append(f) or (lambda x: f(x)[0]))
    x = tf.constant(X)
    drop(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        drop(x)
    assert len(used) == (2 if way == "custom_gradient" else 0)


def test_keeps_operations_of_run_off_tapes(way, monkeypatch):
    recorded, run = [], unidrop.plan.DropoutPlan.run

    def watched_run(*arguments):
        recorded.append(record.could_possibly_record())
        return run(*arguments)

    monkeypatch.setattr(unidrop.plan.DropoutPlan, "run", watched_run)
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        drop(x)
    assert recorded == [way == "custom_gradient"]


def test_gives_gradients_of_nested_and_persistent_tapes():
    x = tf.constant(X)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = drop(x) ** 3
        first = inner.gradient(y, x)
    kept = unidrop.dropout(np.ones_like(X), 0.5, KEY)
    np.testing.assert_allclose(first, 3 * (X * kept) ** 2 * kept, rtol=1e-6)
    for _ in range(2):
        np.testing.assert_allclose(outer.gradient(first, x), 6 * X * kept**3, rtol=1e-6)


def test_gives_no_gradient_while_recording_is_stopped():
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        with tape.stop_recording():
            y = drop(x)
    assert tape.gradient(y, x) is None


def test_leaves_tape_recording_after_error(monkeypatch):
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        with monkeypatch.context() as patch:
            patch.setattr(unidrop.plan.DropoutPlan, "run", None)
            with pytest.raises(TypeError, match="NoneType"):
                drop(x)
        y = drop(x)
    assert_bits(tape.gradient(y, x), np.ones_like(X))


def test_gives_tangents_with_accumulator_inside_and_outside_tape():
    x, tangent = tf.constant(X), tf.constant(X[::-1])
    with tf.autodiff.ForwardAccumulator(x, tangent) as accumulator, tf.GradientTape() as tape:
        tape.watch(x)
        y = drop(x)
        jvp = accumulator.jvp(y)
    assert_bits(jvp, X[::-1])
    assert_bits(tape.gradient(y, x), np.ones_like(X))
    with tf.GradientTape() as tape, tf.autodiff.ForwardAccumulator(x, tangent) as accumulator:
        tape.watch(x)
        jvp = accumulator.jvp(drop(x))
    assert_bits(jvp, X[::-1])


def test_gives_unwatched_tensor_no_gradient():
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        y = drop(x)
    assert tape.gradient(y, x) is None
