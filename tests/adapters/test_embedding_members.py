"""Embedding dropout in each framework: bits and gradients of a look-up in the dropped matrix."""

import io

import dask.array
import jax
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
import torch
from flax import nnx
from jax import numpy as jnp
from keras_models import assert_bits

import unidrop.adapters.flax as for_flax
import unidrop.adapters.jax as for_jax
import unidrop.adapters.numpy as for_numpy
import unidrop.adapters.tensorflow as for_tensorflow
import unidrop.adapters.torch as for_torch
from unidrop import Key, family

KEY = Key(42).fold_in("words").fold_in(7)
P, WORDS = 0.3, 40
W = np.random.default_rng(0).standard_normal((WORDS, 6)).astype("float32")
# Each word occurs several times.
INDICES = np.random.default_rng(1).integers(0, WORDS, (8, 30))
UPSTREAM = np.random.default_rng(2).standard_normal((8, 30, 6)).astype("float32")
DTYPES = ["float16", "bfloat16", "float32", "float64"]
LOOK_UP = torch.nn.functional.embedding
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def expected(key=KEY, weight=W, indices=INDICES):
    return family.embedding_dropout(weight, indices, P, key)


def as_torch(dtype="float32"):
    return torch.from_numpy(W.copy()).to(getattr(torch, dtype)).requires_grad_()


def run_torch(weight, call):
    y = call(weight, torch.from_numpy(INDICES))
    y.backward(torch.from_numpy(UPSTREAM).to(y.dtype))
    return y.detach(), weight.grad


def drop_torch(weight, indices, key=KEY, **options):
    return for_torch.embedding_dropout(weight, indices, P, key=key, **options)


def drop_matrix_of_torch(weight, indices, **options):
    dropped = for_torch.dropout(weight, P, key=KEY, broadcast_axes=(1,))
    return LOOK_UP(indices, dropped, **options)


@dtypes
@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": int(INDICES[0, 0])}, {"scale_grad_by_freq": True}, {"sparse": True}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_agrees_with_the_dropped_matrix_in_torch(dtype, options):
    y, gradient = run_torch(as_torch(dtype), lambda w, i: drop_torch(w, i, **options))
    assert gradient.is_sparse == ("sparse" in options)
    options = {name: value for name, value in options.items() if name != "sparse"}
    same = run_torch(as_torch(dtype), lambda w, i: drop_matrix_of_torch(w, i, **options))
    assert torch.equal(y, same[0])
    assert torch.equal(gradient.to_dense(), same[1])


def gradient_of_jax(call, weight):
    y, pull = jax.vjp(call, weight)
    return y, pull(jnp.asarray(UPSTREAM, y.dtype))[0]


@pytest.mark.parametrize(
    "dtype",
    ["float32", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float16", "bfloat16"))],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_agrees_with_the_dropped_matrix_in_jax(dtype, wrap):
    weight, indices = jnp.asarray(W, dtype), jnp.asarray(INDICES)

    def look_up(w):
        return for_jax.dropout(w, P, KEY, broadcast_dims=(1,))[indices]

    ours = gradient_of_jax(wrap(lambda w: for_jax.embedding_dropout(w, indices, P, KEY)), weight)
    for a, b in zip(ours, gradient_of_jax(wrap(look_up), weight), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def gradient_of_tensorflow(call, weight):
    with tf.GradientTape() as tape:
        tape.watch(weight)
        y = call(weight)
    upstream = tf.cast(tf.constant(UPSTREAM), y.dtype)
    return y, tf.convert_to_tensor(tape.gradient(y, weight, upstream))


@pytest.mark.parametrize("dtype", ["float32", "float64"])  # sums of others depend on their number
def test_agrees_with_the_dropped_matrix_in_tensorflow(dtype):
    weight = tf.cast(tf.constant(W), dtype)

    def drop(w):
        return for_tensorflow.embedding_dropout(w, INDICES, P, key=KEY)

    def look_up(w):
        return tf.gather(for_tensorflow.dropout(w, P, (None, 1), key=KEY), INDICES)

    pairs = zip(*(gradient_of_tensorflow(f, weight) for f in (drop, look_up)), strict=True)
    for a, b in pairs:
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@dtypes
def test_has_one_output_and_gradient_in_all_frameworks(dtype):
    weight = W.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    y = for_numpy.embedding_dropout(weight, INDICES, P, key=KEY)
    assert y.tobytes() == expected(weight=weight).tobytes()
    outputs = [run_torch(as_torch(dtype), drop_torch)]
    tensor = tf.cast(tf.constant(W), dtype)
    drop = for_tensorflow.embedding_dropout
    outputs.append(gradient_of_tensorflow(lambda w: drop(w, INDICES, P, key=KEY), tensor))
    if dtype != "float64":
        drop = for_jax.embedding_dropout
        array = jnp.asarray(W, dtype)
        outputs.append(gradient_of_jax(lambda w: drop(w, INDICES, P, KEY), array))
    gradient = for_numpy.embedding_dropout_backward(
        UPSTREAM.astype(weight.dtype), INDICES, WORDS, P, key=KEY
    )
    for output, slope in outputs:
        if isinstance(output, torch.Tensor):  # NumPy has no bfloat16
            output, slope = output.to(torch.float64), slope.to(torch.float64)
        assert np.array_equal(np.asarray(output).astype("float64"), y.astype("float64"))
        if dtype in ("float32", "float64"):  # the sums of narrow dtypes differ
            assert np.array_equal(np.asarray(slope).astype("float64"), gradient)


def test_looks_up_words_of_dask():
    lazy = dask.array.from_array
    y = family.embedding_dropout(lazy(W, chunks=(10, 3)), lazy(INDICES, chunks=(4, 30)), P, KEY)
    assert_bits(np.asarray(y), expected())


def compile_torch(backend):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=backend)
    def function(weight, indices, step):
        return drop_torch(weight, indices, KEY.fold_in(step))

    return lambda step: function(
        torch.from_numpy(W), torch.from_numpy(INDICES), torch.tensor(step)
    ).numpy()


def compile_tensorflow(jit_compile):
    @tf.function(jit_compile=jit_compile)
    def function(weight, indices, step):
        drop = for_tensorflow.embedding_dropout
        return drop(weight, indices, P, key=KEY.fold_in(step))

    return lambda step: function(tf.constant(W), tf.constant(INDICES), tf.constant(step)).numpy()


def compile_jax():
    drop = for_jax.embedding_dropout
    function = jax.jit(lambda w, indices, step: drop(w, indices, P, KEY.fold_in(step)))
    return lambda step: np.asarray(function(W, INDICES, step))


COMPILERS = {
    "aot_eager": lambda: compile_torch("aot_eager"),
    "inductor": lambda: compile_torch("inductor"),
    "tf.function": lambda: compile_tensorflow(False),
    "XLA": lambda: compile_tensorflow(True),
    "jax.jit": compile_jax,
}


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_has_the_same_bits_compiled(compiler):
    function = COMPILERS[compiler]()
    for step in (3, 4):
        assert_bits(function(step), expected(KEY.fold_in(step)))


@pytest.mark.slow
def test_compiles_for_any_number_of_words_and_rate():
    torch._dynamo.reset()
    function = torch.compile(
        lambda i, p: for_torch.embedding_dropout(torch.from_numpy(W), i, p, key=KEY),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for shape, p in [((3,), 0.3), ((2, 5), 0.3), ((7,), 0.5)]:
        indices = INDICES.reshape(-1)[: np.prod(shape)].reshape(shape)
        y = function(torch.from_numpy(indices), p)
        assert_bits(y.numpy(), family.embedding_dropout(W, indices, p, KEY))


class OfStep(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.module = make_module()

    def forward(self, indices, step):
        self.module.calls = step
        return self.module(indices)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Exporting a model while")
def test_exports_to_onnx():
    onnxruntime = pytest.importorskip("onnxruntime")
    arguments = torch.from_numpy(INDICES), torch.tensor(0)
    program = torch.onnx.export(OfStep(), arguments, dynamo=True, verbose=False)
    buffer = io.BytesIO()
    program.save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    names = [each.name for each in session.get_inputs()]
    (y,) = session.run(None, dict(zip(names, (INDICES, np.array(3)), strict=True)))
    assert_bits(y, expected(KEY.fold_in(3)))


def make_module(p=P, **options):
    emb = torch.nn.Embedding(WORDS, 6, **options)
    emb.weight.data.copy_(torch.from_numpy(W))
    return for_torch.EmbeddingDropout(emb, p, seed=KEY)


def test_counts_calls_of_the_torch_module():
    module = make_module()
    for step in range(3):
        y = module(torch.from_numpy(INDICES))
        assert_bits(y.detach().numpy(), expected(KEY.fold_in(step)))
    copy = make_module()
    copy.load_state_dict(module.state_dict())
    assert int(copy.calls) == 3
    y = copy.eval()(torch.from_numpy(INDICES))
    assert_bits(y.detach().numpy(), W[INDICES])
    assert int(copy.calls) == 3


def test_counts_no_call_that_raises_in_torch():
    module = make_module()
    with pytest.raises(IndexError):
        module(torch.tensor([WORDS]))
    with pytest.raises(RuntimeError, match="indices"):
        module(torch.tensor([0.5]))
    assert int(module.calls) == 0
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="weight must have axes of words and features"):
        for_torch.embedding_dropout(torch.ones(3), torch.tensor([0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_renormalizes_rows_before_it_drops_them():
    module = make_module(max_norm=1.0)
    own = torch.nn.Embedding(WORDS, 6, max_norm=1.0)
    own.weight.data.copy_(torch.from_numpy(W))
    rows = own(torch.from_numpy(INDICES)).detach().numpy()
    y = module(torch.from_numpy(INDICES)).detach().numpy()
    assert torch.equal(module.emb.weight, own.weight)
    key = KEY.fold_in(0)
    kept = family.embedding_dropout(np.ones_like(W), INDICES, P, key) > 0
    assert np.array_equal(y, np.where(kept, rows * np.float32(1 / (1 - P)), 0))


def test_describes_the_torch_module():
    module = for_torch.EmbeddingDropout(torch.nn.Embedding(3, 2, padding_idx=0), 0.1)
    assert module.extra_repr() == "embed_p=0.1"
    assert list(module.state_dict()) == ["emb.weight"]
    module.embed_p = 0.5
    assert module.p == 0.5
    with pytest.raises(ValueError, match="embed_p"):
        module.embed_p = 1.5
    with pytest.raises(TypeError, match=r"emb must be a torch\.nn\.Embedding, got Linear"):
        for_torch.EmbeddingDropout(torch.nn.Linear(2, 2))


def test_has_a_gradient_at_rate_one():
    weight = as_torch()
    y = for_torch.embedding_dropout(weight, torch.from_numpy(INDICES), 1, key=KEY)
    y.sum().backward()
    assert not y.detach().any()
    assert torch.equal(weight.grad, torch.zeros(WORDS, 6))


@pytest.mark.slow
def test_runs_in_transformations_of_torch():
    weight, indices = torch.from_numpy(W), torch.from_numpy(INDICES)
    y = torch.vmap(lambda row: drop_torch(weight, row))(indices)
    assert_bits(y.numpy(), expected())
    upstream = torch.from_numpy(UPSTREAM)
    gradient = torch.func.grad(lambda w: (drop_torch(w, indices) * upstream).sum())
    assert torch.equal(gradient(weight), run_torch(as_torch(), drop_torch)[1])
    node = torch.fx.symbolic_trace(torch.nn.Sequential(make_module()))
    assert [n.op for n in node.graph.nodes] == ["placeholder", "call_module", "output"]


def make_flax(rate=P, words=WORDS, **options):
    options = {"rngs": nnx.Rngs(0), "seed": KEY, **options}
    module = for_flax.Embed(words, 6, rate=rate, **options)
    module.embedding[...] = W[:words]
    return module


def test_counts_calls_of_the_flax_module():
    module = make_flax()
    call = nnx.jit(lambda module: module(jnp.asarray(INDICES)))
    for step in range(3):
        assert_bits(np.asarray(call(module)), expected(KEY.fold_in(step)))
    module.eval()
    assert_bits(np.asarray(call(module)), W[INDICES])
    assert int(module.dropout.calls[...]) == 3
    copy = make_flax()
    nnx.update(copy, nnx.state(module))
    assert int(copy.dropout.calls[...]) == 3


def test_draws_keys_of_flax():
    module = make_flax(seed=None)
    key = jax.random.key(3)
    y = module(jnp.asarray(INDICES), rngs=key)
    assert_bits(np.asarray(y), expected(for_jax.as_key(key)))
    assert not np.array_equal(module(jnp.asarray(INDICES)), module(jnp.asarray(INDICES)))


@pytest.mark.slow
def test_keeps_the_rules_of_flax_for_indices():
    with pytest.raises(ValueError, match="Input type must be an integer"):
        make_flax()(jnp.ones(3))
    y = np.asarray(make_flax()(jnp.array([WORDS, -1])))
    assert np.isnan(y[0]).all()
    assert_bits(y[1:], expected(KEY.fold_in(0), indices=np.array([-1])))
    y = np.asarray(make_flax(words=1)(jnp.array([5, 0, 7])))
    assert_bits(y, expected(KEY.fold_in(0), W[:1], np.zeros(3, int)))


@pytest.mark.parametrize(
    "call",
    [
        lambda: for_torch.embedding_dropout(torch.ones(3, 2), torch.tensor([0]), 1.5),
        lambda: for_jax.embedding_dropout(W, INDICES, 1.5, KEY),
        lambda: for_tensorflow.embedding_dropout(W, INDICES, 1.5, key=KEY),
        lambda: for_numpy.embedding_dropout(W, INDICES, 1.5),
        lambda: make_flax(1.5),
    ],
    ids=["torch", "jax", "tensorflow", "numpy", "flax"],
)
def test_refuses_rates_outside_the_interval(call):
    with pytest.raises(ValueError, match=r"1\.5"):
        call()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: for_jax.embedding_dropout(W, INDICES * 1.0, P, KEY), TypeError, "indices must be"),
        (lambda: for_jax.embedding_dropout(W[0], INDICES, P, KEY), ValueError, "weight must have"),
        (
            lambda: for_tensorflow.embedding_dropout(W, INDICES * 1.0, P, key=KEY),
            TypeError,
            "ids must be of an integer dtype",
        ),
        (
            lambda: for_tensorflow.embedding_dropout(W, [WORDS], P, key=KEY),
            tf.errors.InvalidArgumentError,
            "is not in",
        ),
        (lambda: for_numpy.embedding_dropout(W, [WORDS], P), IndexError, "out of bounds"),
        (
            lambda: for_numpy.embedding_dropout_backward(W, INDICES, WORDS, P, key=KEY),
            ValueError,
            "grad must be of the shape of the indices",
        ),
        (
            lambda: for_torch.embedding_dropout(torch.ones(3, 2, dtype=torch.int64), torch.ones(1)),
            TypeError,
            "weight must be",
        ),
        (lambda: for_torch.embedding_dropout(torch.ones(3, 2), [0]), TypeError, "indices must be"),
    ],
)
def test_raises_for_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_looks_up_in_a_matrix_of_unknown_shape():
    shapes = tf.TensorSpec([None, None], tf.float32), tf.TensorSpec([None, None], tf.int32)
    drop = for_tensorflow.embedding_dropout
    function = tf.function(lambda w, i: drop(w, i, P, key=KEY), input_signature=shapes)
    y = function(tf.constant(W), tf.constant(INDICES, tf.int32))
    assert_bits(y.numpy(), expected(KEY))
