"""Cases for the kernels of attention in Triton's interpreter, against attention in float64.

The interpreter must be chosen before Triton is imported, so a test runs this file as a program, as
it does with ``triton_cases``.
"""

import itertools
import math
import sys

import numpy as np
import triton_cases
from attention_reference import attention as reference
from triton_cases import KEY, as_tensor, get_dtype, get_strides, key_to_tensor

import unidrop
from unidrop import Key
from unidrop.fused.triton import attention_launch
from unidrop.fused.triton.attention_launch import Attention
from unidrop.protocols import DeviceBuffer
from unidrop.rate import Rate
from unidrop.window import Window

CASES = {}
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


def get_buffer(memory):
    return memory.elements


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
    """Return both results of the kernels, the gradients, and the arrays, as NumPy arrays."""
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
        view = np.broadcast_to(bias, weights)
        strides = tuple(s // view.itemsize for s in view.strides)
        bias_buffer = DeviceBuffer(as_tensor(np.ascontiguousarray(bias)), strides)
    output, of_query, of_key, of_value = (
        make_array(rng, s, kind, order, gap)
        for s in (shapes[3], shapes[0], shapes[1], shapes[2])
    )
    lse, scratch = np.full((2, *weights[:3]), 99, np.float32)
    of_lse = rng.standard_normal(lse.shape).astype(np.float32)
    words = key_to_tensor(key) if in_memory else key.words
    inputs = [*map(get_buffer, (query, key_, value)), bias_buffer, get_buffer(output)]
    attention_launch.attend(*inputs, as_tensor(lse), problem, words)
    attention_launch.differentiate(
        get_buffer(upstream),
        as_tensor(of_lse) if upstream_lse else None,
        *inputs,
        as_tensor(lse),
        as_tensor(scratch),
        *map(get_buffer, (of_query, of_key, of_value)),
        problem,
        words,
    )
    for memory in (output, of_query, of_key, of_value):
        assert (memory.copy_untouched() == 0xA5).all() or gap, "a kernel wrote outside of the array"
    results = [memory.array for memory in (output, of_query, of_key, of_value)]
    inputs = [memory.array for memory in (query, key_, value, upstream)]
    return results, inputs, lse, of_lse


def check(queries, keys, **options):
    """Compare the output and the gradients with attention in float64."""
    kind = options.get("kind", "float32")
    results, (q, k, v, upstream), lse, _ = run(queries, keys, **options)
    bias = options.get("bias")
    bias = 0.0 if bias is None else np.where(bias, 0, -np.inf) if bias.dtype == bool else bias
    weights = (*q.shape[:-1], k.shape[-2])
    expected, pullback = reference(
        q, k, v, options.get("p", 0.3), options.get("key", KEY), bias=bias,
        is_causal=options.get("is_causal", False), scale=options.get("scale"),
    )  # fmt: skip
    del weights
    for name, actual, wanted in zip(
        ("output", "dq", "dk", "dv"), results, (expected, *pullback(upstream)), strict=True
    ):
        error = get_error(actual, wanted)
        assert error <= TOLERANCES[kind], (name, error)


@case
def few_keys():
    for queries, keys in ((1, 1), (3, 27), (33, 45), (64, 64)):
        check(queries, keys)


@case
def causal():
    check(45, 45, is_causal=True)


if __name__ == "__main__":
    triton_cases.CASES = CASES
    triton_cases.main(sys.argv[1:])
