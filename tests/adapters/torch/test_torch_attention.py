"""The function `scaled_dot_product_attention`: values, mask, windows, errors, transformations."""

import math
import random
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from unidrop import Key, keep_mask
from unidrop.adapters.torch import chunked, dropout, scaled_dot_product_attention
from unidrop.conformance.attention import attention

# Inductor imports what torch.jit has deprecated.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

P, KEY = 0.3, Key(42).fold_in("attention")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.fixture
def small_tiles(monkeypatch):
    """Let a tile have 16 keys and 8 queries."""
    monkeypatch.setattr(chunked, "_KEYS", 16)
    monkeypatch.setattr(chunked, "_WEIGHTS", 1)
    monkeypatch.setattr(chunked, "_FEW", 8)


def randoms(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes
    ]


def inputs(queries=5, keys=7, **options):
    return randoms(*((2, 3, n, 4) for n in (queries, keys, keys)), **options)


def ours(query, key, value, mask=None, p=P, is_causal=False, dropout_key=KEY, **options):
    return scaled_dot_product_attention(
        query, key, value, mask, p, is_causal, dropout_key=dropout_key, **options
    )


def all_weights(query, key, value, dropout_key=KEY):
    """Return attention with all weights in memory."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    return dropout(scores.softmax(-1), P, key=dropout_key) @ value


def gradients(output, *inputs):
    return torch.autograd.grad(output.sum(), inputs)


def assert_near(actual, expected, tolerance):
    """Compare arrays, relative to the largest number: a gradient is the difference of others."""
    largest = max(1, *(np.abs(x).max(initial=0) for x in expected))
    for ours, theirs in zip(actual, expected, strict=True):
        error = np.abs(ours.detach().double().numpy() - theirs).max(initial=0)
        assert error <= tolerance * largest


def check_reference(keys, dtype, *, is_causal=False, mask=None, groups=1):
    """Compare outputs and gradients with the reference, and return the gradient of a mask."""
    heads = (4, 4 // groups, 4 // groups)
    shapes = zip(heads, (21, keys, keys), (8, 8, 5), strict=True)
    query, key, value = randoms(*((2, h, n, e) for h, n, e in shapes), dtype=dtype)
    output = ours(query, key, value, mask, is_causal=is_causal, enable_gqa=groups > 1)
    (upstream,) = randoms(output.shape, dtype=dtype, seed=1)
    wanted = [query, key, value] + ([mask] if mask is not None and mask.requires_grad else [])
    found = torch.autograd.grad(output, wanted, upstream)
    bias = 0.0
    if mask is not None:
        is_bool = mask.dtype is torch.bool
        bias = np.where(mask, 0.0, -np.inf) if is_bool else mask.detach().double().numpy()
    arrays = (x.detach().double().numpy() for x in (query, key, value))
    expected, pullback = attention(*arrays, P, KEY, bias=bias, is_causal=is_causal)
    assert_near([output], [expected], TOLERANCE[dtype])
    assert_near(found[:3], pullback(upstream.detach()), TOLERANCE[dtype])
    return found[3:]


@pytest.mark.parametrize("keys", [1, 27, 45, 64, 128, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_reference_in_float64(keys, dtype):
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(21, keys, generator=generator) < 0.7
    check_reference(keys, dtype)
    check_reference(keys, dtype, is_causal=True)
    check_reference(keys, dtype, mask=mask)
    check_reference(keys, dtype, mask=mask, groups=2)
    check_reference(keys, dtype, is_causal=True, groups=4)


@pytest.mark.parametrize("keys", [27, 45])
def test_equals_the_reference_with_many_tiles(keys, small_tiles):
    test_equals_the_reference_in_float64(keys, torch.float64)


@pytest.mark.parametrize("shape", [(), (27,), (21, 1), (4, 1, 27), (2, 1, 21, 27), (2, 4, 21, 27)])
def test_differentiates_a_mask_of_numbers(shape, small_tiles):
    (mask,) = randoms(shape, dtype=torch.float64, seed=3)
    (found,) = check_reference(27, torch.float64, mask=mask)
    query, key, value = randoms(*((2, 4, n, e) for n, e in ((21, 8), (27, 8), (27, 5))))
    weights = (query @ key.mT / math.sqrt(8) + mask).softmax(-1)
    output = dropout(weights, P, key=KEY) @ value
    (upstream,) = randoms(output.shape, dtype=torch.float64, seed=1)
    (expected,) = torch.autograd.grad(output, mask, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def read_mask(batch, queries, keys, dtype=torch.float32, **options):
    """Return the mask of weights that are all equal, from the output for the identity."""
    query = torch.zeros(*batch, queries, 4, dtype=dtype)
    key = torch.zeros(*batch, keys, 4, dtype=dtype)
    value = torch.eye(keys, dtype=dtype).expand(*batch, keys, keys)
    return ours(query, key, value, **options) != 0


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("keys", [1, 27, 64])
def test_mask_is_the_mask_of_the_weights(batch, keys, small_tiles):
    shape = (*batch, 19, keys)
    assert torch.equal(read_mask(batch, 19, keys), keep_mask(shape, P, KEY, xp=torch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_mask_is_the_same_in_every_dtype(dtype):
    assert torch.equal(
        read_mask((2, 3), 19, 700, dtype), keep_mask((2, 3, 19, 700), P, KEY, xp=torch)
    )


def test_mask_is_that_of_all_heads_under_gqa():
    query, key = torch.zeros(2, 4, 9, 8), torch.zeros(2, 2, 11, 8)
    value = torch.eye(11).expand(2, 2, 11, 11)
    kept = ours(query, key, value, enable_gqa=True) != 0
    assert torch.equal(kept, keep_mask((2, 4, 9, 11), P, KEY, xp=torch))


def test_window_has_its_block_of_the_mask(small_tiles):
    whole = keep_mask((4, 5, 60, 90), P, KEY, xp=torch)
    start = (1, 2, 7, 45)
    for first in (start, tuple(map(torch.tensor, start))):
        kept = read_mask((2, 3), 19, 27, global_shape=(4, 5, 60, 90), start=first)
        assert torch.equal(kept, whole[1:3, 2:5, 7:26, 45:72])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int8])
def test_start_of_a_short_dtype_does_not_wrap(dtype, small_tiles):
    query, key, value = inputs(queries=19, keys=27)
    for row, column in ((3, 110), (120, 5)):

        def run(*start, q=query):
            options = {"is_causal": True, "global_shape": (9, 9, 300, 300), "start": start}
            return ours(q, key, value, **options)

        first = 0, 0, torch.tensor(row, dtype=dtype), torch.tensor(column, dtype=dtype)
        expected = run(0, 0, row, column)
        assert torch.equal(run(*first), expected)
        by_weights, _ = torch.func.vjp(lambda q, s=first, f=run: f(*s, q=q), query)
        torch.testing.assert_close(by_weights, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_four_windows_merge_to_the_whole(is_causal, small_tiles):
    query, key, value = inputs(queries=37, keys=45)
    whole = ours(query, key, value, is_causal=is_causal)
    rows = []
    for first, last in pairwise((0, 20, 37)):
        blocks = [
            ours(
                query[:, :, first:last],
                key[:, :, i:j],
                value[:, :, i:j],
                is_causal=is_causal,
                global_shape=(2, 3, 37, 45),
                start=(0, 0, first, i),
                return_lse=True,
            )
            for i, j in pairwise((0, 11, 45))
        ]
        outputs, lse = (torch.stack(parts) for parts in zip(*blocks, strict=True))
        rows.append((lse.softmax(0).unsqueeze(-1) * outputs).sum(0))
    merged = torch.cat(rows, -2)
    torch.testing.assert_close(merged, whole, rtol=0, atol=1e-12)
    upstream = torch.randn(whole.shape, dtype=whole.dtype)
    expected = torch.autograd.grad(whole, (query, key, value), upstream)
    found = torch.autograd.grad(merged, (query, key, value), upstream)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_causal_windows_compare_positions_in_the_whole(small_tiles):
    for shift in range(4, 28, 2):
        options = {"p": 0.0, "global_shape": (40, 40), "start": (shift, 12), "is_causal": True}
        kept = read_mask((), 10, 20, **options)
        assert torch.equal(kept, torch.ones(40, 40, dtype=torch.bool).tril()[shift:, 12:][:10, :20])


def test_window_without_dropout_is_not_dropped():
    query, key, value = inputs()
    options = {"p": 0.0, "global_shape": (2, 3, 9, 9), "start": (0, 0, 4, 2), "is_causal": True}
    found = ours(query, key, value, **options)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[4:, 2:]
    expected = functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    found, expected = (gradients(x, query, key, value) for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_draws_a_key_as_dropout_does():
    query, key, value = inputs()
    torch.manual_seed(0)
    found = scaled_dot_product_attention(query, key, value, dropout_p=P)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    expected = all_weights(query, key, value, dropout_key=None)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_without_dropout_pytorch_runs_and_nothing_is_drawn():
    query, key, value = inputs(dtype=torch.float32)
    state = torch.get_rng_state()
    found = scaled_dot_product_attention(query, key, value, is_causal=True)
    expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.equal(found, expected)
    assert torch.equal(state, torch.get_rng_state())


Q, K = torch.ones(2, 4, 5, 8), torch.ones(2, 4, 7, 8)
MASK = torch.ones(5, 7, dtype=torch.bool)
REFUSED = {
    "rate": ((Q, K, K, None, 1.5), {}),
    "integers": ((Q.int(), K.int(), K.int(), None, P), {}),
    "complex": ((Q.cfloat(), K.cfloat(), K.cfloat(), None, P), {}),
    "dtypes": ((Q, K.double(), K, None, P), {}),
    "devices": ((Q, K.to("meta"), K, None, P), {}),
    "mask and is_causal": ((Q, K, K, MASK, P, True), {}),
    "shape of mask": ((Q, K, K, MASK[:, :6], P), {}),
    "larger mask": ((Q, K, K, MASK.expand(3, 2, 4, 5, 7), P), {}),
    "dtype of mask": ((Q, K, K, MASK.int(), P), {}),
    "float64 mask": ((Q, K, K, MASK.double(), P), {}),
    "vectors": ((Q[0, 0, 0], K[0, 0, 0], K[0, 0, 0], None, P), {}),
    "features": ((Q, K[..., :5], K, None, P), {}),
    "lengths": ((Q, K, K[..., :5, :], None, P), {}),
    "batch": ((Q[:1].expand(3, 4, 5, 8), K, K, None, P), {}),
    "heads": ((Q, K[:, :2], K[:, :2], None, P), {}),
    "groups": ((Q, K[:, :3], K[:, :3], None, P), {"enable_gqa": True}),
    "groups without heads": ((Q[0, 0], K[0, 0], K[0, 0], None, P), {"enable_gqa": True}),
    "scale": ((Q, K, K, None, P), {"scale": "1"}),
    "number as is_causal": ((Q, K, K, None, P, 1), {}),
    "none as enable_gqa": ((Q, K, K, None, P), {"enable_gqa": None}),
    "list": (([1], K, K, None, P), {}),
    "list of keys": ((Q, [1], K, None, P), {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_raises_the_error_of_pytorch(case):
    arguments, options = REFUSED[case]
    try:
        functional.scaled_dot_product_attention(*arguments, **options)
    except Exception as error:  # PyTorch raises many types
        theirs = error
    state = torch.get_rng_state()
    with pytest.raises(type(theirs)) as found:
        scaled_dot_product_attention(*arguments, **options)
    assert str(found.value) == str(theirs)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("lengths", [(), (7,), (1, 7), (5, 7), (4, 1, 7)], ids=str)
def test_checks_unusual_arguments_with_one_query(lengths):
    mask = None if lengths == () else torch.ones(lengths, dtype=torch.bool)
    own = functional.scaled_dot_product_attention
    with mock.patch.object(functional, "scaled_dot_product_attention", wraps=own) as called:
        found = ours(Q[:1], K, K, mask)
    assert torch.equal(found, ours(Q[:1].expand(Q.shape), K, K, mask))
    assert [call.args[0].shape[-2] for call in called.call_args_list] == [1]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"p": -0.1}, RuntimeError, r"got -0\.1"),
        ({"p": math.nan}, RuntimeError, "got nan"),
        ({"p": True}, TypeError, "dropout_p must be a Python int or float"),
        ({"p": torch.tensor(0.5)}, TypeError, "dropout_p must be a Python int or float"),
        ({"dropout_key": 42}, TypeError, "key must be"),
        ({"global_shape": (2, 4, 5, 7)}, ValueError, "go together"),
        ({"global_shape": (2, 4, 5, 7), "start": (0, 0, 1, 0)}, ValueError, "must"),
    ],
)
def test_rejects_a_bad_rate_key_or_window(options, error, text):
    state = torch.get_rng_state()
    with pytest.raises(error, match=text):
        ours(Q, K, K, **({"dropout_key": None} | options))
    assert torch.equal(state, torch.get_rng_state())


def test_rejects_nested_and_sparse_tensors():
    for query in (torch.nested.nested_tensor([Q[0]], layout=torch.jagged), Q.to_sparse()):
        with pytest.raises(TypeError, match="query must be a dense tensor"):
            ours(query, K, K)


def test_broadcasts_batches_as_pytorch_does():
    query, key, value = inputs()
    for q, k, v in ((query[:1], key, value), (query, key[:, :1], value[0]), (query[0], key, value)):
        shape = functional.scaled_dot_product_attention(q, k, v, dropout_p=P).shape
        found = ours(q, k, v)
        assert found.shape == shape
        torch.testing.assert_close(found, all_weights(q, k, v), rtol=0, atol=1e-12)
    shared = ours(query[:1], key[:1], value)  # only the values have a batch
    expected = all_weights(query[:1], key[:1], value)
    torch.testing.assert_close(shared, expected, rtol=0, atol=1e-12)


def test_queries_without_keys_have_zeros():
    query, key, value = inputs()
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    for given in (mask, torch.zeros(5, 7).masked_fill(~mask, -math.inf)):
        output = ours(query, key, value, given)
        assert not output[..., 2, :].any()
        assert output[..., 3, :].all()
        (found,) = gradients(output, query)
        assert not found[..., 2, :].any()
        assert found.isfinite().all()
    (found,) = gradients(ours(query, key[..., :0, :], value[..., :0, :]), query)
    assert not found.any()


@pytest.mark.parametrize("length", ["queries", "keys", "batch", "features"])
def test_accepts_empty_tensors(length):
    query, key, value = inputs()
    query = query[..., :0, :] if length == "queries" else query
    key, value = (x[..., :0, :] if length == "keys" else x for x in (key, value))
    query, key = (x[..., :0] if length == "features" else x for x in (query, key))
    query, key, value = (x[:0] if length == "batch" else x for x in (query, key, value))
    output = ours(query, key, value)
    expected = functional.scaled_dot_product_attention(query, key, value, dropout_p=P)
    assert output.shape == expected.shape
    found = gradients(output, query, key, value)
    assert [x.shape for x in found] == [x.shape for x in (query, key, value)]


def test_one_as_a_rate_drops_everything():
    query, key, value = inputs()
    output = ours(query, key, value, p=1.0)
    assert not output.any()
    assert not any(x.any() for x in gradients(output, query, key, value))


def test_scale_of_the_user_is_used():
    query, key, value = inputs()
    for scale in (-0.7, 0.0, 2):
        found = ours(query, key, value, scale=scale)
        factor = scale * math.sqrt(query.shape[-1])
        expected = all_weights(query * factor, key, value)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_strides_do_not_matter():
    query, key, value = inputs()
    expected = ours(query, key, value)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    assert not moved[0].is_contiguous()
    torch.testing.assert_close(ours(*moved), expected, rtol=0, atol=0)


def test_saves_neither_weights_nor_mask():
    query, key, value = inputs(queries=64, keys=64)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, id):
        ours(query, key, value)
    assert max(sizes) == query.numel() < 2 * 3 * 64 * 64


@pytest.mark.parametrize("case", ["mask", "causal"])
def test_differentiates_twice(case):
    query, key, value, mask = randoms((2, 2), (3, 2), (3, 1), (2, 3))

    def call(query, key, value, mask):
        if case == "mask":
            return ours(query, key, value, mask, return_lse=True)
        return ours(query, key, value, is_causal=True)

    arguments = query, key, value, mask
    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)


def test_differentiates_one_tensor_for_all_twice():
    (x,) = randoms((5, 5))
    weights = dropout((x @ x.mT / math.sqrt(5) + x).softmax(-1), P, key=KEY)
    found = []
    for output in (ours(x, x, x, x), weights @ x):
        (once,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        (twice,) = torch.autograd.grad(once.square().sum(), x)
        found.append((once, twice))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_autocast_lowers_the_inputs_alone():
    query, key, value = inputs(keys=45, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(query, key, value)
        own = functional.scaled_dot_product_attention(query, key, value, dropout_p=P)
        assert ours(query.double(), key.double(), value.double()).dtype is torch.float64
    found = gradients(output.float(), query, key, value)
    assert output.dtype is own.dtype is torch.bfloat16
    rounded = [x.bfloat16() for x in (query, key, value)]
    expected = all_weights(*(x.float() for x in rounded))
    torch.testing.assert_close(output, expected.bfloat16(), rtol=2**-7, atol=1e-3)
    assert [x.dtype for x in found] == [torch.float32] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_result_once(dtype):
    halves = [x.detach().to(dtype).requires_grad_() for x in inputs(keys=45)]
    wide = [x.detach().double().requires_grad_() for x in halves]
    output, expected = ours(*halves), all_weights(*wide)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=step / 2, atol=1e-6)
    found, theirs = gradients(output, *halves), gradients(expected, *wide)
    for x, y in zip(found, theirs, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=step, atol=4 * step)


@pytest.mark.slow
def test_compiles_to_one_graph_with_the_same_mask():
    @torch.compile(fullgraph=True, dynamic=True)
    def call(query, key, value, step):
        return ours(query, key, value, is_causal=True, dropout_key=KEY.fold_in(step))

    for keys, step in ((45, 0), (29, 7)):
        query, key, value = inputs(keys=keys, dtype=torch.float32)
        output = call(query, key, value, torch.tensor(step))
        expected = ours(query, key, value, is_causal=True, dropout_key=KEY.fold_in(step))
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        found, theirs = (gradients(x, query, key, value) for x in (output, expected))
        torch.testing.assert_close(found, theirs, rtol=0, atol=0)


@pytest.mark.slow
def test_compiled_call_draws_the_same_key():
    query, key, value = inputs(dtype=torch.float32)
    outputs = []
    for transform in (lambda f: f, torch.compile(fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        call = transform(lambda *x: scaled_dot_product_attention(*x, dropout_p=P))
        outputs.append(call(query, key, value))
    assert torch.equal(*outputs)


def test_vmap_follows_randomness():
    query, key, value = inputs()
    found = torch.vmap(ours, randomness="different")(query, key, value)
    torch.testing.assert_close(found, ours(query, key, value), rtol=0, atol=1e-12)
    found = torch.vmap(ours, randomness="same")(query, key, value)
    expected = torch.stack([ours(*x) for x in zip(query, key, value, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="random"):
        torch.vmap(ours)(query, key, value)


def test_vmap_gives_each_example_its_key():
    query, key, value = inputs()

    def call(query, key, value, step):
        return ours(query, key, value, dropout_key=KEY.fold_in(step))

    found = torch.vmap(call)(query, key, value, torch.arange(2))
    expected = torch.stack([call(query[i], key[i], value[i], i) for i in range(2)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("has_window", [False, True])
def test_functional_gradients_are_those_of_autograd(has_window):
    query, key, value = inputs()
    window = {"global_shape": (2, 3, 20, 20), "start": (0, 0, 4, 6), "is_causal": True}
    options = window if has_window else {}  # two queries of the window have no keys

    def call(query):
        return ours(query, key, value, **options)

    (expected,) = gradients(call(query), query)
    found = torch.func.grad(lambda query: call(query).sum())(query)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    direction = torch.randn(query.shape, dtype=query.dtype)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(call(dual)).tangent
    torch.testing.assert_close(tangent.sum(), (expected * direction).sum(), rtol=0, atol=1e-11)


def test_eager_call_does_not_import_dynamo(monkeypatch):
    def fail(*arguments):
        raise InterruptedError

    # The operator has its own reference to the function, with Dynamo around it.
    monkeypatch.setattr(chunked, "_attention", fail)
    with pytest.raises(InterruptedError):
        ours(*inputs())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes_with_the_original_mask(use_reentrant):
    found = []
    for run in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        query, key, value = inputs()
        run(
            lambda *x: scaled_dot_product_attention(*x, dropout_p=P), query, key, value
        ).sum().backward()
        found.append((query.grad, key.grad, value.grad))
    torch.testing.assert_close(*found, rtol=0, atol=0)


class _Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return ours(query, key, value)


def test_fx_and_export_record_one_node():
    query, key, value = (x.detach() for x in inputs())
    expected = ours(query, key, value)
    traced = torch.fx.symbolic_trace(_Attention())
    assert torch.equal(traced(query, key, value), expected)
    called = [n for n in traced.graph.nodes if n.target is scaled_dot_product_attention]
    assert len(called) == 1
    program = torch.export.export(_Attention(), (query, key, value))
    assert torch.equal(program.module()(query, key, value), expected)
    with pytest.raises(RuntimeError, match=r"does not run in torch\.jit"):
        torch.jit.trace(_Attention(), (query, key, value))


@pytest.mark.parametrize("case", range(10))
def test_random_calls_equal_the_reference(case, monkeypatch):
    rng = random.Random(case)
    monkeypatch.setattr(chunked, "_KEYS", rng.randint(1, 20))
    monkeypatch.setattr(chunked, "_FEW", rng.randint(1, 9))
    monkeypatch.setattr(chunked, "_WEIGHTS", rng.choice((1, 200)))
    batch = [rng.randint(1, 3) for _ in range(rng.randint(0, 3))]
    queries, keys, features, values = (rng.randint(1, 40) for _ in range(4))
    shapes = ((queries, features), (keys, features), (keys, values))
    query, key, value = randoms(*((*batch, *shape) for shape in shapes), seed=case)
    is_causal = rng.random() < 0.5
    bias = 0.0
    mask = None
    if not is_causal and rng.random() < 0.7:
        lengths = [rng.choice((1, n)) for n in (*batch, queries, keys)]
        mask = torch.rand(lengths[rng.randint(0, len(lengths)) :]) < 0.8
        bias = np.where(mask, 0.0, -np.inf)
    output = ours(query, key, value, mask, is_causal=is_causal)
    arrays = (x.detach().numpy() for x in (query, key, value))
    expected, pullback = attention(*arrays, P, KEY, bias=bias, is_causal=is_causal)
    assert_near([output], [expected], 1e-12)
    upstream = torch.randn(output.shape, dtype=output.dtype)
    found = torch.autograd.grad(output, (query, key, value), upstream)
    assert_near(found, pullback(upstream), 1e-12)


@pytest.mark.parametrize("number", [torch.finfo(torch.float32).min, -1e9])
def test_has_the_gradient_of_a_query_with_a_mask_of_large_numbers(number):
    """Masks of padding add such numbers, and a query of padding then attends to all keys."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 4), torch.randn(2, 700, 4)
    value = torch.randn(2, 700, 5)
    mask = torch.zeros(3, 700)
    mask[1] = number
    gradients = []
    for create_graph in (False, True):  # by tiles, and by all weights
        tensors = [x.clone().requires_grad_() for x in (query, key, value)]
        y, lse = scaled_dot_product_attention(
            *tensors, mask, 0.3, dropout_key=Key(7), return_lse=True
        )
        total = y.sum() + lse.clamp_min(number).sum()
        gradients.append(torch.autograd.grad(total, tensors, create_graph=create_graph))
    for by_tiles, by_weights in zip(*gradients, strict=True):
        torch.testing.assert_close(by_tiles, by_weights, rtol=0, atol=1e-5)


def test_lets_a_user_write_to_the_output():
    def run(write, dtype):
        (x,) = randoms((2, 5, 4), dtype=dtype)
        y = write(ours(x, x, x))
        return y, *torch.autograd.grad(y.square().sum(), x)

    for dtype in (torch.float32, torch.float16):
        in_place, new = run(lambda y: y.add_(1), dtype), run(lambda y: y + 1, dtype)
        assert all(map(torch.equal, in_place, new))


def test_lets_a_compiled_function_write_to_the_output():
    (x,) = randoms((2, 5, 4))
    y = torch.compile(lambda x: ours(x, x, x).add_(1), fullgraph=True, backend="aot_eager")(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    expected = ours(x, x, x) + 1
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), x)[0])


def test_differentiates_a_batch_of_upstream_gradients():
    query, key, value = inputs()
    upstreams = torch.randn(3, *ours(query, key, value).shape, dtype=query.dtype)
    y = ours(query, key, value)
    found = torch.autograd.grad(y, (query, key, value), upstreams, is_grads_batched=True)
    for i, upstream in enumerate(upstreams):
        y = ours(query, key, value)
        expected = torch.autograd.grad(y, (query, key, value), upstream)
        torch.testing.assert_close(tuple(x[i] for x in found), expected)


def test_names_the_heads_that_groups_lack():
    none = torch.ones(2, 0, 7, 8)
    with pytest.raises(RuntimeError, match="must divide the number of heads in query, got 0"):
        scaled_dot_product_attention(Q, none, none, dropout_p=P, enable_gqa=True)


def test_differentiates_the_gradient_of_values_alone():
    query, key = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    value = torch.randn(1, 5, 4, requires_grad=True)
    y = scaled_dot_product_attention(query, key, value, None, 0.5, dropout_key=Key(7))
    (first,) = torch.autograd.grad(y.square().sum(), value, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), value)
    assert second.shape == value.shape
