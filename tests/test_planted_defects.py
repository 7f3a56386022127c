"""The matrix is tested too: each defect here is one that somebody makes, and must turn it red."""

import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import numpy as np
import pytest

import unidrop
from unidrop import Key, keep_mask
from unidrop.adapters.backends.numpy import Numpy
from unidrop.adapters.backends.torch import Torch
from unidrop.conformance import Cell, UnavailableBackend, cells, load_backends, run_cell
from unidrop.dtypes import dtype_name
from unidrop.window import Piece, Window

# As modules: the package's attributes of these names are the functions.
DROPOUT = sys.modules["unidrop.dropout"]
LIBRARY = sys.modules["unidrop.library"]
PHILOX = sys.modules["unidrop.philox"]


def failing_dtypes(backend, contract):
    results = [run_cell(cell) for cell in cells(backend, [contract]) if isinstance(cell, Cell)]
    assert results
    return {result.dtype for result in results if result.status == "failed"}


def portable(backend):
    """Return a backend without kernels, which would be compiled, and kept, with the defect."""
    backend.modes = ("eager",)
    return backend


@pytest.fixture(params=[Numpy, Torch], ids=["numpy", "torch"])
def backend(request):
    return portable(request.param())


@pytest.mark.parametrize("contract", ["mask", "generator", "output"])
def test_a_round_fewer_is_caught(backend, contract, monkeypatch):
    monkeypatch.setattr(PHILOX.philox, "__defaults__", (None, 9))
    assert failing_dtypes(backend, contract)


@pytest.mark.parametrize("contract", ["mask", "output"])
def test_another_multiplier_for_odd_elements_is_caught(backend, contract, monkeypatch):
    monkeypatch.setattr(PHILOX, "ODD_MULTIPLIER", 1)
    assert failing_dtypes(backend, contract)


def test_greater_for_greater_or_equal_is_caught(backend, monkeypatch):
    decide = LIBRARY.decide
    monkeypatch.setattr(
        LIBRARY, "decide", lambda xp, words, four, least: decide(xp, words, four, least + 1)
    )
    assert failing_dtypes(backend, "threshold")


def test_the_scale_in_the_arrays_own_dtype_is_caught(monkeypatch):
    monkeypatch.setattr(DROPOUT, "compute_dtype", lambda dtype, name="x": dtype_name(dtype))
    # On NumPy: PyTorch multiplies a float16 array by a Python number in float32 of its own accord.
    assert "float16" in failing_dtypes(portable(Numpy()), "output")


class Planted(Numpy):
    """NumPy's backend with a defect in its dropout."""

    def __init__(self, defect):
        self.defect = defect

    def dropout(self, x, p, seed, step, *, mode, **options):
        return self.defect(x, p, seed, step, **options)


def with_mask(x, keep, p):
    return np.where(keep, x / (1 - p), 0).astype(x.dtype)


def mask_by_memory_order(x, p, seed, step):
    key = Key(seed).fold_in(step)
    if x.flags.f_contiguous:
        return with_mask(x, keep_mask(x.shape[::-1], p, key).T, p)
    return unidrop.dropout(x, p, key)


def step_not_folded(x, p, seed, step, **options):
    return unidrop.dropout(x, p, Key(seed), **options)


def threshold_of_24_bits(x, p, seed, step, **options):
    p = min(round(p * 2**24), 2**24) / 2**24
    return unidrop.dropout(x, p, Key(seed).fold_in(step), **options)


def product_for_selection(x, p, seed, step, **options):
    keep = keep_mask(x.shape, p, Key(seed).fold_in(step))
    with np.errstate(all="ignore"):
        return (x * keep * np.asarray(1 / (1 - p) if p < 1 else 0, dtype=x.dtype)).astype(x.dtype)


def rounded_with_float64(x, p, seed, step, **options):
    y = unidrop.dropout(x, p, Key(seed).fold_in(step), **options)
    return y.astype(np.float64)


def active_in_evaluation(x, p, seed, step, *, training=True, **options):
    return unidrop.dropout(x, p, Key(seed).fold_in(step), **options)


def no_check_of_the_rate(x, p, seed, step, **options):
    try:
        return unidrop.dropout(x, p, Key(seed).fold_in(step), **options)
    except ValueError:
        return x


def local_indices_in_windows(x, p, seed, step, *, global_shape=None, start=None, **options):
    return unidrop.dropout(x, p, Key(seed).fold_in(step), **options)


@pytest.mark.parametrize(
    ("defect", "contract"),
    [
        (mask_by_memory_order, "layout"),
        (step_not_folded, "steps"),
        (threshold_of_24_bits, "threshold"),
        (product_for_selection, "dropped-is-zero"),
        (rounded_with_float64, "shape-dtype-device"),
        (active_in_evaluation, "nothing-to-drop"),
        (no_check_of_the_rate, "bad-rate"),
        (local_indices_in_windows, "windows"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_defect_is_caught_by_the_contract_that_names_it(defect, contract):
    assert failing_dtypes(Planted(defect), contract)


def test_a_gradient_with_a_fresh_mask_is_caught():
    class FreshMask(Torch):
        def gradient(self, x, upstream, p, seed, step, *, mode):
            return super().gradient(x, upstream, p, seed, step + 1, mode=mode)

    assert failing_dtypes(FreshMask(), "gradient")


def test_a_state_lost_on_load_is_caught(monkeypatch):
    monkeypatch.setattr("unidrop.adapters.backends.torch._Layer.load", lambda self, state: None)
    assert failing_dtypes(Torch(), "layer-resumes")


def test_a_call_counted_in_evaluation_is_caught(monkeypatch):
    from unidrop.adapters.backends.torch import _Layer

    def train_always(self, x, *, training):
        return self._module.train(True)(x)

    monkeypatch.setattr(_Layer, "__call__", train_always)
    assert failing_dtypes(Torch(), "layer-calls")


def test_the_sound_backend_fails_none_of_these_contracts(backend):
    results = [run_cell(cell) for cell in cells(backend) if isinstance(cell, Cell)]
    assert [str(result) for result in results if result.status == "failed"] == []


def test_a_piece_that_is_not_the_first_and_is_wrong_is_caught(backend, monkeypatch):
    pieces = Window.pieces

    def shifted(self, most):
        for number, (base, axes) in enumerate(pieces(self, most)):
            yield Piece(base + 8 * (number > 0), axes)

    monkeypatch.setattr(Window, "pieces", shifted)
    assert failing_dtypes(backend, "large-mask")


@pytest.mark.parametrize("contract", ["mask", "threshold", "windows", "output"])
def test_a_contract_with_nothing_to_compare_does_not_hold(contract):
    class TakesNoStep(Numpy):
        step_limit = 0

    assert failing_dtypes(TakesNoStep(), contract)


def test_layouts_that_are_none_are_caught():
    class NoLayouts(Numpy):
        def layouts(self, x):
            return {}

    assert failing_dtypes(NoLayouts(), "layout")


def raising(error):
    def make():
        raise error

    return make


def changed(**members):
    def init(self):
        Numpy.__init__(self)
        self.__dict__.update({name: m for name, m in members.items() if not callable(m)})

    return type("Changed", (Numpy,), {"name": "planted", **members, "__init__": init})


@pytest.mark.parametrize(
    ("make", "mention"),
    [
        (raising(SystemExit(0)), "SystemExit"),
        (raising(RuntimeError("boom")), "boom"),
        (dict, "lacks name, modes"),
        (changed(name="other"), "'other'"),
        (changed(modes=()), "a mode"),
        (changed(devices=()), "a device"),
        (changed(dtypes=lambda self, mode: ()), "a dtype"),
        (changed(dtypes=lambda self, mode: 1 / 0), "division by zero"),
        (changed(abilities=None), "abilities"),
        (changed(abilities={"window": None}), "but got ['window']"),
        (changed(abilities={"windows": ""}), "an empty reason"),
        (changed(abilities={"layer": None}), "there is no method layer"),
        (changed(modes=("eager", "eager")), "each mode once"),
        (changed(compiled_modes=("compiled",)), "compiled_modes has to name modes"),
        (changed(mode_limits={"comp": {}}), "mode_limits has to name modes"),
        (changed(missing_modes={"eager": "why"}), "missing_modes has to name other modes"),
    ],
    ids=[
        *("exits", "raises", "none", "name", "modes", "devices", "dtypes", "dtypes-raises"),
        *("able", "misspelt", "no reason", "no method", "modes twice", "compiled", "limits"),
        "missing",
    ],
)
def test_a_broken_backend_says_what_is_wrong_and_the_others_still_load(make, mention, monkeypatch):
    points = [
        EntryPoint("numpy", "unidrop.adapters.backends.numpy:Numpy", "unidrop.backends"),
        EntryPoint("planted", "planted:make", "unidrop.backends"),
    ]
    monkeypatch.setitem(sys.modules, "planted", SimpleNamespace(make=make))
    monkeypatch.setattr("unidrop.conformance.backend.entry_points", lambda group: points)
    numpy, planted = load_backends()
    assert isinstance(numpy, Numpy)
    assert isinstance(planted, UnavailableBackend)
    assert not planted.is_missing
    assert mention in planted.error
    assert "Traceback" in planted.details


def test_two_backends_of_one_name_are_refused(monkeypatch):
    numpy, torch = (f"unidrop.adapters.backends.{name}" for name in ("numpy:Numpy", "torch:Torch"))
    points = [EntryPoint("numpy", value, "unidrop.backends") for value in (numpy, torch)]
    monkeypatch.setattr("unidrop.conformance.backend.entry_points", lambda group: points)
    (backend,) = load_backends()
    assert isinstance(backend, UnavailableBackend)
    assert "several backends" in backend.error


def test_a_backend_whose_library_is_not_installed_is_no_failure(monkeypatch):
    points = [EntryPoint("absent", "planted:Backend", "unidrop.backends")]
    planted = SimpleNamespace(Backend=raising(ModuleNotFoundError("no", name="no_such_library")))
    monkeypatch.setitem(sys.modules, "planted", planted)
    monkeypatch.setattr("unidrop.conformance.backend.entry_points", lambda group: points)
    (backend,) = load_backends()
    assert isinstance(backend, UnavailableBackend)
    assert backend.is_missing


def test_a_dropout_that_exits_fails_its_cell_and_no_other(backend, monkeypatch):
    monkeypatch.setattr(type(backend), "dropout", lambda *arguments, **options: sys.exit(0))
    assert failing_dtypes(backend, "mask")
    assert not failing_dtypes(backend, "generator")


def test_an_error_of_the_wrong_type_is_said_to_be_one():
    def raises_anything(x, p, seed, step, **options):
        raise LookupError(f"no such rate as {p}")

    (cell,) = cells(Planted(raises_anything), ["bad-rate"])
    result = run_cell(cell)
    assert result.expected.startswith("ValueError that mentions '-0.1'")
    assert result.came == "LookupError('no such rate as -0.1')"
