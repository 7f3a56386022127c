"""The checks of PyTorch's module database, on the modules of the adapter.

PyTorch's database describes the modules of `torch.nn`. It has no dropout so far, so these tests
describe it in the same form. They also use its entries of modules that contain dropout.
"""

import copy
import io
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import make_tensor
from torch_tensors import DTYPES, SITE, expected_patterns, patterns

import unidrop
import unidrop.adapters.torch as ours
from unidrop.adapters.torch import assign_seeds

SHAPES = {
    "Dropout": [(2, 3, 4, 5), (2, 3, 2, 4, 5), (5,), ()],
    "Dropout1d": [(2, 3, 4), (3, 4)],
    "Dropout2d": [(2, 3, 4, 5), (2, 3, 4)],
    "Dropout3d": [(2, 3, 2, 4, 5), (3, 2, 4, 5)],
}
CONTAINERS = ["TransformerEncoder", "TransformerEncoderLayer", "TransformerDecoderLayer"]
CONTAINERS += ["Transformer"]
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.slow,  # PyTorch's description of its modules takes seconds to import
    # PyTorch warns of inputs of 3 axes, and so does the adapter.
    pytest.mark.filterwarnings("ignore:dropout2d. Received a 3"),
]
each_module = pytest.mark.parametrize("name", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
two_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
each_seed = pytest.mark.parametrize("seed", [None, SITE], ids=["drawn", "seed"])
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@cache
def database():
    """Return PyTorch's module; looked up late, as it takes seconds."""
    pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
    from torch.testing._internal import common_modules

    return common_modules


def make_inputs(name, info, device, dtype, requires_grad, training, **kwargs):
    """Return arguments of a module and of its call, as PyTorch's database does."""
    db = database()
    make = partial(make_tensor, device=device, dtype=dtype, requires_grad=requires_grad)
    first, *others = SHAPES[name]
    return [
        db.ModuleInput(db.FunctionInput(*p), db.FunctionInput(make(shape)))
        for shape, *p in [(first,), (first, 0.2), (first, 0.0), (first, 1.0), *zip(others)]
    ]


def make_error_inputs(name, info, device, dtype, requires_grad, training, **kwargs):
    """Return arguments that PyTorch's module rejects, as PyTorch's database does."""
    db = database()
    fails = partial(db.ErrorModuleInput, error_type=ValueError)
    errors = [
        fails(
            db.ModuleInput(db.FunctionInput(p)),
            error_regex=rf"^dropout probability .*has to be between 0 and 1, but got {p}$",
        )
        for p in (-0.1, 1.1)
    ]
    if name == "Dropout1d":
        flat = db.FunctionInput(make_tensor(3, device=device, dtype=dtype))
        errors.append(
            db.ErrorModuleInput(
                db.ModuleInput(db.FunctionInput(), flat),
                error_on=db.ModuleErrorEnum.FORWARD_ERROR,
                error_regex="dropout1d: Expected 2D or 3D input, but received a 1D input",
            )
        )
    return errors


def entries(name):
    """Return the entries of a dropout module: ours, and PyTorch's as soon as there are any."""
    db, module = database(), getattr(nn, name)
    own = db.ModuleInfo(
        module,
        module_inputs_func=partial(make_inputs, name),
        module_error_inputs_func=partial(make_error_inputs, name),
        train_and_eval_differ=True,
        dtypes=tuple(DTYPES),
    )
    return [own, *(info for info in db.module_db if info.module_cls is module)]


def samples(name, dtype=torch.float32, requires_grad=True, training=True):
    """Yield the arguments of the module, and its input."""
    torch.manual_seed(0)
    for info in entries(name):
        if dtype in info.supported_dtypes("cpu"):
            for sample in info.module_inputs_func(info, "cpu", dtype, requires_grad, training):
                (x,) = [*sample.forward_input.args, *sample.forward_input.kwargs.values()]
                yield sample.constructor_input, x


def make(name, arguments, seed, **kwargs):
    """Return our module where the database makes PyTorch's."""
    return getattr(ours, name)(*arguments.args, **arguments.kwargs, **kwargs, seed=seed)


def run(module, x):
    """Run the first call of a module again."""
    torch.manual_seed(0)
    if module.seed is not None:
        module.calls = 0
    return module(x)


def axes(name, x):
    """Return the axes along which PyTorch's module shares a decision, from its documentation."""
    shared = {"Dropout": 0, "Dropout1d": 1, "Dropout2d": x.dim() - 2, "Dropout3d": 3}[name]
    return tuple(range(x.dim() - shared, x.dim()))


# --- Outputs and gradients ------------------------------------------------------------------------


@each_dtype
@each_module
def test_gives_specified_output_and_gradient(name, dtype):
    for arguments, x in samples(name, dtype):
        module = make(name, arguments, SITE).to(dtype)
        for n in range(2):
            y, key = module(x), SITE.fold_in(n)
            assert patterns(y) == expected_patterns(x, module.p, key, axes(name, x))
            upstream = make_tensor(y.shape, dtype=dtype, device="cpu")
            (gradient,) = torch.autograd.grad(y, x, upstream)
            assert patterns(gradient) == expected_patterns(upstream, module.p, key, axes(name, x))
        assert module.calls == (2 if module.p else 0)


@each_mode
@each_seed
@each_dtype
@each_module
def test_equals_torch_but_for_choice_of_elements(name, dtype, seed, training):
    for arguments, x in samples(name, dtype, training=training):
        module = make(name, arguments, seed).to(dtype).train(training)
        native = getattr(nn, name)(*arguments.args, **arguments.kwargs).train(training)
        y, expected = module(x), native(x)
        for what in ("shape", "dtype", "device", "requires_grad"):
            assert getattr(y, what) == getattr(expected, what)
        assert y.stride() == expected.stride()
        if not training or module.p in (0, 1):
            assert torch.equal(y, expected)
            continue
        both = (y != 0) & (expected != 0)
        assert torch.equal(y[both], expected[both])
        if shared := axes(name, x):
            kept = (y != 0).flatten(shared[0])
            assert torch.equal(kept.all(-1), kept.any(-1))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@each_seed
@each_module
def test_has_right_derivatives(name, seed, check):
    for arguments, x in samples(name, torch.float64):
        assert check(partial(run, make(name, arguments, seed)), x, fast_mode=True)


@each_mode
@each_seed
@two_dtypes
@each_module
def test_gives_same_in_place(name, dtype, seed, training):
    for arguments, x in samples(name, dtype):
        module = make(name, arguments, seed, inplace=False).to(dtype).train(training)
        inplace = make(name, arguments, seed, inplace=True).to(dtype).train(training)
        leaf = x.detach().clone().requires_grad_()
        copied = leaf.clone()
        versions = x._version, copied._version
        y, z = run(module, x), run(inplace, copied)
        assert z is copied
        assert x._version == versions[0]
        assert (copied._version > versions[1]) == (training and module.p > 0)
        assert patterns(z) == patterns(y)
        upstream = make_tensor(y.shape, dtype=dtype, device="cpu")
        gradients = [torch.autograd.grad(out, leaf, upstream) for out, leaf in ((y, x), (z, leaf))]
        assert patterns(gradients[0][0]) == patterns(gradients[1][0])


def spread(x):
    """Return a tensor with the same numbers and gaps between them."""
    return torch.repeat_interleave(x.detach(), 2, dim=-1)[..., ::2] if x.dim() else x.detach()


@each_seed
@two_dtypes
@each_module
def test_gives_same_with_gaps_in_memory(name, dtype, seed):
    for arguments, x in samples(name, dtype):
        module = make(name, arguments, seed).to(dtype)
        upstream = make_tensor(x.shape, dtype=dtype, device="cpu")
        found = set()
        for leaf in (x, spread(x).requires_grad_()):
            for g in (upstream, spread(upstream)):
                y = run(module, leaf)
                (gradient,) = torch.autograd.grad(y, leaf, g)
                found.add((tuple(patterns(y)), tuple(patterns(gradient))))
        assert len(found) == 1


@each_seed
@each_module
def test_keeps_memory_format(name, seed):
    for arguments, x in samples(name):
        if (layout := LAYOUTS.get(x.dim())) is None:
            continue
        module = make(name, arguments, seed).to(memory_format=layout)
        leaf = x.detach().to(memory_format=layout).requires_grad_()
        y, expected = run(module, leaf), run(module, x)
        upstream = make_tensor(y.shape, dtype=y.dtype, device="cpu")
        (gradient,) = torch.autograd.grad(y, leaf, upstream.to(memory_format=layout))
        assert patterns(y) == patterns(expected)
        assert patterns(gradient) == patterns(torch.autograd.grad(expected, x, upstream)[0])
        for out in (y, gradient):
            assert out.is_contiguous(memory_format=layout)


# --- State ----------------------------------------------------------------------------------------


def save(saved, **options):
    """Save and load, and return what was loaded."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, **options)


@each_mode
@each_seed
@each_module
def test_continues_after_being_saved(name, seed, training):
    for arguments, x in samples(name):
        module = make(name, arguments, seed).train(training)
        module(x)
        pickled = save(module, weights_only=False)
        loaded = make(name, arguments, seed).train(training)
        loaded.load_state_dict(save(module.state_dict()))
        outputs = []
        for model in (module, copy.deepcopy(module), pickled, loaded):
            torch.manual_seed(0)
            outputs.append(patterns(model(x)))
        assert all(y == outputs[0] for y in outputs)


@each_module
def test_is_shown_as_torch_shows_it(name):
    for arguments, _ in samples(name):
        text = repr(getattr(nn, name)(*arguments.args, **arguments.kwargs))
        assert repr(make(name, arguments, None)) == str(make(name, arguments, None)) == text
        assert repr(make(name, arguments, SITE)) == f"{text[:-1]}, seed={SITE!r})"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@each_module
def test_knows_its_state_under_each_default_device(name, device):
    for arguments, x in samples(name):
        with torch.device(device):
            module = make(name, arguments, SITE)
        assert not any(buffer.is_floating_point() for buffer in module.buffers())
        assert module.calls == 0
        assert patterns(module(x)) == patterns(make(name, arguments, SITE)(x))


@each_seed
@each_module
def test_reads_training_in_each_call(name, seed):
    for info in entries(name):
        assert info.train_and_eval_differ
    for arguments, x in samples(name):
        module = make(name, arguments, seed)
        del module.training
        with pytest.raises(AttributeError, match="'training'"):
            module(x)


@each_seed
@each_module
def test_rejects_what_torch_rejects(name, seed):
    db = database()
    for info in entries(name):
        for error in (info.module_error_inputs_func or (lambda *_: []))(
            info, "cpu", torch.float32, False, True
        ):
            sample = error.module_error_input
            for build in (getattr(nn, name), partial(getattr(ours, name), seed=seed)):
                if error.error_on is db.ModuleErrorEnum.FORWARD_ERROR:
                    build = build(*sample.constructor_input.args)
                    call = partial(build, *sample.forward_input.args)
                else:
                    call = partial(build, *sample.constructor_input.args)
                with pytest.raises(error.error_type, match=error.error_regex):
                    call()


# --- Modules of PyTorch that contain dropout ------------------------------------------------------


class Specified(nn.Module):
    """Dropout by the core's portable path, on NumPy arrays."""

    def __init__(self, layer):
        super().__init__()
        self.p, self.seed, self.calls = layer.p, layer.seed, 0

    def forward(self, x):
        with unidrop.force_path("portable"):
            y = unidrop.dropout(x.detach().numpy(), self.p, self.seed.fold_in(self.calls))
        self.calls += 1
        return torch.from_numpy(y)


def replace(model, layer):
    """Replace each dropout module of a model by ``layer(it)``."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    for name in names:
        model.set_submodule(name, layer(model.get_submodule(name)))
    return model, len(names)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("name", CONTAINERS)
def test_replaces_dropout_in_modules_of_torch(name):
    (info,) = (info for info in database().module_db if info.module_cls is getattr(nn, name))
    torch.manual_seed(0)
    found = info.module_inputs_func(info, "cpu", torch.float32, False, True)
    for sample in found[::7]:  # the others differ in options of attention
        arguments, inputs = sample.constructor_input, sample.forward_input
        native = info.module_cls(*arguments.args, **arguments.kwargs)
        model, count = replace(copy.deepcopy(native), lambda layer: ours.Dropout(layer.p))
        assert count
        assign_seeds(model, 42)
        expected = native(*inputs.args, **inputs.kwargs)
        assert patterns(model(*inputs.args, **inputs.kwargs)) == patterns(expected)
        if sample.reference_fn is not None:
            reference = sample.reference_fn(model, *inputs.args, **inputs.kwargs)
            torch.testing.assert_close(expected, reference)
        for layer in model.modules():
            if isinstance(layer, ours.Dropout):
                layer.p = 0.5
        specified, _ = replace(copy.deepcopy(model), Specified)
        for _ in range(2):
            with torch.no_grad():
                y = specified(*inputs.args, **inputs.kwargs)
            assert patterns(model(*inputs.args, **inputs.kwargs)) == patterns(y)
