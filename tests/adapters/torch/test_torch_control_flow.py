"""Dropout in the branches and loops of PyTorch's higher-order operators."""

import pytest
import torch
from torch._higher_order_ops import map as map_rows
from torch._higher_order_ops import scan, while_loop

from unidrop import Key
from unidrop.adapters.torch import Dropout, dropout

KEY = Key(42).fold_in("encoder/0")
X = torch.arange(1.0, 65.0)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def seeded(calls=0):
    layer = Dropout(seed=KEY)
    layer.calls = calls
    return layer


def expected(*numbers):
    """Return the outputs of training calls."""
    return [dropout(X, key=KEY.fold_in(number)) for number in numbers]


def test_runs_layer_in_branch_and_counts_branch_that_runs():
    layer = seeded()
    outputs = [
        torch.cond(torch.tensor(flag), layer, lambda x: x * 1, (X,)) for flag in (True, False, True)
    ]
    first, second = expected(0, 1)
    assert all(map(torch.equal, outputs, (first, X, second)))
    assert layer.calls == 2


def test_runs_function_in_branch_when_compiled():
    @torch.compile(backend="aot_eager")
    def call(flag, x):
        return torch.cond(flag, lambda x: dropout(x, key=KEY), lambda x: x * 1, (x,))

    assert torch.equal(call(torch.tensor(True), X), dropout(X, key=KEY))
    assert torch.equal(call(torch.tensor(False), X), X)


@pytest.mark.parametrize("layer", [Dropout(seed=KEY), Dropout()], ids=["seeded", "unseeded"])
def test_refuses_layer_in_branch_when_compiled(layer):
    @torch.compile(backend="aot_eager")
    def call(flag, x):
        return torch.cond(flag, lambda x: layer(x), lambda x: x * 1, (x,))

    with pytest.raises(RuntimeError, match="use the function with a key"):
        call(torch.tensor(True), X)


def test_refuses_layer_in_loop_when_compiled():
    layer = seeded()

    @torch.compile(backend="aot_eager")
    def call(x):
        return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, layer(x)), (torch.tensor(0), x))

    with pytest.raises(RuntimeError, match="might be modifying the input"):
        call(X)


def test_returns_input_in_branch_in_evaluation():
    for call in (seeded().eval(), lambda x: dropout(x, 0.0, key=KEY)):
        assert torch.equal(torch.cond(torch.tensor(True), call, lambda x: x * 2, (X,)), X)


def test_runs_in_loop():
    layer, twin = seeded(), X
    with_key = while_loop(
        lambda i, x: i < 3,
        lambda i, x: (i + 1, dropout(x, 0.1, key=KEY.fold_in(i))),
        (torch.tensor(0), X),
    )[1]
    layer.p = 0.1
    of_layer = while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, layer(x)), (torch.tensor(0), X))[
        1
    ]
    for i in range(3):
        twin = dropout(twin, 0.1, key=KEY.fold_in(i))
    assert torch.equal(with_key, twin)
    assert torch.equal(of_layer, twin)
    assert layer.calls == 3


def test_runs_in_map():
    layer, rows = seeded(), torch.stack([X, X])
    one_key = map_rows(lambda x: dropout(x, key=KEY), rows)
    assert all(torch.equal(y, dropout(X, key=KEY)) for y in one_key)
    assert all(map(torch.equal, map_rows(lambda x: layer(x), rows), expected(0, 1)))
    assert layer.calls == 2


def test_runs_in_scan():
    layer, rows = seeded(4), torch.stack([X, X, X])
    with_key = scan(lambda n, x: (n + 1, dropout(x, key=KEY.fold_in(n))), torch.tensor(4), rows)
    of_layer = scan(lambda n, x: (n + 1, layer(x)), torch.tensor(4), rows)
    for _, outputs in (with_key, of_layer):
        assert all(map(torch.equal, outputs, expected(4, 5, 6)))
    assert layer.calls == 7
