"""Modules inside other people's code: copies, ensembles, surgery by type, FX, inference mode."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.optimization import remove_dropout
from torch_checkpoints import saved_number
from torch_tensors import patterns

import unidrop.adapters.torch as ours
from unidrop import Key
from unidrop.adapters.torch import Dropout, assign_seeds, dropout

MODULES = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d"]
SITE = Key(42).fold_in("encoder/0")
ONES = torch.ones(64)


def mask(seed, call, shape=(64,)):
    return dropout(torch.ones(shape), key=seed.fold_in(call))


# --- Identity -------------------------------------------------------------------------------------


def copies(count=3):
    """Return a model of copies of one layer, as `nn.TransformerEncoder` makes them."""
    layer = nn.Sequential(nn.Linear(4, 4), Dropout(seed=SITE))
    return nn.Sequential(*(copy.deepcopy(layer) for _ in range(count)))


def test_warns_once_of_layers_with_one_seed():
    model = copies()
    with pytest.warns(UserWarning, match=r"'0\.1' and '1\.1' have one seed.*assign_seeds"):
        model(torch.ones(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(2, 4))
    assert [int(layer[1].calls) for layer in model] == [2, 2, 2]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: assign_seeds(model, 42),
        lambda model: model.eval(),
        lambda model: setattr(model[1][1], "calls", 5),
        lambda model: setattr(model[1][1], "p", 0.0),
        lambda model: model[1][1].eval(),
    ],
    ids=["seeds", "evaluation", "calls", "p = 0", "layer in evaluation"],
)
def test_warns_only_of_equal_masks(change):
    model = copies(2)
    change(model)
    model(torch.ones(2, 4))


def test_warns_of_no_other_model():
    first = nn.Sequential(Dropout(seed=SITE))
    second = copy.deepcopy(first)
    for model in (first, second, first):
        model(ONES)


def test_warns_of_layer_that_is_added_later():
    model = nn.Sequential(Dropout(seed=SITE))
    model(ONES)
    model.append(copy.deepcopy(model[0]))
    model[1].seed = SITE
    with pytest.warns(UserWarning, match="'0' and '1' have one seed"):
        model(ONES)


def test_looks_for_no_other_layer_in_replicas(monkeypatch):
    module = Dropout(seed=SITE)
    monkeypatch.setattr("unidrop.adapters.torch.modules.warn_of_twins", lambda layer: 1 / 0)
    for _ in range(2):  # DataParallel makes new ones for each forward
        replica = module._replicate_for_data_parallel()
        assert patterns(replica(ONES)) == patterns(mask(SITE, module.calls - 1))
    with pytest.raises(ZeroDivisionError):
        module(ONES)


def test_counts_nothing_if_warning_is_an_error():
    model = copies(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="one seed"):
            model(torch.ones(2, 4))
    assert model[0][1].calls == 0


def test_assigns_seeds_by_qualified_name():
    model = copies(2)
    model[0][1].calls = 7
    assert assign_seeds(model, 42) is model
    assert [layer[1].seed for layer in model] == [Key(42).fold_in(f"{i}.1") for i in range(2)]
    assert [int(layer[1].calls) for layer in model] == [7, 0]


def test_assigns_seed_to_unseeded_layer_and_from_key():
    model = assign_seeds(nn.ModuleDict({"a": Dropout(), "b": ours.Dropout2d()}), SITE)
    assert {name: layer.seed for name, layer in model.items()} == {
        "a": SITE.fold_in("a"),
        "b": SITE.fold_in("b"),
    }


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda model: torch.compile(model, backend="eager")],
    ids=["DataParallel", "compiled"],
)
def test_assigns_seeds_of_model_alone_in_wrapper(wrap):
    model = copies(2)
    assign_seeds(wrap(model), 42)
    assert model[1][1].seed == Key(42).fold_in("1.1")


def test_assigns_first_name_to_shared_layer():
    shared = Dropout()
    assign_seeds(nn.ModuleDict({"a": shared, "b": shared}), 42)
    assert shared.seed == Key(42).fold_in("a")


@pytest.mark.parametrize(
    ("model", "seed", "error", "message"),
    [
        (nn.Linear(1, 1), 42, ValueError, "model must have a layer of unidrop"),
        (nn.Dropout(), 42, ValueError, "model must have a layer of unidrop"),
        (Dropout(seed=SITE), "42", TypeError, "seed must be"),
        (Dropout(seed=SITE), -1, ValueError, "seed must be"),
        ([Dropout()], 42, TypeError, "model must be a torch.nn.Module, got list"),
    ],
)
def test_refuses_to_assign_seeds(model, seed, error, message):
    with pytest.raises(error, match=message):
        assign_seeds(model, seed)
    assert getattr(model, "seed", SITE) == SITE


# --- Ensembles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("randomness", ["different", "same", "error"])
def test_gives_members_of_ensemble_their_own_masks(randomness):
    models = [Dropout(seed=SITE.fold_in(i)) for i in range(3)]
    models[2].calls = 5
    parameters, buffers = stack_module_state(models)

    def call(parameters, buffers):
        return functional_call(models[0], (parameters, buffers), (ONES,))

    actual = vmap(call, randomness=randomness)(parameters, buffers)
    for y, model, number in zip(actual, models, (0, 0, 5), strict=True):
        assert patterns(y) == patterns(mask(model.seed, number))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_uses_key_of_state_that_another_module_runs(compiled):
    first, second = Dropout(seed=SITE), Dropout(seed=Key(7))
    second.calls = 3

    def call(buffers, x):
        return functional_call(first, buffers, (x,))

    run = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    assert patterns(run(dict(second.named_buffers()), ONES)) == patterns(mask(Key(7), 3))
    assert (first.calls, second.calls) == (0, 4)


def test_ignores_key_that_another_process_broadcasts():
    module = Dropout(seed=SITE)
    for buffer, other in zip(module.buffers(), Dropout(seed=9).buffers(), strict=True):
        buffer.copy_(other)  # as DistributedDataParallel does before each forward
    assert patterns(module(ONES)) == patterns(mask(SITE, 0))


# --- Types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_is_found_by_type_of_torch(name):
    assert isinstance(getattr(ours, name)(), getattr(nn, name))
    assert not isinstance(getattr(ours, name)(), (nn.AlphaDropout, nn.FeatureAlphaDropout))


def test_drops_in_evaluation_after_surgery_by_type():
    model = nn.Sequential(nn.Linear(8, 8), Dropout(seed=SITE)).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.train()
    assert not torch.equal(model(torch.ones(1, 8)), model(torch.ones(1, 8)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_is_a_leaf_of_fx(name, training):
    layer = getattr(ours, name)(seed=SITE)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), layer).train(training))
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    x = torch.ones(2, 3, 4, 4, 4)[(0,) * (3 - int(name[-2]) if name[-1] == "d" else 0)]
    twin = copy.deepcopy(layer)
    for _ in range(2):
        assert torch.equal(traced(x), twin(x))
    assert traced.get_submodule("1").calls == (2 if training else 0)


@pytest.mark.parametrize("key", [Key(2**63 + 5), None], ids=["key", "drawn"])
def test_is_a_function_of_fx(key):
    def call(x):
        return dropout(x.relu(), 0.5, key=key)

    traced = torch.fx.symbolic_trace(call)
    assert "dropout" in traced.code
    torch.manual_seed(0)
    actual = traced(ONES)
    torch.manual_seed(0)
    assert patterns(actual) == patterns(call(ONES))


def test_is_removed_by_fx():
    model = nn.Sequential(nn.Linear(8, 8), Dropout(seed=SITE)).eval()
    assert "Dropout" not in str(remove_dropout(model))


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_trains_when_prepared_for_quantization_by_fx():
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    model = nn.Sequential(nn.Linear(64, 64), Dropout(seed=SITE)).train()
    qat = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (torch.ones(2, 64),))
    layer = qat.get_submodule("1")
    layer.calls = 0
    seen = []
    layer.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    for call in range(2):
        qat(torch.ones(2, 64)).sum().backward()
        x, y = seen[call]
        assert torch.equal(y, dropout(x, key=SITE.fold_in(call)))
    assert layer.calls == 2


@pytest.mark.parametrize("call", [lambda x: Dropout(seed=SITE)(x), dropout], ids=["layer", "f"])
@pytest.mark.parametrize("x", [[1.0, 2.0], 1.0, None, "x"], ids=repr)
def test_refuses_other_types(call, x):
    with pytest.raises(TypeError, match=r"^input must be a torch.Tensor, got"):
        call(x)


# --- State that a framework holds -----------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: Dropout(seed=SITE),
        lambda: copy.deepcopy(Dropout(seed=SITE)),
        lambda: pickle.loads(pickle.dumps(Dropout(seed=SITE))),
        lambda: Dropout(seed=SITE).double(),
        lambda: assign_seeds(nn.Sequential(Dropout()), 42)[0],
    ],
    ids=["made", "copied", "unpickled", "cast", "assigned"],
)
def test_trains_after_inference_mode(make):
    with torch.inference_mode():
        module = make()
        module(ONES)
    assert patterns(module(ONES)) == patterns(mask(module.seed, 1))
    assert module.calls == 2


@pytest.mark.parametrize("number", [0, 5])
def test_counts_from_0_after_meta_device(number):
    with torch.device("meta"):
        module = Dropout(seed=SITE)
    module.to_empty(device="cpu")
    module.calls = number
    assert patterns(module(ONES)) == patterns(mask(SITE, number))


def test_keeps_number_on_meta_device():
    module = Dropout(seed=SITE)
    module.calls = 5
    assert module.to("meta").to_empty(device="cpu").calls == 5


@pytest.mark.parametrize("numbers", [(5, 5), (-5, 4), (140526228927848, 0)])
def test_refuses_damaged_number_of_checkpoint(numbers):
    model = nn.Sequential(Dropout(seed=SITE))
    model[0].calls = 3
    with pytest.raises(RuntimeError, match=rf"0: calls is damaged .*{numbers[0]} and {numbers[1]}"):
        model.load_state_dict({"0._extra_state": torch.tensor(numbers)})
    assert model[0].calls == 3


@pytest.mark.parametrize("saved", [torch.tensor([5.0, 6.0]), torch.tensor(5), 5, None], ids=repr)
def test_refuses_other_state_of_checkpoint(saved):
    with pytest.raises(RuntimeError, match=r"Dropout: calls must be an int64 tensor of shape \(2,"):
        Dropout(seed=SITE).load_state_dict({"_extra_state": saved})


@pytest.mark.parametrize("write", [lambda c: c.fill_(7), lambda c: c.copy_(torch.tensor([3, 3]))])
def test_refuses_to_run_with_damaged_number(write):
    module = Dropout(seed=SITE)
    write(module.get_extra_state())
    with pytest.raises(RuntimeError, match=r"call number of a Dropout is damaged.*module\.calls"):
        module(ONES)
    module.calls = 2
    assert patterns(module(ONES)) == patterns(mask(SITE, 2))


def test_saves_shared_layer_as_copies():
    shared = Dropout(seed=SITE)
    state = nn.ModuleDict({"a": shared, "b": shared}).state_dict()
    a, b = state["a._extra_state"], state["b._extra_state"]
    assert a.data_ptr() != b.data_ptr()
    assert torch.equal(a, saved_number(0))


def test_loads_what_is_written_into_its_state_dict():
    module = Dropout(seed=SITE)
    module.state_dict()["_extra_state"].copy_(saved_number(5))
    assert module.calls == 5
