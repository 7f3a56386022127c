"""Tests of the TensorFlow adapter: eager, in graphs, under XLA, and differentiated."""

import logging
import re

import ml_dtypes
import numpy as np
import pytest
import reference
import tensorflow as tf

import unidrop
import unidrop.library
from unidrop import Key
from unidrop.adapters.tensorflow import dropout

SITE = Key(42).fold_in("encoder/0")
KEY = SITE.fold_in(7)
X = np.random.default_rng(0).standard_normal((3, 37)).astype("float32")
DTYPES = ["float16", ml_dtypes.bfloat16, "float32", "float64", "complex64", "complex128"]
NAMES = [np.dtype(dtype).name for dtype in DTYPES]


def assert_bits(actual, x, rate, key=KEY, axes=()):
    """Compare an output with the core's on NumPy, bit for bit."""
    expected = unidrop.dropout(x, rate, key, broadcast_axes=axes)
    actual = actual.numpy()
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


MODES = {
    "eager": lambda function: function,
    "graph": tf.function,
    "XLA": tf.function(jit_compile=True),
}


GRAPHS = [
    pytest.param(False, id="graph"),
    pytest.param(True, id="XLA", marks=pytest.mark.slow),  # it compiles each program for seconds
]


@pytest.fixture(params=["eager", "graph", pytest.param("XLA", marks=pytest.mark.slow)])
def compiled(request):
    """Return each way to run a function, in turn."""
    return MODES[request.param]


# --- The output --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("rate", [1 / 3, 1])
def test_gives_output_of_core_on_numpy(compiled, dtype, rate):
    x = X.astype(dtype)
    assert_bits(compiled(lambda x: dropout(x, rate, key=KEY))(tf.constant(x)), x, rate)


def test_gives_specified_decisions(compiled):
    y = compiled(lambda x: dropout(x, 0.1, key=KEY))(tf.ones(370))
    keep = reference.keep_mask((370,), 0.1, int(KEY))
    np.testing.assert_array_equal(y.numpy() != 0, np.asarray(keep, bool))


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_depends_on_all_bits_of_key(compiled, seed):
    y = compiled(lambda x: dropout(x, 0.1, key=Key(seed)))(tf.constant(X))
    assert_bits(y, X, 0.1, Key(seed))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 5)], ids=str)
def test_keeps_any_shape(compiled, shape):
    x = np.ones(shape, "float32")
    assert_bits(compiled(lambda x: dropout(x, 0.5, key=KEY))(tf.constant(x)), x, 0.5)


def test_gives_large_tensor_same_mask():
    x = np.ones((3, 300_001), "float32")
    assert_bits(dropout(tf.constant(x), 0.5, key=KEY), x, 0.5)


def test_replaces_dropped_nan_and_infinities_by_zeros(compiled):
    x = tf.constant([np.nan, np.inf, -np.inf, -1.0])
    y = compiled(lambda x: dropout(x, 1, key=KEY))(x)
    assert y.numpy().tobytes() == bytes(16)


@pytest.mark.parametrize("rate", [0, 0.0])
def test_returns_tensor_itself_at_rate_0(rate):
    x = tf.constant(X)
    assert dropout(x, rate, key=KEY) is x


@pytest.mark.parametrize("x", [X, X.tolist(), tf.Variable(X)], ids=lambda x: type(x).__name__)
def test_accepts_what_tensorflow_converts(x):
    assert_bits(dropout(x, 0.1, key=KEY), X, 0.1)


# --- Graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("xla", GRAPHS)
@pytest.mark.parametrize(
    "signature", [(None, 37), (3, None), (None, None)], ids=["rows", "columns", "both"]
)
def test_accepts_unknown_lengths(signature, xla):
    @tf.function(input_signature=[tf.TensorSpec(signature)], jit_compile=xla)
    def drop(x):
        return dropout(x, 0.1, key=KEY)

    for x in (X, X[:, :37]) if signature[0] else (X, X[:2], X[:0]):
        assert_bits(drop(tf.constant(x)), x, 0.1)
    assert drop.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("xla", GRAPHS)
def test_keeps_unknown_length_in_static_shape(xla):
    drop = tf.function(lambda x: dropout(x, 0.1, key=KEY), jit_compile=xla)
    concrete = drop.get_concrete_function(tf.TensorSpec((None, 37)))
    assert concrete.structured_outputs.shape.as_list() == [None, 37]


@pytest.mark.parametrize("xla", GRAPHS)
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32"])
def test_moves_step_without_retracing(xla, dtype):
    drop = tf.function(lambda x, step: dropout(x, 0.1, key=SITE.fold_in(step)), jit_compile=xla)
    for step in range(5):
        y = drop(tf.constant(X), tf.constant(step, dtype))
        assert_bits(y, X, 0.1, SITE.fold_in(step))
    assert drop.experimental_get_tracing_count() == 1


def test_accepts_variable_that_function_advances_as_step():
    step = tf.Variable(0, dtype=tf.int64)

    @tf.function
    def drop(x):
        y = dropout(x, 0.1, key=SITE.fold_in(step))
        step.assign_add(1)
        return y

    for n in range(3):
        assert_bits(drop(tf.constant(X)), X, 0.1, SITE.fold_in(n))


def test_accepts_step_beyond_32_bits(compiled):
    drop = compiled(lambda x, step: dropout(x, 0.1, key=SITE.fold_in(step)))
    assert_bits(drop(tf.constant(X), tf.constant(2**40 + 3)), X, 0.1, SITE.fold_in(2**40 + 3))


# --- Gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64"])
@pytest.mark.parametrize("rate", [0.1, 1])
def test_gives_gradient_as_output_of_upstream_gradient(compiled, dtype, rate):
    x, upstream = X.astype(dtype), X[::-1].astype(dtype)

    def gradient(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = dropout(x, rate, key=KEY)
        return tape.gradient(y, x, output_gradients=upstream)

    actual = compiled(gradient)(tf.constant(x), tf.constant(upstream))
    assert_bits(actual, np.ascontiguousarray(upstream), rate)


@pytest.mark.parametrize("xla", GRAPHS)
def test_gives_gradient_by_mask_at_unknown_lengths(xla):
    @tf.function(input_signature=[tf.TensorSpec((None, 37)), tf.TensorSpec((), "int64")])
    def gradient(x, step):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = dropout(x, 0.1, key=SITE.fold_in(step))
        return tape.gradient(y, x)

    actual = tf.function(gradient, jit_compile=xla)(tf.constant(X), tf.constant(7, tf.int64))
    assert_bits(actual, np.ones_like(X), 0.1)


def test_gives_gradient_twice_from_persistent_tape():
    x = tf.constant(X)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = dropout(x, 0.1, key=KEY)
    for _ in range(2):
        assert_bits(tape.gradient(y, x), np.ones_like(X), 0.1)


def test_gives_second_derivative_from_nested_tapes(compiled):
    def second(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = dropout(x, 0.5, key=KEY) ** 2
            first = inner.gradient(y, x)
        return outer.gradient(first, x)

    assert_bits(compiled(second)(tf.constant(X)), np.full_like(X, 4), 0.5)


def test_gives_gradient_twice_from_tape_inside_function(compiled):
    def gradients(x, step):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = dropout(x, 0.1, key=SITE.fold_in(step))
        return tape.gradient(y, x), tape.gradient(y, x, 3 * tf.ones_like(y))

    once, thrice = compiled(gradients)(tf.constant(X), tf.constant(7))
    assert_bits(once, np.ones_like(X), 0.1)
    assert_bits(thrice, np.full_like(X, 3), 0.1)


def test_recomputes_mask_in_recompute_grad(compiled):
    def run(x, step):
        recomputed = tf.recompute_grad(lambda x: 3 * dropout(x, 0.1, key=SITE.fold_in(step)))
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = recomputed(x)
        return y, tape.gradient(y, x)

    y, gradient = compiled(run)(tf.constant(X), tf.constant(7))
    np.testing.assert_array_equal(y.numpy() != 0, unidrop.keep_mask(X.shape, 0.1, KEY))
    assert_bits(gradient, np.full_like(X, 3), 0.1)


def test_gives_tangent_in_forward_mode_by_mask(compiled):
    def tangent(x):
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
            y = dropout(x, 0.1, key=KEY)
        return accumulator.jvp(y)

    assert_bits(compiled(tangent)(tf.constant(X)), np.ones_like(X), 0.1)


def test_gives_second_derivative_forward_over_reverse():
    x = tf.constant(X)
    with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = dropout(x, 0.5, key=KEY) ** 2
        gradient = tape.gradient(y, x)
    assert_bits(accumulator.jvp(gradient), np.full_like(X, 4), 0.5)


@pytest.mark.parametrize("rows", ["jacobian", "batch_jacobian"])
def test_gives_jacobian_with_scaled_mask_as_diagonal(rows):
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = dropout(x, 0.5, key=KEY)
    jacobian = getattr(tape, rows)(y, x).numpy()
    scales = unidrop.dropout(np.ones_like(X), 0.5, KEY)
    if rows == "jacobian":
        np.testing.assert_array_equal(jacobian.reshape(X.size, X.size), np.diag(scales.ravel()))
    else:
        np.testing.assert_array_equal(jacobian, np.stack([np.diag(row) for row in scales]))


@pytest.mark.parametrize("apply", [dropout, unidrop.dropout], ids=["the adapter's", "the core's"])
@pytest.mark.parametrize("each", [tf.map_fn, tf.vectorized_map], ids=lambda each: each.__name__)
def test_gives_each_row_of_map_its_key(compiled, each, apply):
    options = {"fn_output_signature": tf.float32} if each is tf.map_fn else {}

    def rows(x):
        steps = tf.range(len(X))
        return each(lambda a: apply(a[0], 0.1, key=SITE.fold_in(a[1])), (x, steps), **options)

    for step, row in enumerate(compiled(rows)(tf.constant(X)).numpy()):
        assert row.tobytes() == unidrop.dropout(X[step], 0.1, SITE.fold_in(step)).tobytes()


@pytest.mark.parametrize("xla", GRAPHS)
def test_traces_100_steps_once(xla):
    drop = tf.function(lambda x, step: dropout(x, 0.1, key=SITE.fold_in(step)), jit_compile=xla)
    x, masks = tf.constant(X), set()
    for step in range(100):
        masks.add(drop(x, tf.constant(step)).numpy().tobytes())
    assert drop.experimental_get_tracing_count() == 1
    assert len(masks) == 100


def test_gives_gradient_of_variable():
    x = tf.Variable(X)
    with tf.GradientTape() as tape:
        y = dropout(x, 0.1, key=KEY)
    assert_bits(tape.gradient(y, x), np.ones_like(X), 0.1)


def test_has_numerical_gradient():
    x = tf.constant(X.astype("float64"))
    theoretical, numerical = tf.test.compute_gradient(
        lambda x: dropout(x, 0.3, key=KEY), [x[:, :5]]
    )
    np.testing.assert_allclose(theoretical[0], numerical[0], rtol=1e-6, atol=1e-9)


# --- noise_shape -------------------------------------------------------------------------------

NOISE = [
    pytest.param((3, 37), (), id="the tensor's own"),
    pytest.param((None, None), (), id="None"),
    pytest.param((1, 37), (0,), id="1 in front"),
    pytest.param((None, 1), (1,), id="1 behind"),
    pytest.param([1, 1], (0, 1), id="a list"),
    pytest.param((37,), (0,), id="without its first axis"),
    pytest.param((), (0, 1), id="without any"),
    pytest.param((np.int64(3), 1), (1,), id="NumPy integers"),
]


@pytest.mark.parametrize(("noise_shape", "axes"), NOISE)
def test_shares_decisions_by_noise_shape(compiled, noise_shape, axes):
    y = compiled(lambda x: dropout(x, 0.1, noise_shape, key=KEY))(tf.constant(X))
    assert_bits(y, X, 0.1, axes=axes)


@pytest.mark.parametrize("xla", GRAPHS)
def test_accepts_none_for_unknown_length_in_noise_shape(xla):
    @tf.function(input_signature=[tf.TensorSpec((None, 37))], jit_compile=xla)
    def drop(x):
        return dropout(x, 0.1, (None, 1), key=KEY)

    assert_bits(drop(tf.constant(X)), X, 0.1, axes=(1,))


@pytest.mark.parametrize(
    ("noise_shape", "error"),
    [
        ((2, 37), ValueError),
        ((3, 0), ValueError),
        ((3, -1), ValueError),
        ((1, 3, 37), ValueError),
        ((3, 37.0), TypeError),
        ((True, 37), TypeError),
        ("ab", TypeError),
        (37, TypeError),
    ],
    ids=repr,
)
def test_rejects_bad_noise_shape(noise_shape, error):
    with pytest.raises(error, match=r"noise_shape must"):
        dropout(X, 0.1, noise_shape, key=KEY)


# --- Bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [-0.1, 1.1, 2, float("nan")])
def test_rejects_rate_outside_0_and_1(rate):
    with pytest.raises(ValueError, match=rf"rate has to be between 0 and 1, but got {rate}"):
        dropout(X, rate, key=KEY)


@pytest.mark.parametrize("rate", [True, "0.5", None, np.float32(0.1), tf.constant(1)], ids=repr)
def test_rejects_non_python_rate(rate):
    with pytest.raises(TypeError, match=rf"probability rate .*got {re.escape(repr(rate))}"):
        dropout(X, rate, key=KEY)


@pytest.mark.parametrize("rate", [1, True, [0.1], np.float16(0.1)], ids=repr)
def test_rejects_traced_rate_of_other_dtype_or_shape(rate):
    with pytest.raises(TypeError, match=r"probability rate .*Tensor"):
        tf.function(lambda rate: dropout(X, rate, key=KEY))(tf.constant(rate))


@pytest.mark.parametrize("rate", [0, 0.1])
@pytest.mark.parametrize("key", [42, "encoder", None, tf.constant(42)], ids=repr)
def test_rejects_non_key(rate, key):
    with pytest.raises(TypeError, match=rf"key must be a unidrop.Key.*{re.escape(repr(key))}"):
        dropout(X, rate, key=key)


def test_requires_key():
    with pytest.raises(TypeError, match="key"):
        dropout(X, 0.1)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
@pytest.mark.parametrize("rate", [0, 0.1])
def test_rejects_integers(dtype, rate):
    with pytest.raises(TypeError, match=rf"^x must be of a floating.*{dtype}"):
        dropout(tf.ones(3, dtype), rate, key=KEY)


def test_rejects_unknown_rank():
    drop = tf.function(lambda x: dropout(x, 0.1, key=KEY), input_signature=[tf.TensorSpec(None)])
    with pytest.raises(ValueError, match=r"x must have a known rank"):
        drop(X)


@pytest.mark.parametrize("compiled", [False, True])
def test_accepts_sparse_upstream_gradient(compiled):
    table = tf.Variable(tf.ones((10, 4)))

    def gradient():
        with tf.GradientTape() as tape:
            picked = tf.gather(dropout(table, 0.5, key=Key(1)), [1, 3, 3])
        return tf.convert_to_tensor(tape.gradient(picked, table))

    actual = (tf.function(gradient) if compiled else gradient)()
    counts = np.array([0, 1, 0, 2, 0, 0, 0, 0, 0, 0], np.float32)[:, None]
    expected = unidrop.keep_mask((10, 4), 0.5, Key(1)) * 2.0 * counts
    np.testing.assert_array_equal(actual.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("x", [tf.Variable(tf.ones(37)), np.ones(37, np.float32)], ids=type)
def test_accepts_variable_and_numpy_array(x):
    expected = unidrop.dropout(np.ones(37, np.float32), 0.5, Key(1))
    np.testing.assert_array_equal(dropout(x, 0.5, key=Key(1)).numpy(), expected)


def test_accepts_variable_in_core():
    expected = unidrop.dropout(np.ones(37, np.float32), 0.5, Key(1))
    actual = unidrop.dropout(tf.Variable(tf.ones(37)), 0.5, Key(1))
    np.testing.assert_array_equal(actual.numpy(), expected)


@pytest.mark.parametrize("columns", [11, 16])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_gives_window_of_unknown_length_its_block(rows, columns):
    @tf.function(input_signature=[tf.TensorSpec([None, 5]), tf.TensorSpec([], tf.int64)])
    def window(x, start):
        options = {"global_shape": (2**33, columns), "start": (start, 3)}
        return unidrop.dropout(x, 0.3, Key(7), **options)

    actual = window(tf.ones((rows, 5)), tf.constant(2**31 + 7, tf.int64)).numpy()
    whole = {"global_shape": (2**33, columns), "start": (2**31 + 7, 3)}
    np.testing.assert_array_equal(actual != 0, unidrop.keep_mask((rows, 5), 0.3, Key(7), **whole))


@pytest.mark.parametrize("compiled", [False, True])
def test_accepts_tensor_as_length_in_noise_shape(compiled):
    def run(x):
        return dropout(x, 0.5, noise_shape=[tf.shape(x)[0], 1], key=Key(1))

    actual = (tf.function(run) if compiled else run)(tf.ones((9, 4))).numpy()
    keep = unidrop.keep_mask((9, 4), 0.5, Key(1), broadcast_axes=(1,))
    np.testing.assert_array_equal(actual != 0, np.broadcast_to(keep, (9, 4)))


def test_is_traced_without_warnings_of_autograph(monkeypatch):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    monkeypatch.setattr(tf.get_logger(), "handlers", [handler])
    monkeypatch.setattr(unidrop.library, "_by_type", {})  # as in a new process

    @tf.function
    def call(x, step):
        return dropout(x, 0.5, key=Key(1).fold_in(step)) + unidrop.dropout(x, 0.5, Key(1))

    call(tf.ones(3), tf.constant(7))
    assert messages == []
