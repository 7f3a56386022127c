"""The straight way from a plain tensor to its kernel: it does, raises and counts as the others."""

import inspect

import pytest
import torch
from torch_tensors import KEY, SITE, numbers, patterns

import unidrop
from unidrop import Key
from unidrop.adapters.torch import Dropout, arrays, dropout, operators, plain, state
from unidrop.conformance import Cell, cells, run_cell
from unidrop.conformance.backends.torch import Torch

# --- Outputs and errors ---------------------------------------------------------------------------

INPUTS = {
    "plain": lambda: numbers(3, 37),
    "a parameter": lambda: torch.nn.Parameter(numbers(3, 37)),
    "a view in C order": lambda: numbers(5, 37)[1:4],
    "a transpose": lambda: numbers(37, 3).T,
    "channels last": lambda: numbers(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "every second": lambda: numbers(3, 74)[:, ::2],
    "0-d": lambda: numbers(1).reshape(()),
    "empty": lambda: torch.empty(3, 0),
    "an empty view": lambda: numbers(9)[5:5],
    "complex": lambda: numbers(37, dtype=torch.complex64),
    "conjugated": lambda: numbers(37, dtype=torch.complex64).conj(),
    "zeros without memory": lambda: torch._efficientzerotensor((9,)),
    "in inference mode": lambda: inference_ones(),
    "integers": lambda: torch.ones(9, dtype=torch.int64),
    "bools": lambda: torch.ones(9, dtype=torch.bool),
    "sparse": lambda: torch.ones(3, 3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "meta": lambda: torch.ones(9, device="meta"),
    "no tensor": lambda: [1.0],
}
OPTIONS = {
    "none": {},
    "a rate of 0": {"p": 0.0},
    "a rate of 1": {"p": 1.0},
    "a tiny rate": {"p": 2.0**-40},
    "an integer rate": {"p": 1},
    "a rate above 1": {"p": 1.5},
    "no number": {"p": float("nan")},
    "a bool rate": {"p": True},
    "evaluation": {"training": False},
    "an axis": {"broadcast_axes": (0,)},
    "no axis": {"broadcast_axes": (7,)},
    "no key": {"key": 42},
    "a key in tensors": {"key": Key.from_words(torch.tensor(3), torch.tensor(4))},
    "a batch of keys": {"key": Key.from_words(*torch.ones(2, dtype=torch.int64))},
}


def inference_ones():
    with torch.inference_mode():
        return torch.ones(9)


def outcome(function, *arguments, **options):
    """Return the bits, strides and flags of an output, or the error of the call."""
    try:
        y = function(*arguments, **options)
    except Exception as error:
        return type(error), str(error)
    if y.is_meta or y._is_zerotensor():
        return y.shape, y.dtype
    y = y.resolve_conj()
    bits = y.tolist() if y.dtype is torch.bool else patterns(y)
    return bits, y.shape, y.stride(), y.requires_grad, y.is_inference()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("options", OPTIONS)
def test_does_as_general_route(options):
    for name, make in INPUTS.items():
        arguments = {"key": KEY, **OPTIONS[options]}
        with unidrop.force_path("portable"):
            expected = outcome(dropout, make(), **arguments)
        assert outcome(dropout, make(), **arguments) == expected, name


@pytest.mark.parametrize("requires_grad", [False, True])
def test_does_in_operator_as_general_route(requires_grad):
    operator = torch.ops.unidrop.dropout
    key = torch.tensor([-1, 1 << 40])  # the low 32 bits of each word count
    for name in ("plain", "a view in C order", "a transpose", "0-d", "empty", "integers", "meta"):
        x = INPUTS[name]()
        x.requires_grad_(requires_grad and x.is_floating_point())
        for arguments in ((0.5, []), (1.0, []), (0.0, []), (0.5, [0]), (1.5, [])):
            with unidrop.force_path("portable"):
                expected = outcome(operator, x, key, *arguments)
            assert outcome(operator, x, key, *arguments) == expected, (name, arguments)


MUTANTS = {
    "words in another order": ("words[1] << 32 | words[0]", "words[0] << 32 | words[1]", "mask"),
    "half of the elements": ("(x.numel(),)", "(x.numel() // 2 + 1,)", "mask"),
    "strides are ignored": (" or not x.is_contiguous()", "", "layout"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_turns_matrix_red_by_mutant(monkeypatch, mutant):
    old, new, contract = MUTANTS[mutant]
    source = inspect.getsource(plain.run_plain)
    assert source.count(old) == 1
    namespace = dict(vars(plain))
    exec(source.replace(old, new), namespace)
    chosen = [
        cell
        for cell in cells(Torch(), [contract])
        if isinstance(cell, Cell) and (cell.mode, cell.dtype) == ("fused", "float32")
    ]
    assert chosen
    assert {run_cell(cell).status for cell in chosen} == {"passed"}
    monkeypatch.setattr(arrays, "run_plain", namespace["run_plain"])
    assert "failed" in {run_cell(cell).status for cell in chosen}


# --- Call numbers ---------------------------------------------------------------------------------

UNUSUAL = {
    "strided": lambda calls: calls.repeat_interleave(2)[::2],
    "a subclass": lambda calls: calls.as_subclass(torch.nn.Buffer),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("number", [0, 7, (1 << 63) - 1])
def test_advances_as_operations_of_torch_do(kind, number):
    calls, unusual = state.make_calls(number), UNUSUAL[kind](state.make_calls(number))
    assert state.advance(calls) == state.advance(unusual) == number
    assert calls.tolist() == unusual.tolist()
    assert calls.tolist() == (state.make_calls(number) + torch.tensor([1, -1])).tolist()


@pytest.mark.parametrize("numbers", [(3, 4), (-1, 0)], ids=str)
def test_rejects_damage_as_operations_of_torch_do(numbers):
    for calls in (torch.tensor(numbers), UNUSUAL["strided"](torch.tensor(numbers))):
        with pytest.raises(RuntimeError, match="the call number of a Dropout is damaged: it is"):
            state.advance(calls)
        assert calls.tolist() == list(numbers)


def test_counts_in_memory_that_moves():
    layer, x = Dropout(seed=SITE), torch.ones(9)
    layer(x)
    layer.share_memory()
    layer(x)
    assert layer.calls == 2
    layer._buffers["_calls"].data = state.make_calls(5)
    layer(x)
    assert layer.calls == 6


# --- Drawn keys -----------------------------------------------------------------------------------


@pytest.fixture
def none_drawn(monkeypatch):
    """Forget the tensors that hold drawn words."""
    monkeypatch.setattr(operators, "_DRAWN", [])


def test_draws_keys_as_randint_does(none_drawn):
    torch.manual_seed(3)
    keys = [operators.draw_key() for _ in range(5)]
    torch.manual_seed(3)
    assert [key.words for key in keys] == [
        tuple(torch.randint(1 << 32, (2,)).tolist()) for _ in range(5)
    ]
    assert len(operators._DRAWN) == 1


def test_draws_in_and_after_inference_mode(none_drawn):
    with torch.inference_mode():
        first = operators.draw_key()
    assert operators.draw_key() != first


def test_draws_two_keys_if_one_draw_interrupts_another(none_drawn):
    class Interrupted(list):
        def append(self, drawn):  # a signal handler between the draw and the return of its tensor
            self.append = super().append
            inner.append(operators.draw_key())
            super().append(drawn)

    inner = []
    operators._DRAWN = Interrupted()
    torch.manual_seed(3)
    keys = [operators.draw_key(), *inner, operators.draw_key()]
    torch.manual_seed(3)
    assert [key.words for key in keys] == [
        tuple(torch.randint(1 << 32, (2,)).tolist()) for _ in range(3)
    ]
