"""Keys and steps that PyTorch traces: of any integer dtype, of two tensors, in batches."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from unidrop import Key, keep_mask
from unidrop.adapters.torch import dropout

SITE = Key(42).fold_in("encoder/0")


def mask(call, shape, p=0.5, site=SITE, **options):
    """Return the scaled mask of a call, which NumPy makes."""
    keep = torch.from_numpy(keep_mask(shape, p, site.fold_in(call), **options))
    return keep.float() * torch.tensor(1 / (1 - p), dtype=torch.float32)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(-1, "int8"), (-1, "int32"), (-1, "int64"), (255, "uint8"), (2**63 + 5, "uint64")],
)
def test_folds_in_step_of_any_integer_dtype(value, dtype):
    step = torch.tensor(value, dtype=getattr(torch, dtype))
    x = torch.ones(64)

    def drop(x, step):
        return dropout(x, 0.5, key=Key(42).fold_in(step))

    compiled = torch.compile(drop, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, step), drop(x, step))
    in_vmap = torch.vmap(drop, in_dims=(0, None), randomness="same")
    assert torch.equal(in_vmap(x[None], step)[0], drop(x, step))


def test_records_key_of_two_tensors_as_operators():
    graphs = []
    mask(0, (1,))  # as in the fixture above

    def kept(graph, inputs):
        graphs.append(graph)
        return graph

    def drop(x, lo, hi, step):
        return dropout(x, 0.5, key=Key.from_words(lo, hi).fold_in(step))

    call, words = torch.compile(drop, fullgraph=True, backend=kept), torch.tensor(SITE.words)
    for step in range(3):
        assert torch.equal(call(torch.ones(5, 7), *words, torch.tensor(step)), mask(step, (5, 7)))
    (graph,) = graphs
    graph.graph.eliminate_dead_code()  # the question whether torch.func transforms is a node too
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert called == ["unidrop.pack_key", "unidrop.fold_in", "unidrop.dropout"]


@pytest.mark.parametrize("dtype", ["int64", "uint64", "uint32", "int32"])
@pytest.mark.parametrize("transform", ["compile", "make_fx", "vmap", "vjp"])
def test_takes_low_32_bits_of_words_of_any_dtype(transform, dtype):
    lo, hi = 0xDDCCBBAA - (1 << 32 if dtype == "int32" else 0), 0x10
    given = [torch.tensor(word, dtype=getattr(torch, dtype)) for word in (lo, hi)]
    if dtype.endswith("64"):
        given[1] = torch.tensor(hi + (5 << 40), dtype=getattr(torch, dtype))

    def words(lo, hi):
        return torch.stack(Key.from_words(lo, hi).words)

    run = {
        "compile": lambda: torch.compile(words, fullgraph=True, backend="eager")(*given),
        "make_fx": lambda: make_fx(words)(*given)(*given),
        "vmap": lambda: torch.vmap(words)(*(word.expand(2) for word in given))[1],
        "vjp": lambda: torch.func.vjp(lambda x: (x, words(*given)), torch.ones(1), has_aux=True)[2],
    }
    assert run[transform]().tolist() == [0xDDCCBBAA, 0x10]


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
def test_drops_by_each_key_of_a_batch(in_dims):
    def drop(lo, hi):
        return dropout(torch.ones(37), key=Key.from_words(lo, hi).fold_in(torch.tensor(7)))

    lo, hi = (torch.arange(3) if dim == 0 else torch.tensor(5) for dim in in_dims)
    actual = torch.vmap(drop, in_dims=in_dims)(lo, hi)
    for each, lo_i, hi_i in zip(actual, lo.expand(3).tolist(), hi.expand(3).tolist(), strict=True):
        assert torch.equal(each, mask(7, (37,), site=Key.from_words(lo_i, hi_i)))


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ((torch.ones(()), torch.tensor(1)), TypeError, "lo must be an integer"),
        ((torch.tensor(1), torch.ones(())), TypeError, "hi must be an integer"),
        ((torch.tensor(1), torch.ones(2, dtype=torch.int64)), ValueError, "hi must be 0-d"),
    ],
)
def test_rejects_non_words_where_keys_are_recorded(words, error, message):
    def key(lo, hi):
        return Key.from_words(lo, hi)

    for make in (key, make_fx(key)):
        with pytest.raises(error, match=message):
            make(*words)


@pytest.mark.parametrize("data", ["encoder/0", "", 0, 2**63 + 5, 2**64 - 1])
def test_folds_constant_into_traced_key_by_operator(data):
    graphs = []

    def drop(x, step):
        return dropout(x, 0.5, key=SITE.fold_in(step).fold_in(data))

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    x, step = torch.ones(64), torch.tensor(3)
    expected = dropout(x, key=SITE.fold_in(3).fold_in(data))
    assert torch.equal(torch.compile(drop, backend=keep, fullgraph=True)(x, step), expected)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called.count("unidrop.fold_in") == 2
    assert len(called) < 10
    assert torch.equal(make_fx(drop)(x, step)(x, step), expected)
    steps = torch.tensor([3, 4])
    batch = torch.vmap(drop, in_dims=(None, 0), randomness="different")(x, steps)
    assert torch.equal(batch[0], expected)
    assert torch.equal(batch[1], drop(x, 4))
