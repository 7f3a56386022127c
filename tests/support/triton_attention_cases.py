"""Cases for the kernels of attention in Triton's interpreter, against attention in float64.

The interpreter must be chosen before Triton is imported, so a test runs this file as a program, as
it does with ``triton_cases``.
"""

import math
import sys

import numpy as np
import triton_cases
from triton_cases import KEY, as_tensor, get_dtype, get_strides, key_to_tensor

import unidrop
from unidrop import Key
from unidrop.conformance.attention import attention as reference
from unidrop.fused.triton import attention_launch
from unidrop.fused.triton.attention_launch import Attention
from unidrop.protocols import DeviceBuffer
from unidrop.rate import Rate
from unidrop.window import Window

CASES = {}
CHOOSE_TILE = attention_launch._choose_tile
TOLERANCES = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def case(function):
    """Add a function to the cases."""
    CASES[function.__name__] = function
    return function


def make_array(rng, shape, kind, order=None, gap=0):
    """Return random numbers of a dtype, whose axes before the last are in an order in memory."""
    memory = triton_cases.Memory(shape, get_strides(shape, order, gap=gap), kind)
    memory.array[...] = rng.standard_normal(shape).astype(get_dtype(kind))
    return memory


def get_error(actual, expected):
    """Return the largest difference, over the largest number."""
    actual = np.asarray(actual, np.float64)
    if not np.isfinite(actual).all():
        return math.inf
    return np.abs(actual - expected).max(initial=0) / max(1.0, np.abs(expected).max(initial=0))


def run(
    queries, keys, *, batch=2, heads=2, key_heads=None, features=16, value_features=None,
    kind="float32", p=0.3, key=KEY, is_causal=False, bias=None, scale=None, order=None, gap=0,
    global_shape=None, start=None, in_memory=False, upstream_lse=False, arrays=None,
):  # fmt: skip
    """Return the output and the gradients, the arrays, the logarithms, and their gradients.

    ``in_memory``: kernels read the key, the base and the diagonal from memory.
    """
    rng = np.random.default_rng(queries * 1000 + keys)
    key_heads = key_heads or heads
    value_features = value_features or features
    shapes = [(batch, heads, queries, features), (batch, key_heads, keys, features)]
    shapes += [(batch, key_heads, keys, value_features), (batch, heads, queries, value_features)]
    query, key_, value, upstream = (make_array(rng, s, kind, order, gap) for s in shapes)
    for memory, array in zip((query, key_, value), arrays or (), strict=False):
        if array is not None:
            memory.array[...] = array
    weights = (batch, heads, queries, keys)
    window = Window.from_args(weights, (), global_shape, start)
    first = (0,) * 4 if start is None else start
    problem = Attention(
        kind=kind,
        batch=batch,
        heads=heads,
        key_heads=key_heads,
        queries=queries,
        keys=keys,
        features=features,
        value_features=value_features,
        is_causal=is_causal,
        diagonal=first[2] - first[3],
        scale=features**-0.5 if scale is None else scale,
        rate=Rate.from_p(p),
        mask_strides=window.strides[:3],
        base=window.whole.base,
    )
    bias_buffer = None
    if bias is not None:
        bias = np.ascontiguousarray(bias)
        view = np.broadcast_to(bias, weights)
        strides = tuple(s // view.itemsize for s in view.strides)
        bias_buffer = DeviceBuffer(as_tensor(bias), strides)
    output, of_query, of_key, of_value = (
        make_array(rng, s, kind, order, gap) for s in (shapes[3], shapes[0], shapes[1], shapes[2])
    )
    sizes, scratch = (np.full(s, 99, np.float32) for s in ((*weights[:3], 2), weights[:3]))
    of_lse = rng.standard_normal(scratch.shape).astype(np.float32)
    words, place = key.words, None
    if in_memory:
        numbers = np.array([problem.base, problem.diagonal % 2**64], np.uint64)
        words, place = key_to_tensor(key), as_tensor(numbers.view(np.int64))
        problem = problem._replace(base=8, diagonal=0)
    inputs = [*(x.elements for x in (query, key_, value)), bias_buffer, output.elements]
    attention_launch.attend(*inputs, as_tensor(sizes), problem, words, place)
    attention_launch.differentiate(
        upstream.elements,
        as_tensor(of_lse) if upstream_lse else None,
        *inputs,
        as_tensor(sizes),
        as_tensor(scratch),
        *(x.elements for x in (of_query, of_key, of_value)),
        problem,
        words,
        place,
    )
    written = output, of_query, of_key, of_value
    for x in written:
        assert (x.copy_untouched() == 0xA5).all(), "a kernel wrote outside of the array"
    results = [x.array for x in written]
    inputs = [x.array for x in (query, key_, value, upstream)]
    return results, inputs, sizes.sum(-1), of_lse


def check(queries, keys, tolerance=None, **options):
    """Compare the output and the gradients with attention in float64."""
    tolerance = tolerance or TOLERANCES[options.get("kind", "float32")]
    results, (q, k, v, upstream), *_ = run(queries, keys, **options)
    bias = options.get("bias")
    bias = 0.0 if bias is None else np.where(bias, 0, -np.inf) if bias.dtype == bool else bias
    expected, pullback = reference(
        q, k, v, options.get("p", 0.3), options.get("key", KEY), bias=bias,
        is_causal=options.get("is_causal", False), scale=options.get("scale"),
    )  # fmt: skip
    for name, actual, wanted in zip(
        ("output", "dq", "dk", "dv"), results, (expected, *pullback(upstream)), strict=True
    ):
        error = get_error(actual, wanted)
        assert error <= tolerance, (name, error)


# --- Values ---------------------------------------------------------------------------------------


@case
def few_keys():
    for queries, keys in ((1, 1), (3, 27), (33, 45), (64, 64)):
        check(queries, keys, batch=1, heads=1)


@case
def tiles_of_a_gpu():
    choose, attention_launch._choose_tile = attention_launch._choose_tile, CHOOSE_TILE
    try:
        check(140, 150, batch=1, heads=1)
        check(140, 70, kind="float16", batch=1, heads=1)
    finally:
        attention_launch._choose_tile = choose


@case
def narrow_dtypes():
    for kind in ("float16", "bfloat16"):
        check(33, 45, kind=kind, batch=1, heads=1)


@case
def features():
    check(5, 45, features=3, value_features=20, batch=1, heads=1)
    check(5, 64, features=40, value_features=24, batch=1, heads=1)


@case
def causal():
    check(70, 70, is_causal=True, batch=1, heads=1)
    check(150, 9, is_causal=True, batch=1, heads=1)
    check(9, 150, is_causal=True, batch=1, heads=1)


@case
def masks():
    rng = np.random.default_rng(0)
    for shape in ((27, 45), (2, 1, 1, 45)):
        check(27, 45, bias=rng.standard_normal(shape).astype(np.float32))
    check(27, 45, bias=rng.random((1, 2, 27, 1)) < 0.7)
    check(27, 45, bias=rng.standard_normal((2, 27, 45)).astype(np.float32), kind="float16", batch=1)


@case
def queries_without_keys():
    """Their output is 0, and so are their gradients, as in PyTorch."""
    attends = np.ones((9, 20), bool)
    attends[[0, 4]] = False
    infinite = np.where(attends, np.float32(0), np.float32(-np.inf))
    for bias in (attends, infinite):
        results, _, lse, _ = run(9, 20, bias=bias, batch=1, heads=1)
        check(9, 20, bias=bias, heads=1)
        for x in results[:2]:
            assert not x[:, :, [0, 4]].any()
        assert (lse[:, :, [0, 4]] == -np.inf).all()
    check(9, 20, bias=np.zeros((1, 1), bool), batch=1, heads=1)


@case
def groups_of_heads():
    check(20, 45, heads=6, key_heads=2, batch=1)
    check(20, 45, heads=4, key_heads=1, is_causal=True, batch=1)


@case
def strides():
    for order in ((0, 2, 1, 3), (2, 1, 0, 3)):
        check(20, 27, order=order)
    check(20, 27, gap=5, batch=1, heads=1)


@case
def rates():
    for p in (0, 2.0**-32, 0.5, 1 - 2.0**-20):
        check(5, 27, p=p, batch=1, heads=1)
    results, _, lse, _ = run(5, 27, p=1, batch=1)
    assert not any(x.any() for x in results)
    assert np.isfinite(lse).all()


@case
def scales():
    check(5, 27, scale=0.0, batch=1, heads=1)
    check(5, 27, scale=-1.0, batch=1, heads=1)


@case
def large_scores():
    """Products of 400 have exponentials beyond float32."""
    q, k = np.full((1, 1, 4, 16), 5.0), np.full((1, 1, 45, 16), 5.0)
    k[:, :, ::2] = -5.0
    check(4, 45, batch=1, heads=1, scale=1.0, arrays=(q, k), tolerance=1e-5)


@case
def masks_of_large_numbers():
    """Their sum with a score has no bits for a logarithm of a total."""
    q, k = (np.random.default_rng(0).standard_normal((1, 1, n, 16)) for n in (4, 45))
    # Sums of these scores with -1e9 are exact.
    q[..., 0], q[:, :, 1] = 0, 4 * np.eye(16)[0]
    k[..., 0] = 64 * (np.arange(45) % 3 > 0)
    for number in (-1e9, np.finfo(np.float32).min):
        bias = np.zeros((4, 45), np.float32)
        bias[1] = number
        check(4, 45, batch=1, heads=1, bias=bias, arrays=(q, k))


@case
def gradients_of_the_logarithm():
    """The gradient of a logarithm of sums is the weights before dropout."""
    results, (q, k, v, upstream), lse, of_lse = run(9, 27, upstream_lse=True)
    exact = [x.astype(np.float64) for x in (q, k)]
    scores = exact[0] @ exact[1].swapaxes(-1, -2) / 4
    expected = np.log(np.exp(scores).sum(-1))
    assert get_error(lse, expected) <= TOLERANCES["float32"]
    weights = np.exp(scores - expected[..., None]) * of_lse[..., None]
    _, pullback = reference(q, k, v, 0.3, KEY)
    of_query, of_key, of_value = pullback(upstream)
    of_query += weights @ exact[1] / 4
    of_key += weights.swapaxes(-1, -2) @ exact[0] / 4
    for actual, wanted in zip(results[1:], (of_query, of_key, of_value), strict=True):
        assert get_error(actual, wanted) <= TOLERANCES["float32"]


# --- The mask -------------------------------------------------------------------------------------


def check_mask(queries, keys, p=0.3, **options):
    """Compare the bits of the mask, read through values and gradients that are the identity."""
    key = options.get("key", KEY)
    batch, heads = options.get("batch", 2), options.get("heads", 2)
    identity = np.broadcast_to(np.eye(keys), (batch, heads, keys, keys))
    results, (_, _, _, upstream), _, _ = run(
        queries, keys, p=p, value_features=keys, arrays=(None, None, identity), **options
    )
    expected = unidrop.keep_mask(
        (batch, heads, queries, keys),
        p,
        key,
        global_shape=options.get("global_shape"),
        start=options.get("start"),
    )
    assert ((results[0] != 0) == expected).all()
    # A column of the gradient of values is 0 only if no query keeps the key.
    if queries == 1:
        kept = np.swapaxes(expected, -1, -2)
        assert ((results[3] != 0) == (kept & (upstream != 0))).all()


@case
def mask_bits():
    for keys in (1, 27, 45, 64):
        check_mask(5, keys, batch=1)
    check_mask(1, 45, key=Key(2**64 - 1), in_memory=True, batch=1, heads=1)
    check_mask(70, 70, batch=1, heads=1)


@case
def mask_bits_of_windows():
    for start, whole in (
        ((1, 0, 3, 5), (3, 2, 9, 61)),
        ((0, 1, 8, 16), (2, 3, 16, 64)),
        ((1, 3, 2**20, 2**31 - 45), (3, 7, 2**21, 2**31)),
        ((0, 5, 2**28 - 6, 7), (2, 7, 2**28, 2**32)),
    ):
        for in_memory in (False, True):
            check_mask(6, 27, start=start, global_shape=whole, heads=1, in_memory=in_memory)
    check_mask(1, 16, start=start, global_shape=whole)


@case
def windows_with_causal_masks():
    """Blocks of a causal attention are its rows and columns in the whole sequence."""
    for queries, keys, row, column, in_memory in (
        *((20, 20, 8, 0, False), (20, 20, 8, 11, True), (20, 20, 0, 40, True)),
        *((20, 20, 40, 0, False), (20, 20, 2**40, 0, True)),
        *((70, 140, 60, 0, True), (140, 70, 0, 90, False)),  # several tiles
    ):
        options = {"start": (0, 0, row, column), "global_shape": (1, 1, 2**41, 200), "p": 0}
        results, (q, k, v, upstream), lse, _ = run(
            queries, keys, batch=1, heads=1, is_causal=True, in_memory=in_memory, **options
        )
        attends = np.arange(queries)[:, None] + row >= np.arange(keys) + column
        bias = np.where(attends, 0, -np.inf)
        expected, pullback = reference(q, k, v, 0, KEY, bias=bias)
        for actual, wanted in zip(results, (expected, *pullback(upstream)), strict=True):
            assert get_error(actual, wanted) <= TOLERANCES["float32"], (row, column)
        assert ((lse == -np.inf) == ~attends.any(1)).all()


@case
def blocks_that_merge_to_the_whole():
    """Ring attention: blocks of keys, each with its window of the mask, merge by logarithms."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 16)).astype(np.float32) for n in (11, 60, 60))
    whole, _ = reference(q, k, v, 0.3, KEY)
    outputs, logs = [], []
    for first in range(0, 60, 15):
        block = slice(first, first + 15)
        results, _, lse, _ = run(
            11, 15, batch=1, arrays=(q, k[:, :, block], v[:, :, block]),
            start=(0, 0, 0, first), global_shape=(1, 2, 11, 60),
        )  # fmt: skip
        outputs.append(results[0].astype(np.float64))
        logs.append(lse.astype(np.float64))
    shares = np.exp(logs) / np.exp(logs).sum(0)
    assert get_error((np.array(outputs) * shares[..., None]).sum(0), whole) <= 1e-6


# --- The program ----------------------------------------------------------------------------------


def multiply_bfloat16():
    """Make the interpreter multiply matrices of bfloat16 as numbers: it multiplies their bits."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle(
            (x.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32
        )

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(
        self, widen(a), widen(b), *rest
    )


def main(names):
    """Run cases with small tiles, which the interpreter computes sooner, and print results."""
    multiply_bfloat16()
    attention_launch._choose_tile = lambda *_: attention_launch._Tile(64, 64, 8, 1)
    triton_cases.CASES = CASES
    triton_cases.main(names)


if __name__ == "__main__":
    main(sys.argv[1:])
