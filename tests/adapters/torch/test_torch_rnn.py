"""The layers `LSTM`, `GRU` and `RNN`: the layers of PyTorch with the masks of a seed."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from unidrop import Key, keep_mask
from unidrop.adapters.torch import GRU, LSTM, RNN, Dropout, assign_seeds

SEED = Key(42).fold_in("encoder/0")
INPUTS, UNITS, TIME, BATCH = 3, 4, 5, 6
LENGTHS = [3, 5, 1, 5, 2, 4]

LAYERS = [(LSTM, {}), (GRU, {}), (RNN, {}), (RNN, {"nonlinearity": "relu"})]
STACKS = [
    {"dropout": 0.4, "num_layers": 2},
    {"dropout": 0.4, "num_layers": 2, "bidirectional": True, "variational": True},
    {"recurrent_dropout": 0.3, "input_dropout": 0.2},
    {"recurrent_dropout": 0.3, "input_dropout": 0.2, "bidirectional": True, "bias": False},
    {"recurrent_dropout": 0.3, "dropout": 0.4, "num_layers": 2, "variational": True},
    {"recurrent_dropout": 0.3, "dropout": 0.4, "num_layers": 2, "bidirectional": True},
]

# Inductor imports what torch.jit has deprecated.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


def make_layer(cls=LSTM, dtype=torch.float64, seed=SEED, **options):
    torch.manual_seed(0)
    return cls(INPUTS, UNITS, dtype=dtype, seed=seed, **options)


def make_input(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (TIME, BATCH, INPUTS)), generator=generator, dtype=dtype)


def make_states(layer):
    """Return initial states, as arrays."""
    rows = layer.num_layers * (1 + layer.bidirectional)
    sizes = [layer.proj_size or UNITS, UNITS] if layer.mode == "LSTM" else [UNITS]
    return [0.5 * make_input(rows, BATCH, size).numpy() for size in sizes]


def as_hx(layer, states):
    states = [torch.from_numpy(state).to(layer.weight_ih_l0.dtype) for state in states]
    return tuple(states) if layer.mode == "LSTM" else states[0]


def list_states(hx):
    return [state.detach().numpy() for state in (hx if isinstance(hx, tuple) else (hx,))]


def scale(shape, p, key):
    return keep_mask(shape, p, key) / (1 - p)


def step(mode, x, h, states):
    """Return the states after a step, of the input and recurrent terms of each gate."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    if mode == "LSTM":
        i, f, g, o = (a + b for a, b in zip(x, h, strict=True))
        c = sigmoid(f) * states[1] + sigmoid(i) * np.tanh(g)
        return [sigmoid(o) * np.tanh(c), c]
    if mode == "GRU":
        r, z = sigmoid(x[0] + h[0]), sigmoid(x[1] + h[1])
        return [(1 - z) * np.tanh(x[2] + r * h[2]) + z * states[0]]
    return [np.tanh(x[0] + h[0]) if mode == "RNN_TANH" else np.maximum(x[0] + h[0], 0)]


def run_loop(layer, x, states, key, lengths):
    """Return outputs and states of a layer, by a loop over batch, direction and time."""
    weights = {name: w.detach().numpy() for name, w in layer.named_parameters()}
    gates = {"LSTM": [0, 1, 2, 3], "GRU": [1, 0, 2]}.get(layer.mode, [None])
    finals = [state.copy() for state in states]
    for number in range(layer.num_layers):
        name = f"l{number}"
        site = key.fold_in(name) if number else key
        p = layer.dropout if number else layer.input_dropout
        time = 1 if layer.variational else len(x)
        x = x * scale((time, *x.shape[1:]), p, site.fold_in("dropout"))
        outputs = []
        for direction in range(1 + layer.bidirectional):
            suffix = name + "_reverse" * direction
            row = number * (1 + layer.bidirectional) + direction
            site = (key.fold_in(suffix) if row else key).fold_in("recurrent_dropout")
            w_ih, w_hh = (
                np.split(weights[f"weight_{kind}_{suffix}"], len(gates)) for kind in ("ih", "hh")
            )
            zeros = np.zeros(len(gates) * UNITS)
            b_ih, b_hh = (
                np.split(weights.get(f"bias_{kind}_{suffix}", zeros), len(gates))
                for kind in ("ih", "hh")
            )
            size = states[0].shape[-1]
            masks = [
                scale(
                    (BATCH, size), layer.recurrent_dropout, site if g is None else site.fold_in(g)
                )
                for g in gates
            ]
            output = np.zeros((len(x), BATCH, size))
            for n in range(BATCH):
                state = [s[row, n] for s in states]
                steps = range(lengths[n])
                for t in reversed(steps) if direction else steps:
                    inputs = [w @ x[t, n] + b for w, b in zip(w_ih, b_ih, strict=True)]
                    terms = zip(w_hh, b_hh, masks, strict=True)
                    hidden = [w @ (m[n] * state[0]) + b for w, b, m in terms]
                    state = step(layer.mode, inputs, hidden, state)
                    if layer.proj_size:
                        state[0] = weights[f"weight_hr_{suffix}"] @ state[0]
                    output[t, n] = state[0]
                for final, s in zip(finals, state, strict=True):
                    final[row, n] = s
            outputs.append(output)
        x = np.concatenate(outputs, -1)
    return x, finals


def check_against_loop(layer, atol=1e-12, lengths=None):
    """Compare call 1 with the loop, for a tensor or packed sequences of given lengths."""
    dtype = layer.weight_ih_l0.dtype
    x, states = make_input(), make_states(layer)
    layer.calls = 1
    packed = x.to(dtype)
    if lengths is not None:
        packed = pack_padded_sequence(packed, lengths, enforce_sorted=False)
    y, hx = layer(packed, as_hx(layer, states))
    if lengths is not None:
        y, _ = pad_packed_sequence(y)
    key = SEED.fold_in(1)
    expected, finals = run_loop(layer, x.numpy(), states, key, lengths or [TIME] * BATCH)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=0, atol=atol)
    for state, final in zip(list_states(hx), finals, strict=True):
        np.testing.assert_allclose(state, final, rtol=0, atol=atol)
    assert layer.calls == 2


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(("cls", "options"), LAYERS)
def test_agrees_with_loop_of_numpy(cls, options, stack):
    layer = make_layer(cls, **options, **stack)
    check_against_loop(layer)
    check_against_loop(layer.float(), atol=1e-6)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(("cls", "options"), LAYERS)
def test_drops_packed_sequences_like_padded(cls, options, stack):
    check_against_loop(make_layer(cls, **options, **stack), lengths=LENGTHS)


@pytest.mark.parametrize("rates", [{"dropout": 0.4}, {"dropout": 0.4, "recurrent_dropout": 0.3}])
def test_drops_projected_states(rates):
    layer = make_layer(num_layers=2, proj_size=2, bidirectional=True, **rates)
    check_against_loop(layer)
    check_against_loop(layer, lengths=LENGTHS)


@pytest.mark.parametrize("recurrent", [0.0, 0.3])
def test_has_equal_masks_in_each_layout(recurrent):
    rates = {"dropout": 0.4, "input_dropout": 0.3, "recurrent_dropout": recurrent, "num_layers": 2}
    x = make_input()
    y, (h, _) = make_layer(**rates)(x)
    first, (other, _) = make_layer(batch_first=True, **rates)(x.transpose(0, 1))
    assert torch.equal(first.transpose(0, 1), y)
    assert torch.equal(other, h)

    alone, (state, _) = make_layer(**rates)(x[:, 0])
    batched, (other, _) = make_layer(**rates)(x[:, :1])
    assert torch.equal(alone, batched[:, 0])
    assert torch.equal(state, other[:, 0])

    for is_sorted in (True, False):  # sorted ones have no indices
        packed = pack_padded_sequence(x, [TIME] * BATCH, enforce_sorted=is_sorted)
        assert (packed.sorted_indices is None) == is_sorted
        out, (other, _) = make_layer(**rates)(packed)
        assert isinstance(out, PackedSequence)
        torch.testing.assert_close(pad_packed_sequence(out)[0], y, rtol=0, atol=1e-14)
        torch.testing.assert_close(other, h, rtol=0, atol=1e-14)


def test_has_masks_of_keras():
    # SimpleRNN of Keras with the same seed: K.fold_in(...) with no layer.
    layer = make_layer(RNN, nonlinearity="relu", input_dropout=0.5, variational=True, bias=False)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(UNITS, INPUTS))
        layer.weight_hh_l0.zero_()
    y, _ = layer(torch.ones(TIME, BATCH, INPUTS, dtype=torch.float64))
    kept = keep_mask((BATCH, INPUTS), 0.5, SEED.fold_in(0).fold_in("dropout"))
    assert np.array_equal(y[..., :INPUTS].detach(), np.broadcast_to(2 * kept, (TIME, *kept.shape)))


def test_fixes_recurrent_mask_over_time():
    layer = make_layer(RNN, nonlinearity="relu", recurrent_dropout=0.5, bias=False)
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
        layer.weight_hh_l0.copy_(torch.eye(UNITS))
    start = torch.ones(1, BATCH, UNITS, dtype=torch.float64)
    y, _ = layer(make_input(), start)
    kept = keep_mask((BATCH, UNITS), 0.5, SEED.fold_in(0).fold_in("recurrent_dropout"))
    powers = 2.0 ** np.arange(1, TIME + 1)[:, None, None]
    assert np.array_equal(y.detach(), powers * kept)
    assert not torch.equal(layer(make_input(), start)[0], y)


@pytest.mark.parametrize(("cls", "options"), LAYERS)
def test_equals_layer_of_pytorch_without_dropout(cls, options):
    layer = make_layer(cls, **options, num_layers=2, dropout=0.5, recurrent_dropout=0.3)
    base = cls.__mro__[2]
    own = base(INPUTS, UNITS, **options, num_layers=2, dropout=0.5, dtype=torch.float64)
    own.load_state_dict(make_layer(cls, seed=None, **options, num_layers=2).state_dict())
    assert type(own).__module__ == "torch.nn.modules.rnn"
    x = make_input()
    expected, state = own.eval()(x)
    y, other = layer.eval()(x)
    assert torch.equal(y, expected)
    assert all(map(np.array_equal, list_states(other), list_states(state)))

    layer.train()
    layer.dropout = layer.recurrent_dropout = 0
    assert torch.equal(layer(x)[0], expected)
    assert layer.calls == 0
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    assert torch.equal(layer(packed)[0].data, own(packed)[0].data)


def test_counts_nothing_for_dropout_of_one_layer():
    with pytest.warns(UserWarning, match="expects num_layers greater than 1"):
        layer = make_layer(dropout=0.5)
    layer(make_input())
    assert layer.calls == 0


@pytest.mark.parametrize(("cls", "options"), LAYERS)
@pytest.mark.parametrize("stack", [STACKS[0], STACKS[4]])
def test_has_exact_gradient(cls, options, stack):
    layer = make_layer(cls, **options, **stack)

    def run(x, *weights):
        layer.calls = 0
        named = dict(zip(dict(layer.named_parameters()), weights, strict=True))
        return torch.func.functional_call(layer, named, x)[0]

    x = make_input(2, 2, INPUTS).requires_grad_()
    weights = [w.detach().clone().requires_grad_() for w in layer.parameters()]
    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)


@pytest.mark.parametrize("stack", [STACKS[1], STACKS[4]])
@pytest.mark.parametrize("cls", [LSTM, GRU])
def test_trains_equally_twice_and_after_resuming(cls, stack):
    def train(steps, model, optimizer):
        losses = []
        for n in range(steps):
            torch.manual_seed(n)  # of data; the layer does not draw from the generator
            x = torch.randn(8, BATCH, INPUTS)
            y, _ = model["rnn"](x)
            loss = (model["head"](y[-1]) - x.mean(0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def start():
        layer = make_layer(cls, torch.float32, **{**stack, "dropout": 0.1})
        head = torch.nn.Linear(UNITS * (1 + layer.bidirectional), INPUTS)
        model = torch.nn.ModuleDict({"rnn": layer, "head": head})
        return model, torch.optim.Adam(model.parameters(), 0.02)

    model, optimizer = start()
    losses = train(30, model, optimizer)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    other, optimizer = start()
    train(30, other, optimizer)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)

    saved = copy.deepcopy((other.state_dict(), optimizer.state_dict()))
    continued = train(3, other, optimizer)
    loaded, optimizer = start()
    loaded.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert train(3, loaded, optimizer) == continued
    assert loaded["rnn"].calls == 33


def test_exchanges_weights_with_layer_of_pytorch():
    own = torch.nn.GRU(INPUTS, UNITS, 2)
    layer = GRU(INPUTS, UNITS, 2, dropout=0.5, seed=SEED)
    layer.load_state_dict(own.state_dict())
    assert torch.equal(layer.weight_hh_l1, own.weight_hh_l1)
    plain = GRU(INPUTS, UNITS, 2, dropout=0.5)
    assert list(plain.state_dict()) == list(own.state_dict())
    own.load_state_dict(plain.state_dict())
    extra = set(layer.state_dict()) - set(own.state_dict())
    assert extra == {"_calls_of_seed._extra_state"}


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_seed_and_calls(copier):
    layer = make_layer(num_layers=2, dropout=0.5, recurrent_dropout=0.2)
    x = make_input()
    layer(x)
    copied = copier(layer)
    assert copied.seed == SEED
    assert copied.calls == 1
    assert torch.equal(copied(x)[0], layer(x)[0])
    assert copied.calls == layer.calls == 2


def test_draws_keys_without_seed():
    layer = make_layer(num_layers=2, dropout=0.5, recurrent_dropout=0.2, seed=None)
    x = make_input()
    y = layer(x)[0]
    torch.manual_seed(7)
    one, two = layer(x)[0], layer(x)[0]
    torch.manual_seed(7)
    assert torch.equal(layer(x)[0], one)
    assert not torch.equal(one, two)
    assert not torch.equal(one, y)
    with pytest.raises(AttributeError, match="does not count calls"):
        layer.calls = 1


def test_assigns_seed_of_name():
    model = torch.nn.Sequential(Dropout(), LSTM(INPUTS, UNITS, recurrent_dropout=0.5))
    assign_seeds(model, 42)
    assert model[1].seed == Key(42).fold_in("1")
    text = f"LSTM(3, 4, recurrent_dropout=0.5, seed={Key(42).fold_in('1')})"
    assert repr(model[1]) == text


def test_warns_of_equal_seeds():
    layers = [make_layer(recurrent_dropout=0.5), make_layer(), make_layer(recurrent_dropout=0.5)]
    layers[1].input_dropout = 0.5
    layers[2].recurrent_dropout = 0  # drops nothing
    model = torch.nn.ModuleList(layers)
    model.forward = lambda x: [layer(x) for layer in layers]
    with pytest.warns(UserWarning, match="'0' and '1'"):
        model(make_input())


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputes_masks_in_checkpoint(reentrant):
    layer = make_layer(num_layers=2, dropout=0.5, recurrent_dropout=0.2)
    x = make_input().requires_grad_()
    (expected,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    layer.calls = 0
    y = checkpoint(lambda x: layer(x)[0], x, use_reentrant=reentrant)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)
    assert layer.calls == 1


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("cls", "recurrent"), [(LSTM, 0.3), (GRU, 0.0)])
def test_compiles_with_masks_of_eager_calls(cls, recurrent, whole):
    layer = make_layer(cls, num_layers=2, dropout=0.4, recurrent_dropout=recurrent)
    x = make_input(2, 2, INPUTS).requires_grad_()
    packed = pack_padded_sequence(x.detach(), [1, 2], enforce_sorted=False)
    torch.compiler.reset()  # it remembers that it compiles no recurrent layer
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=whole)
    runs = []
    for run in (layer, compiled):
        layer.calls = 0
        with torch._dynamo.config.patch(allow_rnn=whole):
            outputs = [run(x)[0] for _ in range(2)]
            # PyTorch compiles no layer of packed sequences as a whole.
            outputs += [] if whole else [run(packed)[0].data]
        assert layer.calls == len(outputs)
        runs.append((*outputs, *torch.autograd.grad(outputs[1].square().sum(), x)))
    for eager, traced in zip(*runs, strict=True):
        torch.testing.assert_close(traced, eager, rtol=0, atol=1e-12)


# PyTorch's GRU has states of float32 on the CPU.
@pytest.mark.parametrize(("cls", "recurrent"), [(LSTM, 0.0), (LSTM, 0.3), (GRU, 0.3)])
def test_computes_in_dtype_of_autocast(cls, recurrent):
    layer = make_layer(cls, torch.float32, num_layers=2, dropout=0.4, recurrent_dropout=recurrent)
    x = make_input(dtype=torch.float32)
    expected, _ = layer(x)
    layer.calls = 0
    with torch.autocast("cpu", torch.bfloat16):
        y, hx = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(state.dtype == y.dtype for state in (hx if cls is LSTM else (hx,)))
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.02)
    assert layer.weight_hh_l1.grad.dtype == torch.float32


def test_records_call_in_fx():
    model = torch.nn.Sequential(make_layer(recurrent_dropout=0.5))
    traced = torch.fx.symbolic_trace(model)
    x = make_input()
    y = traced(x)[0]
    model[0].calls = 0
    assert torch.equal(traced(x)[0], y)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]


def test_refuses_torchscript():
    with pytest.raises(RuntimeError, match=r"torch\.jit"):
        torch.jit.script(make_layer(recurrent_dropout=0.5))


@pytest.mark.parametrize("name", ["dropout", "input_dropout", "recurrent_dropout"])
@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_rejects_rate_outside_unit_interval(name, p):
    with pytest.raises(ValueError, match="dropout "):
        make_layer(num_layers=2, **{name: p})
    layer = make_layer(num_layers=2)
    with pytest.raises(ValueError, match=f"{name} .* between 0 and 1"):
        setattr(layer, name, p)


@pytest.mark.parametrize("options", [{"input_dropout": "a"}, {"variational": 2}, {"seed": "a"}])
def test_rejects_argument_of_wrong_type(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        LSTM(INPUTS, UNITS, **options)


@pytest.mark.parametrize("cls", [LSTM, GRU, RNN])
@pytest.mark.parametrize("recurrent", [0.0, 0.5])
@pytest.mark.parametrize("case", ["rank", "features", "dtype", "hidden", "hidden rank", "empty"])
def test_raises_as_layer_of_pytorch(cls, recurrent, case):
    layer = make_layer(cls, num_layers=2, dropout=0.5, recurrent_dropout=recurrent)
    own = cls.__mro__[2](INPUTS, UNITS, num_layers=2, dropout=0.5, dtype=torch.float64)
    x = make_input()
    hidden = torch.zeros(2, BATCH, UNITS + (case == "hidden"), dtype=torch.float64)
    hidden = hidden[0] if case == "hidden rank" else hidden
    hx = (hidden, hidden) if cls is LSTM else hidden
    x = {"rank": x[None], "features": x[..., :2], "dtype": x.float(), "empty": x[:0]}.get(case, x)
    arguments = (x, hx) if case.startswith("hidden") else (x,)
    with pytest.raises(Exception) as expected:  # noqa: PT011 # of any type
        own(*arguments)
    with pytest.raises(type(expected.value)) as error:
        layer(*arguments)
    if case != "empty":
        assert str(error.value) == str(expected.value)
    assert layer.calls == 0


def test_takes_rate_of_one():
    layer = make_layer(num_layers=2, dropout=1, recurrent_dropout=1)
    with torch.no_grad():
        y, _ = layer(make_input())
        bias = layer.bias_ih_l1 + layer.bias_hh_l1
    assert torch.isfinite(y).all()
    i, _, g, o = bias.unflatten(0, (4, UNITS))
    first = o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()
    torch.testing.assert_close(y[0], first.expand(BATCH, UNITS))


def test_runs_recurrent_dropout_of_an_empty_batch():
    layer = make_layer(recurrent_dropout=0.3)
    y, _ = layer(make_input(2, 0, layer.input_size))
    assert y.shape == (2, 0, layer.hidden_size)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        layer(make_input(0, 2, layer.input_size))
