"""Attention for JAX: the mask, outputs and gradients, in memory that no mask of a layer fills."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import unidrop
from unidrop import Key
from unidrop.adapters.jax import attention as module
from unidrop.adapters.jax import dot_product_attention
from unidrop.conformance.attention import attention

KEY, RATE = Key(42).fold_in("attention"), 0.3
DROPS = {"dropout_rate": RATE, "dropout_key": KEY}

_RANDOM = np.random.default_rng(0)


def values(*shape, dtype="float32"):
    return _RANDOM.standard_normal(shape).astype(dtype)


def inputs(length=9, count=45, *, batch=2, heads=4, groups=2, features=8, dtype="float32"):
    query = values(batch, length, heads, features, dtype=dtype)
    return query, *(values(batch, count, groups, features, dtype=dtype) for _ in range(2))


def wanted_mask(shape, key=KEY, rate=RATE, **window):
    with unidrop.force_path("portable"):
        return unidrop.keep_mask(shape, rate, key, **window)


def read_mask(shape, key=KEY, *, batch=2, heads=4, groups=2, **options):
    """Return which probabilities reach the output, through values that are the identity."""
    length, count = shape
    query, keys, _ = inputs(length, count, batch=batch, heads=heads, groups=groups, features=count)
    identity = np.broadcast_to(np.eye(count, dtype="float32")[:, None], keys.shape)
    options = {"dropout_rate": RATE, "dropout_key": key, **options}
    y = dot_product_attention(query / 8, keys / 8, identity, **options)
    return np.asarray(y).swapaxes(1, 2) != 0


def materialized(query, key, value, bias=None, mask=None, kept=None):
    """Return attention with all probabilities in one array, which JAX differentiates."""
    key, value = (jnp.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(query.shape[3])
    scores = scores if bias is None else scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, -1e38)
    kept = wanted_mask(scores.shape) if kept is None else kept
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores) * kept / (1 - RATE), value)


def assert_close(actual, expected, error=1e-6):
    """Compare trees of arrays, relative to the largest element of each."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a, "float64"), np.asarray(e, "float64")
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=0, atol=error * max(1, abs(e).max()))


@pytest.fixture(autouse=True, scope="module")
def less_optimization():
    """Let XLA optimize less, because that needs most of the time of these tests."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def small_blocks(monkeypatch):
    """Let a block have 16 keys."""
    monkeypatch.setattr(module, "_BLOCK", 16)


# --- Outputs and gradients ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("count", "is_plain"),
    [*((n, False) for n in (1, 27, 45, 64, 128, 1000)), (1000, True)],
)
def test_equals_materialized_attention(count, dtype, is_plain):
    arrays = inputs(21, count, heads=6, groups=6 if is_plain else 2, dtype="float64")
    options, bias = {}, 0.0
    if not is_plain:
        mask = _RANDOM.random((2, 1, 21, count)) < 0.5
        mask[..., 0] = True  # each query attends to a key
        bias = values(1, 6, 1, count)
        options = {"is_causal": True, "mask": mask, "bias": bias}
        bias = np.where(mask, bias, -np.inf)
    # Rounding in the terms of a gradient stays, even if they sum to 0, as for a single key.
    upstream = values(*arrays[0].shape, dtype="float64") / 8
    with jax.enable_x64(dtype == "float64"):
        narrow = [x.astype(dtype) for x in (*arrays, upstream)]
        # The reference has the same rounded inputs.
        *first, last = (x.astype("float64").swapaxes(1, 2) for x in narrow)
        expected, pullback = attention(*first, RATE, KEY, bias=bias, is_causal=not is_plain)
        expected = [x.swapaxes(1, 2) for x in (expected, *pullback(last))]

        @jax.jit
        def run(query, key, value, upstream):
            f = lambda *x: dot_product_attention(*x, **options, **DROPS)  # noqa: E731
            y, vjp = jax.vjp(f, query, key, value)
            return y, *vjp(upstream)

        actual = run(*narrow)
    assert {x.dtype.name for x in actual} == {dtype}
    assert_close(actual, expected, 1e-6 if dtype == "float32" else 1e-12)


@pytest.mark.slow
def test_sums_16_bit_arrays_in_float32(small_blocks):
    arrays = inputs()

    @jax.jit(static_argnums=0)
    def run(f, *arrays):
        loss = lambda *x: (f(*x).astype("float32") ** 2).sum()  # noqa: E731
        return jax.grad(loss, argnums=(0, 1, 2))(*arrays)

    def mine(*x):
        return dot_product_attention(*x, **DROPS)

    for dtype in ("float16", "bfloat16"):
        narrow = [jnp.asarray(x, dtype) for x in arrays]
        actual = run(mine, *narrow)
        assert {x.dtype.name for x in actual} == {dtype}
        expected = run(materialized, *(x.astype("float32") for x in narrow))
        assert_close(actual, expected, float(jnp.finfo(dtype).eps))


@pytest.mark.slow
def test_differentiates_twice_and_forward(small_blocks):
    bias, mask = values(1, 4, 1, 45), _RANDOM.random((2, 1, 9, 45)) < 0.5
    mask[0, 0, 3] = False  # a query that attends to no key attends to all keys alike
    mine = lambda *x: dot_product_attention(*x, mask, **DROPS)  # noqa: E731
    its = lambda *x: materialized(*x, mask)  # noqa: E731

    def derivatives(f, *arrays):
        slope = jax.grad(lambda *x: (f(*x) ** 2).sum(), argnums=(0, 1, 2, 3))
        ahead = tuple(x[::-1] for x in arrays)
        return f(*arrays), slope(*arrays), jax.jvp(slope, arrays, ahead)

    with jax.enable_x64(True):
        arrays = [x.astype("float64") for x in (*inputs(), bias)]
        actual, expected = (jax.jit(derivatives, static_argnums=0)(f, *arrays) for f in (mine, its))
    assert_close(actual, expected, 1e-12)


@pytest.mark.slow
def test_keeps_no_array_of_all_probabilities():
    arrays = inputs(600, 600, batch=1, heads=2)

    def gradient(*x):
        return jax.grad(lambda *x: dot_product_attention(*x, **DROPS).sum(), argnums=(0, 1, 2))(*x)

    traced = jax.make_jaxpr(gradient)(*arrays)
    sizes = [
        math.prod(variable.aval.shape)
        for jaxpr in _walk(traced.jaxpr)
        for equation in jaxpr.eqns
        for variable in equation.outvars
    ]
    assert len(sizes) > 100
    assert max(sizes) == 2 * 600 * 256
    _, vjp = jax.vjp(lambda *x: dot_product_attention(*x, **DROPS), *arrays)
    kept = sum(x.size for x in jax.tree.leaves(vjp))
    assert kept < 10 * arrays[0].size


def _walk(jaxpr):
    """Yield a program and all programs inside."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            yield from _walk(inner)


# --- The mask -------------------------------------------------------------------------------------


def test_drops_by_mask_of_batch_head_query_key(small_blocks):
    expected = wanted_mask((2, 4, 9, 45))
    assert (read_mask((9, 45)) == expected).all()
    assert (read_mask((9, 45), batch=1)[0] == wanted_mask((4, 9, 45))).all()
    assert (read_mask((9, 45), jax.random.key(7)) == wanted_mask((2, 4, 9, 45), Key(7))).all()


def test_obeys_forced_path_after_other_calls():
    arrays = inputs()
    y = dot_product_attention(*arrays, **DROPS)
    with unidrop.force_path("portable"):
        assert_close(dot_product_attention(*arrays, **DROPS), y)
    with unidrop.force_path("fused"), pytest.raises(RuntimeError, match="demands fused kernels"):
        dot_product_attention(*arrays, **DROPS)


def test_drops_by_mask_of_several_long_blocks():
    assert (read_mask((3, 600), batch=1, heads=2) == wanted_mask((1, 2, 3, 600))).all()


@pytest.mark.slow
def test_has_one_mask_with_and_without_batch(small_blocks):
    arrays = inputs(batch=1)
    batched = dot_product_attention(*arrays, **DROPS)
    alone = dot_product_attention(*(x[0] for x in arrays), **DROPS)
    assert alone.shape == (9, 4, 8)
    assert (alone == batched[0]).all()
    window = {"global_shape": (5, 9, 50), "start": (1, 0, 3)}
    part = dot_product_attention(*(x[0] for x in arrays), **window, **DROPS)
    kept = wanted_mask((4, 9, 45), **window)
    assert_close(part, materialized(*arrays, kept=kept)[0])


@pytest.mark.parametrize("axes", [(0, 1), (-1,)], ids=str)
def test_shares_decisions_along_broadcast_dims(axes, small_blocks):
    expected = wanted_mask((2, 4, 9, 45), broadcast_axes=axes)
    assert (read_mask((9, 45), broadcast_dims=axes) == expected).all()


def test_reads_window_of_mask(small_blocks):
    window = {"global_shape": (5, 6, 19, 80), "start": (2, 1, 3, 30)}
    expected = wanted_mask((2, 4, 9, 45), **window)
    assert (read_mask((9, 45), **window) == expected).all()
    start = jnp.uint8(2), 1, np.int64(3), jnp.uint32(30)
    assert (read_mask((9, 45), **window | {"start": start}) == expected).all()


def test_counts_positions_of_whole_along_shared_axes(small_blocks):
    window = {"global_shape": (2, 4, 9, 90), "start": (0, 0, 0, 5)}
    attends = np.tri(9, 45, -5, dtype=bool)
    attends[:5] = True  # they attend to no key, and so to all keys alike
    for axes in ((), (2, 3)):
        mask = read_mask((9, 45), is_causal=True, broadcast_dims=axes, **window)
        assert (mask == (wanted_mask((2, 4, 9, 45), broadcast_axes=axes, **window) & attends)).all()


def test_traces_once_for_all_keys(small_blocks):
    arrays, traces = inputs(), []

    @jax.jit
    def run(arrays, step):
        traces.append(step)
        return dot_product_attention(*arrays, dropout_rate=RATE, dropout_key=KEY.fold_in(step))

    for step in range(3):
        key = KEY.fold_in(step)
        kept = wanted_mask((2, 4, 9, 45), key)
        assert_close(run(arrays, step), materialized(*arrays, kept=kept))
    assert len(traces) == 1


@pytest.mark.slow
def test_gives_each_call_of_vmap_its_mask(small_blocks):
    arrays = inputs()

    def loss(query, i):
        options = {"dropout_rate": RATE, "dropout_key": KEY.fold_in(i)}
        return (dot_product_attention(query, *arrays[1:], **options) ** 2).sum()

    queries = np.stack([arrays[0], arrays[0] + 1, arrays[0] - 1])
    actual = jax.jit(jax.vmap(jax.value_and_grad(jax.checkpoint(loss))))(queries, jnp.arange(3))

    @jax.jit
    @jax.value_and_grad
    def run(query, kept):
        return (materialized(query, *arrays[1:], kept=kept) ** 2).sum()

    for i, query in enumerate(queries):
        kept = wanted_mask((2, 4, 9, 45), KEY.fold_in(i))
        assert_close([x[i] for x in actual], run(query, kept))


@pytest.mark.slow
def test_merges_four_blocks_to_the_whole(small_blocks):
    arrays, rows, columns = inputs(40, 40), np.int32([0, 0, 20, 20]), np.int32([0, 20, 0, 20])

    def part(query, keys, values, row, column):
        window = {"global_shape": (2, 4, 40, 40), "start": (0, 0, row, column)}
        options = {"is_causal": True, "return_residual": True, **DROPS}
        return dot_product_attention(query, keys, values, **options, **window)

    def merged(query, keys, values):
        halves = [x.reshape(2, 2, -1, *x.shape[2:]).swapaxes(0, 1) for x in (query, keys, values)]
        blocks = halves[0][rows // 20], *(x[columns // 20] for x in halves[1:])
        outputs, residuals = jax.vmap(part)(*blocks, rows, columns)
        shares = jax.nn.softmax(residuals.reshape(2, 2, 2, 20, 4, 1), axis=1)
        sums = (outputs.reshape(2, 2, 2, 20, 4, 8) * shares).sum(1)
        return sums.swapaxes(0, 1).reshape(query.shape)

    def run(f, *arrays):
        return jax.vjp(f, *arrays)[1](jnp.ones_like(arrays[0])), f(*arrays)

    causal = lambda *x: materialized(*x, mask=np.tri(40, dtype=bool))  # noqa: E731
    actual, expected = (jax.jit(run, static_argnums=0)(f, *arrays) for f in (merged, causal))
    assert_close(actual, expected)


# --- As jax.nn ------------------------------------------------------------------------------------


def test_is_function_of_jax_at_rate_0():
    arrays = inputs()
    assert (dot_product_attention(*arrays) == jax.nn.dot_product_attention(*arrays)).all()


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "scale": 0.3},
        {"local_window_size": (5, 3), "query_seq_lengths": np.int32([4, 9])},
        {"local_window_size": 4, "key_value_seq_lengths": np.int32([6, 0])},
    ],
    ids=lambda options: ", ".join(options),
)
def test_restricts_pairs_as_jax_does(options, small_blocks):
    arrays, options = inputs(), {**options, "return_residual": True}
    actual, expected = (
        jax.jit(partial(f, **options))(*arrays)
        for f in (dot_product_attention, jax.nn.dot_product_attention)
    )
    assert_close(actual, expected)


@pytest.mark.slow
def test_gives_nan_to_scores_of_minus_infinity_as_jax_does(small_blocks):
    bias = np.full((1, 1, 9, 45), -np.inf, "float32")
    bias[..., 20:] = 0  # the whole first block is dropped by the softmax
    bias[0, 0, 3] = -np.inf
    query, key, value = inputs()

    def loss(query, f):
        y = f(query, key, value, bias)
        return (y[:, :3] ** 2).sum(), y

    (gradient, y), (its_gradient, its_y) = (
        jax.grad(loss, has_aux=True)(query, f)
        for f in (lambda *x: dot_product_attention(*x, **DROPS), materialized)
    )
    assert np.isnan(y[:, 3]).all()
    rows = np.arange(9) != 3
    assert_close((y[:, rows], gradient[:, :3]), (its_y[:, rows], its_gradient[:, :3]))


def test_drops_everything_at_rate_1():
    drops = {"dropout_rate": 1.0, "dropout_key": KEY}
    y, vjp = jax.vjp(lambda *x: dot_product_attention(*x, **drops), *inputs())
    assert not any(np.asarray(x).any() for x in (y, *vjp(y + 1)))


@pytest.mark.parametrize("shape", [(0, 45), (9, 0)], ids=str)
def test_returns_attention_of_empty_sequences(shape):
    arrays = inputs(*shape)
    y = dot_product_attention(*arrays, **DROPS)
    assert (y == jax.nn.dot_product_attention(*arrays)).all()


@pytest.mark.slow
def test_accepts_number_of_bias_and_traced_scale(small_blocks):
    arrays = inputs()
    slope = jax.grad(lambda scale: (dot_product_attention(*arrays, 2, scale=scale, **DROPS)).sum())
    its = jax.grad(lambda scale: materialized(arrays[0] * scale * math.sqrt(8), *arrays[1:]).sum())
    assert_close(slope(0.3), its(0.3), 1e-5)  # both sum float32 numbers that cancel


BAD = {
    "features": {"query": inputs()[0][..., :3]},
    "lengths": {"value": inputs()[1][:, :3]},
    "heads": {"query": inputs()[0][:, :, :3]},
    "dtypes": {"query": inputs(dtype="float16")[0]},
    "axes": {"query": inputs()[0][None]},
    "dtype of mask": {"mask": np.ones((2, 4, 9, 45), "float32")},
    "shape of mask": {"mask": np.ones((3, 4, 9, 45), bool)},
    "heads of bias": {"bias": np.ones((2, 3, 9, 45), "float32")},
    "number of lengths": {"query_seq_lengths": np.ones(3, "int32")},
    "dtype of lengths": {"key_value_seq_lengths": np.ones(2, "float32")},
    "implementation": {"implementation": "magic"},
    "local window": {"local_window_size": (1, 2, 3)},
}


@pytest.mark.parametrize("name", BAD)
def test_raises_error_of_jax(name):
    arguments = dict(zip(("query", "key", "value"), inputs(), strict=True)) | BAD[name]
    with pytest.raises(Exception) as its:  # noqa: PT011 # of any type
        jax.nn.dot_product_attention(**arguments)
    with pytest.raises(type(its.value)) as mine:
        dot_product_attention(**arguments, **DROPS)
    assert str(mine.value) == str(its.value)


TWO_KEYS = np.array([[0, 1], [0, 2]], "uint32")
LONG = {"global_shape": (2, 4, 9, 2**31), "start": (0,) * 4}
SHORT = {"global_shape": (2, 4, 9, 44), "start": (0,) * 4}
INVALID = {
    "type of rate": ({"dropout_rate": np.float32(0.3)}, TypeError, "dropout_rate must be a Python"),
    "rate": ({"dropout_rate": 1.5}, ValueError, "dropout_rate .* between 0 and 1"),
    "no key": ({"dropout_key": None}, TypeError, "dropout_key must be a unidrop.Key"),
    "keys": ({"dropout_key": TWO_KEYS}, ValueError, "dropout_key must be one key"),
    "cudnn": ({"implementation": "cudnn"}, ValueError, "implementation must be None or 'xla'"),
    "axes": ({"broadcast_dims": (4,)}, ValueError, "must name axes of the 4-d array"),
    "no start": ({"global_shape": (2, 4, 9, 45)}, ValueError, "go together"),
    "short sequence": (SHORT, ValueError, "must fit into global_shape"),
    "long sequence": (LONG, ValueError, "fewer than 2\\*\\*31 queries and keys"),
}


@pytest.mark.parametrize("name", INVALID)
def test_rejects_invalid_dropout_and_window(name):
    options, error, message = INVALID[name]
    with pytest.raises(error, match=message):
        dot_product_attention(*inputs(), **{**DROPS, **options})


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_rejects_dtype_that_is_not_floating(dtype):
    arrays = [jnp.asarray(x, dtype) for x in inputs()]
    with pytest.raises(TypeError, match="query must be of a floating-point dtype"):
        dot_product_attention(*arrays, **DROPS)


@pytest.mark.parametrize("axis", [0, 1])
def test_exports_symbolic_shapes_without_dropout_only(axis):
    query, *_ = inputs(9, 9)
    shape = list(query.shape)
    shape[axis], *_ = jax.export.symbolic_shape("n")
    like = jax.ShapeDtypeStruct(tuple(shape), query.dtype)
    exported = jax.export.export(jax.jit(lambda x: dot_product_attention(x, x, x)))(like)
    assert_close(exported.call(query), jax.nn.dot_product_attention(query, query, query))
    with pytest.raises(TypeError, match=r"query must have a shape of integers, got .*n, "):
        jax.export.export(jax.jit(lambda x: dot_product_attention(x, x, x, **DROPS)))(like)


# --- Platforms ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lowers_for_gpus_and_tpus(small_blocks):
    arrays = inputs()
    gradient = jax.jit(jax.grad(lambda *x: dot_product_attention(*x, **DROPS).sum()))
    exported = jax.export.export(gradient, platforms=("cpu", "cuda", "tpu"))(*arrays)
    expected = jax.jit(jax.grad(lambda *x: materialized(*x).sum()))(*arrays)
    assert_close(exported.call(*arrays), expected)
