"""The layer `MultiheadAttention`: the layer of PyTorch with the mask of a seed."""

import copy
from unittest import mock

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from unidrop import Key, keep_mask
from unidrop.adapters.torch import Dropout, MultiheadAttention, assign_seeds, dropout

SEED = Key(42).fold_in("attention")

# Inductor imports what torch.jit has deprecated.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False, "add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"kdim": 6, "vdim": 10, "add_bias_kv": True, "add_zero_attn": True},
]
MASKS = [
    "none",
    "attention",
    "attention of heads",
    "padding",
    "both",
    "causal",
    "causal and padding",
]


def own_forward(layer, *tensors, **options):
    """Return the results of the layer of PyTorch, with the mask of call 0 of the seed."""

    def drop(weights, p, training=True, inplace=False):
        return dropout(weights, p, training, key=SEED.fold_in(0))

    def attend(query, key, value, attn_mask, p, is_causal):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        scores = scores if attn_mask is None else scores + attn_mask
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        return drop(scores.softmax(-1), p) @ value

    with (
        mock.patch.object(functional, "dropout", drop),
        mock.patch.object(functional, "scaled_dot_product_attention", attend),
    ):
        return layer(*tensors, **options)


def make_tensors(options, is_batched, queries=5, keys=7):
    generator = torch.Generator().manual_seed(0)
    lengths = ((queries, 8), (keys, options.get("kdim", 8)), (keys, options.get("vdim", 8)))
    tensors = [torch.randn(3, *shape, generator=generator) for shape in lengths]
    if not is_batched:
        return [x[0] for x in tensors]
    return tensors if options.get("batch_first") else [x.transpose(0, 1) for x in tensors]


def make_masks(name, is_batched):
    generator = torch.Generator().manual_seed(1)
    count = 6 if is_batched else 2
    masks = {}
    if name in ("attention", "both"):
        masks["attn_mask"] = torch.rand(5, 7, generator=generator) < 0.3
        masks["attn_mask"][:, 0] = False
    if name == "attention of heads":
        masks["attn_mask"] = torch.randn(count, 5, 7, generator=generator)
    if name in ("padding", "both", "causal and padding"):
        padding = torch.zeros(3, 7, dtype=torch.bool)
        padding[1:, 4:] = True
        masks["key_padding_mask"] = padding if is_batched else padding[1]
    if name in ("causal", "causal and padding"):
        masks["attn_mask"] = torch.ones(5, 7, dtype=torch.bool).triu(1)
        masks["is_causal"] = True
    return masks


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("is_batched", [True, False])
def test_equals_the_layer_of_pytorch(options, masks, is_batched):
    ours = MultiheadAttention(8, 2, 0.4, seed=SEED, **options)
    own = torch.nn.MultiheadAttention(8, 2, 0.4, **options)
    ours.load_state_dict(own.state_dict())
    tensors = make_tensors(options, is_batched)
    for need_weights, average in ((True, True), (True, False), (False, True)):
        arguments = make_masks(masks, is_batched)
        arguments |= {"need_weights": need_weights, "average_attn_weights": average}
        for training in (True, False):
            own.train(training), ours.train(training)
            ours.calls = 0
            found, expected = ours(*tensors, **arguments), own_forward(own, *tensors, **arguments)
            assert ours.calls == int(training)
            for x, y in zip(found, expected, strict=True):
                assert (x is None) == (y is None)
                if x is not None:
                    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_self_attention_equals_the_layer_of_pytorch():
    ours, own = MultiheadAttention(8, 2, 0.4, seed=SEED), torch.nn.MultiheadAttention(8, 2, 0.4)
    ours.load_state_dict(own.state_dict())
    x = torch.randn(5, 3, 8)
    for found, expected in zip(ours(x, x, x), own_forward(own, x, x, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}], ids=str)
def test_projects_equal_inputs_at_once_as_pytorch(options, bias):
    ours = MultiheadAttention(8, 2, 0.4, bias=bias, seed=SEED, **options)
    own = torch.nn.MultiheadAttention(8, 2, 0.4, bias=bias, **options)
    ours.load_state_dict(own.state_dict())
    x, y, z = (torch.randn(5, 5, 8) for _ in range(3))
    for tensors in ((x, x, x), (x, y, y), (x, x, y), (x, y, x), (x, y, z)):
        with mock.patch.object(functional, "linear", wraps=functional.linear) as linear:
            ours.calls = 0
            found = ours(*tensors)
            count = linear.call_count
            expected = own_forward(own, *tensors)
            assert linear.call_count == 2 * count
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
def test_counts_no_call_that_raises_after_dropout(need_weights):
    layer = MultiheadAttention(8, 2, 0.4, seed=SEED)
    layer(X, X, X, need_weights=need_weights)
    weight, layer.out_proj.weight = layer.out_proj.weight, torch.nn.Parameter(torch.ones(8, 4))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer(X, X, X, need_weights=need_weights)
    assert layer.calls == 1
    layer.out_proj.weight = weight
    layer(X, X, X, need_weights=need_weights)
    assert layer.calls == 2


def test_weights_have_the_mask_of_dropout():
    layer = MultiheadAttention(8, 2, 0.4, seed=SEED)
    x = torch.randn(5, 3, 8)
    for call in range(3):
        if call == 1:  # without weights, a call counts too
            layer(x, x, x, need_weights=False)
            continue
        _, weights = layer(x, x, x, average_attn_weights=False)
        mask = keep_mask((3, 2, 5, 5), 0.4, SEED.fold_in(call), xp=torch)
        assert torch.equal(weights != 0, mask)
    assert layer.calls == 3


X = torch.ones(5, 3, 8)
REFUSED = {
    "rank": ((X[None], X[None], X[None]), {}),
    "ranks": ((X, X[0], X[0]), {}),
    "features": ((X[..., :4], X, X), {}),
    "lengths": ((X, X, X[:4]), {}),
    "batch": ((X, X[:, :2], X[:, :2]), {}),
    "padding": ((X, X, X), {"key_padding_mask": torch.zeros(3, 4, dtype=torch.bool)}),
    "dtype of padding": ((X, X, X), {"key_padding_mask": torch.zeros(3, 5, dtype=torch.int)}),
    "mask": ((X, X, X), {"attn_mask": torch.zeros(5, 4)}),
    "mask of heads": ((X, X, X), {"attn_mask": torch.zeros(3, 5, 5)}),
    "dtype of mask": ((X, X, X), {"attn_mask": torch.zeros(5, 5, dtype=torch.int)}),
    "half mask": ((X, X, X), {"attn_mask": torch.zeros(5, 5, dtype=torch.float16)}),
    "float64 padding": ((X, X, X), {"key_padding_mask": torch.zeros(3, 5, dtype=torch.float64)}),
    "hint without mask": ((X, X, X), {"is_causal": True}),
    "dtype": ((X.double(), X.double(), X.double()), {}),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_raises_the_error_of_pytorch(case, need_weights):
    tensors, options = REFUSED[case]
    own, ours = torch.nn.MultiheadAttention(8, 2, 0.4), MultiheadAttention(8, 2, 0.4, seed=SEED)
    try:
        own(*tensors, need_weights=need_weights, **options)
    except Exception as error:  # PyTorch raises many types
        theirs = error
    state = torch.get_rng_state()
    with pytest.raises(type(theirs)) as found:
        ours(*tensors, need_weights=need_weights, **options)
    assert str(found.value) == str(theirs)
    assert ours.calls == 0
    assert torch.equal(state, torch.get_rng_state())


def test_rejects_a_bad_rate_and_seed():
    with pytest.raises(ValueError, match="between 0 and 1"):
        MultiheadAttention(8, 2, 1.5)
    with pytest.raises(TypeError, match="seed"):
        MultiheadAttention(8, 2, 0.5, seed="42")
    with pytest.raises(AssertionError, match="divisible"):
        MultiheadAttention(8, 3, 0.5)
    layer = MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="between 0 and 1"):
        layer.dropout = -1.0
    assert layer.dropout == 0


def test_checkpoints_load_in_both_directions():
    own, ours = torch.nn.MultiheadAttention(8, 2, 0.4), MultiheadAttention(8, 2, 0.4, seed=SEED)
    ours(X, X, X)
    ours.load_state_dict(own.state_dict())
    assert ours.calls == 1
    names = set(ours.state_dict()) - set(own.state_dict())
    assert names == {"_attention_dropout._extra_state"}
    resumed = MultiheadAttention(8, 2, 0.4, seed=SEED)
    resumed.load_state_dict(ours.state_dict())
    assert resumed.calls == 1
    assert torch.equal(resumed(X, X, X)[0], ours(X, X, X)[0])
    own.load_state_dict(MultiheadAttention(8, 2, 0.4).state_dict())


def test_copy_has_a_call_number_of_its_own():
    layer = MultiheadAttention(8, 2, 0.4, seed=SEED)
    layer(X, X, X)
    other = copy.deepcopy(layer)
    assert torch.equal(layer(X, X, X)[0], other(X, X, X)[0])
    layer.calls = 7
    assert other.calls == 2
    other.seed = None
    assert layer.seed == SEED
    assert other.seed is None


def test_model_gets_seeds_by_the_name_of_the_layer():
    model = torch.nn.ModuleDict({"attention": MultiheadAttention(8, 2, 0.1), "drop": Dropout()})
    assign_seeds(model, 42)
    assert model["attention"].seed == Key(42).fold_in("attention")
    assert model["drop"].seed == Key(42).fold_in("drop")


def test_names_a_child_that_is_called_as_ours():
    child = torch.nn.ModuleDict({"_attention_dropout": Dropout()})
    model = torch.nn.ModuleDict({"block": child, "drop": Dropout()})
    assign_seeds(model, 42)
    assert child["_attention_dropout"].seed == Key(42).fold_in("block._attention_dropout")


def test_warns_of_layers_with_one_seed():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = MultiheadAttention(8, 2, 0.4, seed=SEED)
            self.other = MultiheadAttention(8, 2, 0.4, seed=SEED)

        def forward(self, x):
            return self.one(x, x, x, need_weights=False)[0]

    with pytest.warns(UserWarning, match="one.*other"):
        Model()(X)


@pytest.mark.parametrize("need_weights", [True, False])
def test_without_a_seed_draws_a_key(need_weights):
    layer = MultiheadAttention(8, 2, 0.4)
    seeded = MultiheadAttention(8, 2, 0.4, seed=SEED)
    seeded.load_state_dict(layer.state_dict())
    torch.manual_seed(0)
    one = layer(X, X, X, need_weights=need_weights)[0]
    other = layer(X, X, X, need_weights=need_weights)[0]
    torch.manual_seed(0)
    assert torch.equal(one, layer(X, X, X, need_weights=need_weights)[0])
    assert not torch.equal(one, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("need_weights", [True, False])
def test_checkpoint_counts_one_call(use_reentrant, need_weights):
    layer, found = MultiheadAttention(8, 2, 0.4, seed=SEED), []
    x = torch.randn(5, 3, 8, requires_grad=True)
    for run in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=use_reentrant)):
        layer.calls, x.grad = 0, None
        run(lambda x: layer(x, x, x, need_weights=need_weights)[0], x).sum().backward()
        assert layer.calls == 1
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.slow
def test_compiles_to_one_graph_and_counts_calls():
    layer = MultiheadAttention(8, 2, 0.4, seed=SEED)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(5, 3, 8)
    for need_weights in (True, False):
        layer.calls = 5
        output, _ = compiled(x, x, x, need_weights=need_weights)
        assert layer.calls == 6
        layer.calls = 5
        expected, _ = layer(x, x, x, need_weights=need_weights)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


def test_autocast_returns_the_dtype_of_pytorch():
    layer, own = MultiheadAttention(8, 2, 0.4, seed=SEED), torch.nn.MultiheadAttention(8, 2, 0.4)
    for need_weights in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = (f(X, X, X, need_weights=need_weights) for f in (layer, own))
        assert [getattr(x, "dtype", x) for x in found] == [getattr(x, "dtype", x) for x in expected]


def test_fx_records_the_layer_as_one_node():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = MultiheadAttention(8, 2, 0.4, seed=SEED)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    found = traced(X)
    model.attention.calls = 0
    assert torch.equal(found, model(X))


def test_serves_a_transformer_layer_of_pytorch():
    layer = torch.nn.TransformerEncoderLayer(8, 2, dropout=0.0, batch_first=True)
    layer.self_attn = MultiheadAttention(8, 2, 0.4, batch_first=True, seed=SEED)
    x = torch.randn(3, 5, 8)
    outputs = []
    for _ in range(2):
        layer.self_attn.calls = 0
        outputs.append(layer(x))
    assert torch.equal(*outputs)
    layer.eval()
    assert layer(x).isfinite().all()
    assert layer.self_attn.calls == 1


@pytest.mark.parametrize("need_weights", [True, False])
def test_drops_nothing_while_its_child_is_in_evaluation(need_weights):
    """Users turn dropout off by ``eval`` of all modules that are a torch.nn.Dropout."""
    layer, x = MultiheadAttention(8, 2, 0.5, seed=1), torch.ones(5, 3, 8)
    for module in layer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    y, _ = layer(x, x, x, need_weights=need_weights)
    expected, _ = layer.eval()(x, x, x)
    torch.testing.assert_close(y, expected)
    assert layer.calls == 0
