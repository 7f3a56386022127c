"""Large tensors of graphs: which of them a program of XLA serves, its lengths and its bits."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

import unidrop
from unidrop import Key
from unidrop.adapters.tensorflow import dropout
from unidrop.adapters.tensorflow import xla as tensorflow_xla

SITE = Key(42).fold_in("encoder/0")
KEY = SITE.fold_in(7)
X = np.random.default_rng(0).standard_normal((5, 37)).astype("float32")
X[0, :4] = np.nan, np.inf, -np.inf, -0.0
LARGE = tf.TensorSpec((300, 200))
STEP = tf.TensorSpec((), tf.int64)


def assert_bits(actual, x, rate=0.5, key=KEY):
    assert actual.numpy().tobytes() == unidrop.dropout(x, rate, key).tobytes()


@pytest.fixture
def all_large(monkeypatch):
    """Let graphs treat each tensor as a large one."""
    monkeypatch.setattr(tensorflow_xla, "LEAST", 0)


def count_nodes(function, *inputs):
    """Return the numbers of programs and of generators in a graph, after its optimization."""
    context.enable_run_metadata()
    try:
        function(*inputs)
        graphs = context.export_run_metadata().function_graphs
    finally:
        context.disable_run_metadata()
    (graph,) = (each.post_optimization_graph for each in graphs)
    bodies = [graph.node, *(f.node_def for f in graph.library.function)]
    nodes = [node for body in bodies for node in body]
    programs = sum("unidrop_dropout" in node.attr["f"].func.name for node in nodes)
    return programs, sum(node.op == "StatelessRandomUniformFullIntV2" for node in nodes)


def with_gradient(function):
    def run(x, step):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.tanh(function(tf.tanh(x), step))
        return y, tape.gradient(y, x)

    return run


# --- Which tensors -----------------------------------------------------------------------------

FOLD = 1  # the generator that folds in the step


@pytest.mark.parametrize(
    ("shape", "signature", "expected"),
    [
        ((300, 100), (300, 100), (0, FOLD + 2)),
        ((300, 200), (300, 200), (2, FOLD)),
        ((300, 200), (None, 200), (0, FOLD + 2)),
        ((40, 1000), (None, 1000), (2, FOLD)),
    ],
    ids=["small", "large", "perhaps small", "perhaps large"],
)
def test_computes_mask_anew_in_backward_pass(shape, signature, expected):
    @tf.function(input_signature=[tf.TensorSpec(signature), STEP])
    @with_gradient
    def run(x, step):
        return dropout(x, 0.5, key=SITE.fold_in(step))

    assert count_nodes(run, tf.ones(shape), tf.constant(7, tf.int64)) == expected


@pytest.fixture
def no_program(monkeypatch):
    """Let a call of a program raise."""
    monkeypatch.setattr(tensorflow_xla, "dropout", None)


@pytest.mark.parametrize(
    "options",
    [
        {"noise_shape": (300, 200, 1, 1)},
        {"global_shape": (300, 200, 2, 3), "start": (0, 0, 0, 1)},
        {"rate": 1},
        {"rate": 2.0**-40},
        {"return_mask": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_leaves_other_calls_to_operations(no_program, options):
    options = {"rate": 0.5, "key": KEY} | options
    run = tf.function(lambda x: dropout(x, **options))
    run.get_concrete_function(tf.TensorSpec((300, 200, 2, 2)))


def test_leaves_trace_on_forced_path_to_operations(no_program):
    run = tf.function(lambda x: dropout(x, 0.5, key=KEY))
    with unidrop.force_path("portable"):
        run.get_concrete_function(LARGE)
    with unidrop.force_path("fused"), pytest.raises(RuntimeError, match="traced"):
        tf.function(lambda x: dropout(x, 0.5, key=KEY))(tf.ones(LARGE.shape))


def test_leaves_replicas_to_operations(no_program):
    with tf.distribute.OneDeviceStrategy("CPU").scope():
        tf.function(lambda x: dropout(x, 0.5, key=KEY)).get_concrete_function(LARGE)


def test_leaves_process_with_gpu_to_operations(no_program, monkeypatch):
    devices = [tf.config.LogicalDevice(f"{kind}:0", kind) for kind in ("CPU", "GPU")]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda: devices)
    tf.function(lambda x: dropout(x, 0.5, key=KEY)).get_concrete_function(LARGE)


def test_leaves_graph_without_function_to_operations(no_program):
    with tf.Graph().as_default():
        dropout(tf.ones(LARGE.shape), 0.5, key=KEY)


def test_recomputes_large_mask_by_operations(monkeypatch):
    monkeypatch.setattr(tensorflow_xla, "can_compile", lambda plan: False)

    @tf.function(input_signature=[LARGE, STEP])
    @with_gradient
    def run(x, step):
        return dropout(x, 0.5, key=SITE.fold_in(step))

    assert count_nodes(run, tf.ones(LARGE.shape), tf.constant(7, tf.int64)) == (0, FOLD + 2)


# --- Lengths -----------------------------------------------------------------------------------


def test_rounds_lengths_up_to_few():
    lengths = np.arange(5000)
    rounded = tensorflow_xla._round_up(tf.constant(lengths, tf.int64)).numpy()
    assert (rounded >= lengths).all()
    assert (rounded[32:] <= lengths[32:] * 1.25).all()
    assert len(np.unique(rounded)) <= 4 * np.log2(5000 / 32) + 1
    np.testing.assert_array_equal(tensorflow_xla._round_up(tf.constant(rounded)), rounded)


@pytest.mark.parametrize("size", [2**40, 2**52 - 1, 2**60 + 1])
def test_rounds_no_large_length_down(size):
    assert size <= int(tensorflow_xla._round_up(tf.constant(size, tf.int64))) <= size * 1.26


@pytest.mark.parametrize("xla", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_traces_batches_once(xla):
    @tf.function(input_signature=[tf.TensorSpec((None, 1000)), STEP], jit_compile=xla)
    def run(x, step):
        return dropout(x, 0.5, key=SITE.fold_in(step))

    for step, rows in enumerate((40, 0, 33, 40)):
        x = np.ones((rows, 1000), "float32")
        assert_bits(run(tf.constant(x), tf.constant(step, tf.int64)), x, key=SITE.fold_in(step))
    assert run.experimental_get_tracing_count() == 1


# --- Bits and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [2.0**-32, 1 / 3, 1 - 2.0**-32])
@pytest.mark.parametrize("signature", [X.shape, (None, 37)], ids=["static", "unknown"])
def test_gives_bits_of_core(all_large, rate, signature):
    run = tf.function(lambda x: dropout(x, rate, key=KEY), [tf.TensorSpec(signature)])
    assert_bits(run(tf.constant(X)), X, rate)


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_depends_on_all_bits_of_key(all_large, seed):
    run = tf.function(lambda x: dropout(x, 0.5, key=Key(seed)))
    assert_bits(run(tf.constant(X)), X, key=Key(seed))


def test_reads_words_of_key_that_are_not_of_one_fold(all_large):
    @tf.function
    def run(x, step):
        (lo, _), (_, hi) = (SITE.fold_in(step + n).words for n in range(2))
        return dropout(x, 0.5, key=Key._from_raw_words((lo, hi)))

    (lo, _), (_, hi) = (SITE.fold_in(n).words for n in (7, 8))
    assert_bits(run(tf.constant(X), tf.constant(7)), X, key=Key.from_words(lo, hi))


def test_keeps_static_shape(all_large):
    run = tf.function(lambda x: dropout(x, 0.5, key=KEY))
    for shape in ((5, 37), (None, 37), (5, None)):
        concrete = run.get_concrete_function(tf.TensorSpec(shape))
        assert concrete.structured_outputs.shape.as_list() == list(shape)


def test_gives_second_derivative(all_large):
    @tf.function
    def second(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape(persistent=True) as inner:
                inner.watch(x)
                y = dropout(x, 0.5, key=KEY) ** 2
            first = inner.gradient(y, x)
        return outer.gradient(first, x)

    ones = tf.ones((5, 37))
    assert_bits(second(ones), np.full((5, 37), 4, "float32"))


@pytest.mark.slow
def test_gives_tangent_and_recomputed_gradient(all_large):
    @tf.function
    def run(x):
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
            y = dropout(x, 0.5, key=KEY)
        with tf.GradientTape() as tape:
            tape.watch(x)
            z = tf.recompute_grad(lambda x: dropout(x, 0.5, key=KEY))(x)
        return accumulator.jvp(y), tape.gradient(z, x)

    for actual in run(tf.constant(X)):
        assert_bits(actual, np.ones_like(X))


@pytest.mark.slow
@pytest.mark.parametrize("each", [tf.map_fn, tf.vectorized_map], ids=lambda each: each.__name__)
def test_gives_each_row_of_map_its_key(all_large, each):
    @tf.function
    def rows(x):
        options = {"fn_output_signature": tf.float32} if each is tf.map_fn else {}
        inputs = x, tf.range(len(X))
        return each(lambda a: dropout(a[0], 0.5, key=SITE.fold_in(a[1])), inputs, **options)

    for step, row in enumerate(rows(tf.constant(X))):
        assert_bits(row, X[step], key=SITE.fold_in(step))


def test_runs_in_map_of_dataset(all_large):
    data = tf.data.Dataset.from_tensor_slices((X, np.arange(len(X))))
    rows = data.map(lambda x, i: dropout(x, 0.5, key=SITE.fold_in(i)), num_parallel_calls=2)
    for step, row in enumerate(rows):
        assert_bits(row, X[step], key=SITE.fold_in(step))
