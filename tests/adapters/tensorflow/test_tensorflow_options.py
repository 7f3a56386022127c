"""Tests of TensorFlow's dropout with the core's options: windows, returned masks, and its name."""

import re

import numpy as np
import pytest
import tensorflow as tf

import unidrop
from unidrop import Key
from unidrop.adapters.tensorflow import dropout

KEY = Key(42).fold_in("encoder/0").fold_in(7)
X = np.random.default_rng(0).standard_normal((3, 5, 4)).astype("float32")
WHOLE = {"global_shape": (9, 6, 8), "start": (4, 1, 3)}

MODES = {
    "eager": lambda function: function,
    "graph": tf.function,
    "XLA": tf.function(jit_compile=True),
}
SHARED = {None: (), (3, 1, None): (1,), (1, 1): (0, 1, 2)} | {(4,): (0, 1), (1, 5, 1): (0, 2)}


GRAPHS = [
    pytest.param(False, id="graph"),
    pytest.param(True, id="XLA", marks=pytest.mark.slow),  # it compiles each program for seconds
]


@pytest.fixture(params=["eager", "graph", pytest.param("XLA", marks=pytest.mark.slow)])
def compiled(request):
    """Return each way to run a function, in turn."""
    return MODES[request.param]


def assert_bits(actual, expected):
    """Compare a tensor with an array: shape, dtype and bits."""
    actual = np.asarray(actual)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("noise_shape", SHARED, ids=str)
@pytest.mark.parametrize("window", [{}, WHOLE], ids=["whole", "window"])
def test_returns_the_output_and_mask_of_the_core(compiled, noise_shape, window):
    drop = compiled(lambda x: dropout(x, 0.3, noise_shape, key=KEY, return_mask=True, **window))
    options = {"broadcast_axes": SHARED[noise_shape], "return_mask": True, **window}
    for actual, expected in zip(
        drop(tf.constant(X)), unidrop.dropout(X, 0.3, KEY, **options), strict=True
    ):
        assert_bits(actual, expected)


@pytest.mark.parametrize("return_mask", [False, True])
def test_joins_tiles_to_whole_tensor(compiled, return_mask):
    @compiled
    def drop(x, row):
        return dropout(
            x, 0.5, key=KEY, global_shape=X.shape, start=(row, 0, 0), return_mask=return_mask
        )

    tiles = [drop(tf.constant(X[row : row + 1]), tf.constant(row)) for row in range(3)]
    expected = unidrop.dropout(X, 0.5, KEY, return_mask=return_mask)
    if not return_mask:
        tiles, expected = [(tile,) for tile in tiles], (expected,)
    for parts, whole in zip(zip(*tiles, strict=True), expected, strict=True):
        assert_bits(tf.concat(parts, axis=0), whole)


@pytest.mark.parametrize("xla", GRAPHS)
def test_moves_window_without_retracing(xla):
    spec = tf.TensorSpec((None, 5, 4)), tf.TensorSpec((), tf.int64)

    @tf.function(input_signature=spec, jit_compile=xla)
    def drop(x, row):
        return dropout(x, 0.5, key=KEY, global_shape=(1000, 5, 4), start=(row, 0, 0))

    for row, rows in ((0, 3), (7, 2), (997, 3)):
        expected = unidrop.dropout(X[:rows], 0.5, KEY, global_shape=(1000, 5, 4), start=(row, 0, 0))
        assert_bits(drop(X[:rows], row), expected)
    assert drop.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("return_mask", [False, True])
@pytest.mark.parametrize("window", [{}, WHOLE], ids=["whole", "window"])
def test_uses_returned_mask_in_gradient(compiled, window, return_mask):
    @compiled
    def gradient(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = dropout(x, 0.3, (3, 1, None), key=KEY, return_mask=return_mask, **window)
            y = y[0] if return_mask else y
        return tape.gradient(y, x, output_gradients=upstream)

    upstream = np.flip(X).copy()
    expected = unidrop.dropout(upstream, 0.3, KEY, broadcast_axes=(1,), **window)
    assert_bits(gradient(tf.constant(X), tf.constant(upstream)), expected)


@pytest.mark.parametrize("window", [{}, WHOLE], ids=["whole", "window"])
def test_returns_tensor_and_mask_of_ones_at_rate_0(compiled, window):
    drop = compiled(lambda x: dropout(x, 0, (3, 1, 4), key=KEY, return_mask=True, **window))
    y, mask = drop(tf.constant(X))
    assert_bits(y, X)
    assert_bits(mask, np.ones((3, 1, 4), bool))


def test_returns_mask_of_actual_batch_at_rate_0():
    @tf.function(input_signature=[tf.TensorSpec((None, 4))])
    def mask_of(x):
        return dropout(x, 0, key=KEY, return_mask=True)[1]

    assert_bits(mask_of(X[0]), np.ones((5, 4), bool))


def test_supports_windows_and_masks_in_forced_kernels():
    with unidrop.force_path("fused"):
        y, mask = dropout(tf.constant(X), 0.3, key=KEY, return_mask=True, **WHOLE)
    with unidrop.force_path("portable"):
        expected = unidrop.dropout(X, 0.3, KEY, return_mask=True, **WHOLE)
    assert_bits(y, expected[0])
    assert_bits(mask, expected[1])


@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        ({"start": (0, 0, 0)}, ValueError, "got start without global_shape"),
        ({"global_shape": (9, 6, 8)}, ValueError, "got global_shape without start"),
        ({**WHOLE, "start": (7, 0, 0)}, ValueError, "got start 7 and 3 elements along axis 0"),
        ({**WHOLE, "start": (-1, 0, 0)}, ValueError, "got start -1"),
        ({**WHOLE, "start": (0, 0)}, ValueError, "start must have one element per axis"),
        ({**WHOLE, "global_shape": (9, 6)}, ValueError, "global_shape must have one length"),
        ({**WHOLE, "global_shape": "968"}, TypeError, "global_shape must be a sequence"),
        ({**WHOLE, "start": (0, 0.5, 0)}, TypeError, "start must hold integers, got 0.5"),
    ],
    ids=str,
)
def test_rejects_a_window_that_does_not_fit(compiled, window, error, message):
    with pytest.raises(error, match=re.escape(message)):
        compiled(lambda x: dropout(x, 0.5, key=KEY, **window))(tf.constant(X))


def test_rejects_a_traced_start_of_floats():
    with pytest.raises(TypeError, match="start must be an integer, got an array of dtype"):
        dropout(tf.constant(X), 0.5, key=KEY, global_shape=X.shape, start=(tf.constant(0.0), 0, 0))


def test_uses_name_as_scope_of_operations():
    graph = tf.function(lambda x: dropout(x, 0.5, key=KEY, name="first")).get_concrete_function(
        tf.TensorSpec((3,))
    )
    names = [op.name for op in graph.graph.get_operations() if op.type.startswith("Stateless")]
    assert names
    assert all(name.startswith("first/") for name in names)
