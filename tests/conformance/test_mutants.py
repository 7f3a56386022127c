"""The matrix is tested too: each defect here is one that somebody makes, and must turn it red."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import mutant_backends as mutant
import numpy as np
import pytest
from click.testing import CliRunner

import unidrop
from unidrop.cli import main
from unidrop.conformance import (
    CONTRACTS,
    BackendNotRun,
    Cell,
    NotApplicable,
    cells,
    load_backends,
    run_cell,
)
from unidrop.conformance.backends.numpy import Numpy
from unidrop.conformance.backends.torch import Torch
from unidrop.conformance.contracts.dependence import RESTS_ON, roots
from unidrop.conformance.diagnosis.search import causes_of_masks, diagnose
from unidrop.conformance.golden import golden_masks, golden_outputs
from unidrop.window import Piece, Window

# What somebody gets wrong; a backend that does; the contract that names it; what a cell of it says.
DEFECTS = {
    "seven rounds": (
        mutant.SevenRounds,
        "generator",
        "the generator makes 7 rounds instead of 10",
    ),
    "odd elements not multiplied": (
        mutant.OddElementsNotMultiplied,
        "odd-elements",
        "odd elements take the word itself, and not its product with 0x6C078965",
    ),
    "words reversed": (
        mutant.WordsReversed,
        "word-order",
        "the words of a block are in reverse order",
    ),
    "> for >=": (
        mutant.GreaterForGreaterOrEqual,
        "threshold",
        "the comparison is u > T, and not u >= T",
    ),
    "threshold on 24 bits": (
        mutant.ThresholdOn24Bits,
        "threshold",
        "the threshold has 24 bits, and not 32",
    ),
    "float16 rounding of the scale": (
        mutant.ScaleRoundedToFloat16,
        "scale",
        "the scale is rounded to float16 before the product",
    ),
    "product rounded once": (
        mutant.ProductRoundedOnce,
        "scale",
        "the product with the float32 scale is rounded once, to float16",
    ),
    "multiply instead of select": (
        mutant.MultiplyForSelect,
        "dropped-is-zero",
        "dropped nan: [0.0 (0x0000), ",
    ),
    "step not folded": (
        mutant.StepNotFolded,
        "steps",
        "two masks for steps 0 and 1, actual the same one",
    ),
    "step narrowed to float32": (
        mutant.StepNarrowedToFloat32,
        "step-keys",
        "mask of step 16777217",
    ),
    "mask by memory order": (
        mutant.MaskByMemoryOrder,
        "layout",
        "elements are numbered in Fortran order",
    ),
    "mask in the wrong dtype": (
        mutant.MaskOfFloats,
        "mask-dtype",
        "dtype of the mask bool, actual float32",
    ),
    "state lost on load": (
        mutant.StateLostOnLoad,
        "layer-resumes",
        "calls 3, actual 0",
    ),
    "gradient with a fresh mask": (
        mutant.GradientWithFreshMask,
        "gradient-mask",
        "the step is 8, and not 7",
    ),
    "layer active in evaluation": (
        mutant.LayerActiveInEvaluation,
        "layer-evaluation",
        "x unchanged in evaluation",
    ),
    "layer traced with its first call's training": (
        mutant.LayerOfItsFirstCallsTraining,
        "layer-evaluation",
        "x unchanged in evaluation",
    ),
    "compiled gradient with a float16 scale": (
        mutant.CompiledGradientOfFloat16Scale,
        "gradient",
        "rounded to float16 before the product",
    ),
    "compiled product rounded once": (
        mutant.CompiledProductRoundedOnce,
        "output",
        "the product with the float32 scale is rounded once, to float16",
    ),
    "function active in evaluation": (
        mutant.FunctionActiveInEvaluation,
        "nothing-to-drop",
        "x unchanged",
    ),
    "output in the wrong dtype": (
        mutant.OutputOfFloat64,
        "shape-dtype-device",
        "dtype float16, actual float64",
    ),
    "rate not checked": (
        mutant.RateNotChecked,
        "bad-rate",
        "ValueError that mentions '-0.1'",
    ),
    "window numbered by itself": (
        mutant.WindowNumberedByItself,
        "windows",
        "the window is ignored",
    ),
    "broadcast axes ignored": (
        mutant.BroadcastAxesIgnored,
        "broadcast-axes",
        "each element has a decision of its own",
    ),
    "compiled once for all rates": (
        mutant.CompiledOnceForAllRates,
        "threshold",
        "mask 'threshold-",
    ),
    "compiled comparison of float32": (
        mutant.CompiledComparisonOfFloat32,
        "threshold",
        "mask 'threshold-",
    ),
    "compiled rows of windows rounded up": (
        mutant.CompiledRowsOfWindowsRoundedUp,
        "windows-tile",
        "the whole of shape",
    ),
    "traces not counted": (
        mutant.TracesNotCounted,
        "traces",
        "traces over 20 steps: 1, actual 0",
    ),
    "traced every step": (
        mutant.TracedEveryStep,
        "traces",
        "traces over 20 steps: 1, actual 20",
    ),
    "strings folded as integers": (
        mutant.StringsFoldedAsIntegers,
        "keys",
        "key of [{'str': ",
    ),
    "traced step sign-extended": (
        mutant.TracedStepSignExtended,
        "traced-key",
        "key ",
    ),
    "threshold kept below 2^32": (
        mutant.ThresholdKeptBelow2To32,
        "threshold-ends",
        "mask 'even-u-2^32-1-rate-1-2^-33-drops'",
    ),
    "returned mask inverted": (
        mutant.ReturnedMaskInverted,
        "returned-mask",
        "mask at p = 0.4, training = True",
    ),
    "integers not refused": (
        mutant.IntegersNotRefused,
        "bad-dtype",
        "that mentions 'int32', for p = 0.5 and x of int32, actual no error",
    ),
    "call that raises counted": (
        mutant.CallThatRaisesCounted,
        "layer-error",
        "calls 0, actual 1",
    ),
    "gradient of the latest call": (
        mutant.GradientOfTheLatestCall,
        "layer-gradient",
        "the step is 1, and not 0",
    ),
}

# These take most of the time, and name none of the defects.
LARGE = ("large-mask", "rate", "independence")


def failures(backend, contracts=()):
    results = [run_cell(cell) for cell in cells(backend, contracts) if isinstance(cell, Cell)]
    assert results
    return [result for result in results if result.status == "failed"]


def failing_dtypes(backend, contract):
    return {result.dtype for result in failures(backend, [contract])}


def test_the_sound_backend_is_green_in_every_contract():
    backend = mutant.Sound()
    assert [str(result) for result in failures(backend)] == []
    assert {cell.contract.name for cell in cells(backend) if isinstance(cell, Cell)} == {*CONTRACTS}


@pytest.mark.parametrize("before", ["shape-dtype-device", "gradient-mask", "steps", "output"])
def test_traces_may_be_asked_for_after_any_other_contract(before):
    assert failures(mutant.Sound(), [before, "traces", "layer-traces"]) == []


class Varied(mutant.Sound):
    """Its second compiled mode runs what the first does."""

    modes = ("eager", "compiled", "checkpoint")
    compiled_modes = ("compiled", "checkpoint")
    derived_modes = MappingProxyType({"checkpoint": "compiled"})


def test_a_variant_of_a_mode_is_compared_in_all_that_it_can_change():
    planned = [item for item in cells(Varied()) if item.mode == "checkpoint"]
    missing = {item.contract: item.reason for item in planned if isinstance(item, NotApplicable)}
    about_decisions = {
        name for name, contract in CONTRACTS.items() if not contract.in_derived_modes
    }
    assert missing == dict.fromkeys(
        about_decisions, "a variant of compiled, where this is compared"
    )
    compared = {item.contract.name for item in planned if isinstance(item, Cell)}
    assert compared == {*CONTRACTS} - about_decisions


def test_a_variant_is_compared_in_all_dtypes():
    planned = [item for item in cells(Varied(), ["output"]) if isinstance(item, Cell)]
    dtypes = {mode: [c.dtype for c in planned if c.mode == mode] for mode in Varied.modes}
    assert dtypes["checkpoint"] == dtypes["compiled"] == dtypes["eager"]


def test_a_variant_is_compared_in_what_the_other_mode_can_not_be_and_gives_its_own_reasons():
    class Limited(Varied):
        mode_exclusions = MappingProxyType(
            {"compiled": {"windows": "none yet"}, "checkpoint": {"threshold": "its own reason"}}
        )

    planned = [c for c in cells(Limited(), ["windows", "threshold"]) if c.mode == "checkpoint"]
    assert [str(item) for item in planned if isinstance(item, Cell)] == [
        "windows-sound-cpu-float32-checkpoint"
    ]
    reasons = {item.contract: item.reason for item in planned if isinstance(item, NotApplicable)}
    assert reasons == {"threshold": "its own reason"}


@pytest.mark.parametrize(
    "derived_modes",
    [
        {"eager": "compiled"},
        {"compiled": "eager"},
        {"checkpoint": "checkpoint"},
        {"other": "eager"},
    ],
    ids=["not compiled", "of none compiled", "of itself", "no mode"],
)
def test_variants_of_backends_that_are_no_entry_points_are_checked_too(derived_modes):
    class Odd(Varied):
        pass

    Odd.derived_modes = derived_modes
    ((mode, base),) = derived_modes.items()
    with pytest.raises(ValueError, match=f"but got '{mode}': '{base}'"):
        list(cells(Odd()))


@pytest.mark.parametrize(("backend", "contract", "tells"), DEFECTS.values(), ids=DEFECTS)
def test_a_defect_is_caught_by_the_contract_that_names_it_and_the_others_rest_on_that(
    backend, contract, tells
):
    failed = failures(backend(), [name for name in CONTRACTS if name not in LARGE])
    assert roots({result.contract for result in failed}) == [contract]
    (told, *_) = (result for result in failed if result.contract == contract)
    assert tells in f"{told.expected}, actual {told.actual}: {told.cause}"


def test_the_command_has_each_defect_of_installed_packages_in_its_contract(install, tmp_path):
    (tmp_path / "mutant_backends.py").write_text(Path(mutant.__file__).read_text())
    of_compiled = (
        mutant.CompiledComparisonOfFloat32,
        mutant.CompiledGradientOfFloat16Scale,
        mutant.CompiledOnceForAllRates,
        mutant.CompiledProductRoundedOnce,
        mutant.CompiledRowsOfWindowsRoundedUp,
        mutant.TracedEveryStep,
        mutant.TracesNotCounted,
    )
    told = [row for row in DEFECTS.values() if row[0] not in of_compiled]
    backends = [mutant.Sound, *(backend for backend, *_ in told)]
    for backend in backends:
        name = backend.__name__
        # In one mode only, for each of them is a process, and they take half a minute as it is.
        members = f"    name = {name!r}\n    modes, compiled_modes = ('eager',), ()"
        install(name, f"class make(__import__('mutant_backends').{name}):\n{members}")
    named = [part for backend in backends for part in ("--backend", backend.__name__)]
    chosen = {contract for _, contract, _ in told}
    named += [part for contract in chosen for part in ("--contract", contract)]
    result = CliRunner().invoke(main, ["conformance", *named])
    assert result.exit_code == 1
    red = {line.partition("-cpu-")[0] for line in result.output.splitlines() if line[:1] == "✗"}
    for backend, contract, tells in told:
        assert f"✗ {contract}-{backend.__name__}" in red
        assert tells.partition(", actual")[0] in result.output
    assert not any(line.endswith("-Sound") for line in red)


def test_what_contracts_rest_on_are_contracts_and_none_rests_on_itself():
    assert {*RESTS_ON, *(name for below in RESTS_ON.values() for name in below)} <= set(CONTRACTS)
    for name in CONTRACTS:
        assert len(roots([name, *RESTS_ON.get(name, ())])) >= 1
        assert roots([name]) == [name]


@pytest.mark.parametrize("golden", golden_masks(), ids=lambda golden: golden.name)
def test_any_mask_that_is_wrong_is_looked_into_without_an_error(golden):
    keep = np.broadcast_to(golden.keep, golden.shape)
    causes = causes_of_masks([(golden.recipe, ~keep), (golden.recipe, ~keep)])
    assert golden.keep.size == 0 or any("inverted" in cause for cause in causes)


@pytest.mark.parametrize("golden", golden_outputs(), ids=lambda golden: golden.name)
def test_any_output_that_is_wrong_is_looked_into_without_an_error(golden):
    diagnose(golden.recipe, golden.y[::-1], golden.x, pairs=False)
    diagnose(golden.recipe, golden.x, golden.x, pairs=False)


@pytest.fixture(params=[Numpy, Torch], ids=["numpy", "torch"])
def backend(request):
    """A backend without kernels, which would be compiled, and kept, with the defect."""
    backend = request.param()
    backend.modes = ("eager",)
    return backend


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


def test_a_backend_without_kernels_says_why_it_has_no_such_column():
    with unidrop.force_path("portable"):
        backends = Numpy(), Torch()
    for backend in backends:
        assert "fused" not in backend.modes
        assert backend.missing_modes["fused"] == "unidrop.force_path says so"
    assert "fused" not in Numpy().missing_modes


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

    return type("Changed", (Numpy,), {"name": "mutant", **members, "__init__": init})


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
        (changed(dtypes=("float64",)), "dtypes has to be a method of a mode, but got ('float64',)"),
        (changed(capabilities=None), "capabilities"),
        (changed(capabilities={"window": None}), "but got ['window']"),
        (changed(capabilities={"windows": ""}), "an empty reason"),
        (changed(capabilities={"layer": None}), "there is no method layer"),
        (changed(modes=("eager", "eager")), "each mode once"),
        (changed(compiled_modes=("compiled",)), "compiled_modes has to name modes"),
        (changed(mode_exclusions={"comp": {}}), "mode_exclusions has to name modes"),
        (changed(missing_modes={"eager": "why"}), "missing_modes has to name other modes"),
        (
            changed(derived_modes={"fit": "eager"}),
            "derived_modes has to map a compiled mode to one that",
        ),
    ],
    ids=[
        *("exits", "raises", "none", "name", "modes", "devices"),
        *("dtypes", "dtypes-raises", "dtypes-tuple"),
        *("able", "misspelt", "no reason", "no method", "modes twice", "compiled", "limits"),
        *("missing", "derived_modes"),
    ],
)
def test_a_broken_backend_says_what_is_wrong_and_the_others_still_load(make, mention, monkeypatch):
    points = [
        EntryPoint("numpy", "unidrop.conformance.backends.numpy:Numpy", "unidrop.backends"),
        EntryPoint("mutant", "mutant:make", "unidrop.backends"),
    ]
    monkeypatch.setitem(sys.modules, "mutant", SimpleNamespace(make=make))
    monkeypatch.setattr("unidrop.conformance.backend.entry_points", lambda group: points)
    numpy, mutant = load_backends()
    assert isinstance(numpy, Numpy)
    assert isinstance(mutant, BackendNotRun)
    assert not mutant.is_missing
    assert mention in mutant.error
    assert "Traceback" in mutant.details


def test_two_backends_of_one_name_are_refused(monkeypatch):
    numpy, torch = (
        f"unidrop.conformance.backends.{name}" for name in ("numpy:Numpy", "torch:Torch")
    )
    points = [EntryPoint("numpy", value, "unidrop.backends") for value in (numpy, torch)]
    monkeypatch.setattr("unidrop.conformance.backend.entry_points", lambda group: points)
    (backend,) = load_backends()
    assert isinstance(backend, BackendNotRun)
    assert "several backends" in backend.error


def test_a_backend_whose_library_is_not_installed_is_no_failure(monkeypatch):
    points = [EntryPoint("absent", "mutant:Backend", "unidrop.backends")]
    mutant = SimpleNamespace(Backend=raising(ModuleNotFoundError("no", name="no_such_library")))
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    monkeypatch.setattr("unidrop.conformance.backend.entry_points", lambda group: points)
    (backend,) = load_backends()
    assert isinstance(backend, BackendNotRun)
    assert backend.is_missing


def test_a_dropout_that_exits_fails_its_cell_and_no_other(backend, monkeypatch):
    monkeypatch.setattr(type(backend), "dropout", lambda *arguments, **options: sys.exit(0))
    assert failing_dtypes(backend, "mask")
    assert not failing_dtypes(backend, "generator")


def test_an_error_of_the_wrong_type_is_said_to_be_one():
    class RaisesAnything(Numpy):
        modes = ("eager",)

        def __init__(self):
            pass

        def dropout(self, x, p, seed, step, **options):
            raise LookupError(f"no such rate as {p}")

    (result,) = failures(RaisesAnything(), ["bad-rate"])
    assert result.expected.startswith("ValueError that mentions '-0.1'")
    assert result.actual == "LookupError('no such rate as -0.1')"
