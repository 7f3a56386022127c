"""Test that each mutant backend fails the contract that describes its defect."""

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
from unidrop.conformance.compare import differing
from unidrop.conformance.contracts.dependence import DEPENDENCIES, roots
from unidrop.conformance.diagnosis.search import diagnose, find_common_causes
from unidrop.conformance.golden import golden_masks, golden_outputs
from unidrop.window import Piece, Window

# Maps a defect to the mutant, the contract that must catch it, and a part of the evidence.
MUTANTS = {
    "seven rounds": (
        mutant.SevenRounds,
        "generator",
        "the generator runs 7 rounds instead of 10",
    ),
    "odd elements not multiplied": (
        mutant.OddElementsNotMultiplied,
        "odd-elements",
        "odd elements use the word itself instead of its product with 0x6C078965",
    ),
    "words reversed": (
        mutant.WordsReversed,
        "word-order",
        "the words of a block are in reverse order",
    ),
    "> instead of >=": (
        mutant.GreaterInsteadOfGreaterOrEqual,
        "threshold",
        "the comparison is u > T instead of u >= T",
    ),
    "threshold with 24 bits": (
        mutant.ThresholdWith24Bits,
        "threshold",
        "the threshold has 24 bits instead of 32",
    ),
    "scale rounded to float16": (
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
        mutant.MultiplyInsteadOfSelect,
        "dropped-is-zero",
        "dropped nan: [0.0 (0x0000), ",
    ),
    "step not folded in": (
        mutant.StepNotFoldedIn,
        "steps",
        "two masks for steps 0 and 1, got the same mask",
    ),
    "step rounded to float32": (
        mutant.StepRoundedToFloat32,
        "step-keys",
        "mask of step 16777217",
    ),
    "mask in memory order": (
        mutant.MaskInMemoryOrder,
        "layout",
        "elements are numbered in Fortran order",
    ),
    "mask in the wrong dtype": (
        mutant.FloatMask,
        "mask-dtype",
        "dtype of the mask bool, got float32",
    ),
    "state lost on load": (
        mutant.StateLostOnLoad,
        "layer-resumes",
        "calls 3, got 0",
    ),
    "gradient with a fresh mask": (
        mutant.GradientWithFreshMask,
        "gradient-mask",
        "the step is 8 instead of 7",
    ),
    "layer active in evaluation": (
        mutant.LayerActiveInEvaluation,
        "layer-evaluation",
        "x unchanged in evaluation",
    ),
    "layer freezes training at its first call": (
        mutant.LayerFreezesTraining,
        "layer-evaluation",
        "x unchanged in evaluation",
    ),
    "compiled gradient with a float16 scale": (
        mutant.CompiledGradientWithFloat16Scale,
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
        mutant.Float64Output,
        "shape-dtype-device",
        "dtype float16, got float64",
    ),
    "rate not validated": (
        mutant.RateNotValidated,
        "bad-rate",
        "ValueError that contains '-0.1'",
    ),
    "window indexed locally": (
        mutant.WindowIndexedLocally,
        "windows",
        "the window is ignored",
    ),
    "broadcast axes ignored": (
        mutant.BroadcastAxesIgnored,
        "broadcast-axes",
        "the broadcast axes are ignored",
    ),
    "compiled once for all rates": (
        mutant.CompiledOnceForAllRates,
        "threshold",
        "mask 'threshold-",
    ),
    "compiled comparison in float32": (
        mutant.CompiledFloat32Comparison,
        "threshold",
        "mask 'threshold-",
    ),
    "compiled rows of windows padded": (
        mutant.CompiledWindowRowsPadded,
        "windows-tile",
        "tiled mask of shape",
    ),
    "traces not counted": (
        mutant.TracesNotCounted,
        "traces",
        "traces over 20 steps: 1, got 0",
    ),
    "retraced every step": (
        mutant.RetracedEveryStep,
        "traces",
        "traces over 20 steps: 1, got 20",
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
    "threshold clipped below 2^32": (
        mutant.ThresholdClippedBelow2To32,
        "threshold-ends",
        "mask 'even-u-2^32-1-rate-1-2^-33-drops'",
    ),
    "returned mask inverted": (
        mutant.ReturnedMaskInverted,
        "returned-mask",
        "mask at p = 0.4, training = True",
    ),
    "integers accepted": (
        mutant.IntegersAccepted,
        "bad-dtype",
        "that contains 'int32', for p = 0.5 and x of int32, got no error",
    ),
    "raising call counted": (
        mutant.RaisingCallCounted,
        "layer-error",
        "calls 0, got 1",
    ),
    "gradient uses the latest call": (
        mutant.GradientUsesLatestCall,
        "layer-gradient",
        "the step is 1 instead of 0",
    ),
    "paths dropped by element": (
        mutant.PathsDroppedByElement,
        "family-drop-path",
        "golden output 'drop_path-",
    ),
    "paths scaled always": (
        mutant.PathsScaledAlways,
        "family-drop-path",
        "golden output 'drop_path-",
    ),
    "alpha dropout fills with 0": (
        mutant.AlphaFilledWithZero,
        "family-alpha-dropout",
        "golden output 'alpha_dropout-",
    ),
    "alpha dropout by one product and one sum": (
        mutant.AlphaWithOneProductAndSum,
        "family-alpha-dropout",
        "golden output 'alpha_dropout-",
    ),
    "channels dropped by element": (
        mutant.ChannelsDroppedByElement,
        "family-feature-alpha-dropout",
        "golden output 'feature_alpha_dropout-",
    ),
    "scores filled with NaN": (
        mutant.ScoresFilledWithNan,
        "family-drop-key",
        "[-inf (0xfc00)",
    ),
    "locked along the wrong axis": (
        mutant.LockedAlongWrongAxis,
        "family-locked-dropout",
        "golden output 'locked_dropout-",
    ),
    "blocks too small by one": (
        mutant.BlocksTooSmall,
        "family-drop-block",
        "golden output 'drop_block-",
    ),
    "blocks scaled by the rate": (
        mutant.BlocksScaledByRate,
        "family-drop-block",
        "golden output 'drop_block-",
    ),
    "permutations in descending order": (
        mutant.PermutationsDescending,
        "family-patch-dropout",
        "golden output 'patch_dropout-",
    ),
    "permutations with equal words reversed": (
        mutant.PermutationsReverseTies,
        "family-patch-dropout",
        "golden output 'patch_dropout-float32: p 0.01, ",
    ),
    "Gaussian dropout with the words of masks": (
        mutant.GaussianDropoutOfWordsOfMasks,
        "family-gaussian-dropout",
        "golden output 'gaussian_dropout-",
    ),
    "noise with the opposite sign": (
        mutant.NoiseNegated,
        "family-gaussian-noise",
        "golden output 'gaussian_noise-",
    ),
    "gradient of a member without its scale": (
        mutant.MemberGradientWithoutScale,
        "family-gradient",
        "gradient of {'member': 'alpha_dropout'}",
    ),
    "gradient of Gaussian dropout without factors": (
        mutant.GradientOfGaussianDropoutIsUpstream,
        "family-gradient",
        "gradient of {'member': 'gaussian_dropout'}",
    ),
    "gradient of patches in another order": (
        mutant.GradientOfPatchesUnsorted,
        "family-gradient",
        "gradient of {'member': 'patch_dropout', 'num_prefix_tokens': 1",
    ),
    "attention with queries and keys swapped": (
        mutant.AttentionQueriesAndKeysSwapped,
        "attention-mask",
        "elements are numbered in memory order, with axes in the order (0, 1, 3, 2)",
    ),
    "attention with heads before the batch": (
        mutant.AttentionHeadsBeforeBatch,
        "attention-mask",
        "elements are numbered in memory order, with axes in the order (1, 0, 2, 3)",
    ),
    "attention drops scores": (
        mutant.AttentionScoresDropped,
        "attention-mask",
        "mask of 4 heads in 1 groups, 8 queries and 27 keys, step 3",
    ),
    "attention normalizes after dropping": (
        mutant.AttentionScoresMasked,
        "attention-output",
        "output of 4 heads in 2 groups, 11 queries and 64 keys, causal",
    ),
    "attention multiplies by 1 - p": (
        mutant.AttentionMultipliedByRate,
        "attention-output",
        "output of 4 heads in 2 groups, 11 queries and 64 keys, causal",
    ),
    "attention keeps with probability p": (
        mutant.AttentionKeepsRate,
        "attention-mask",
        "p is used as the probability of keeping",
    ),
    "attention pads the keys of the mask": (
        mutant.AttentionKeysPadded,
        "attention-mask",
        "rows are padded to a multiple of 8 elements",
    ),
    "attention restarts the mask in each tile": (
        mutant.AttentionTilesRestart,
        "attention-mask",
        "each tile of 16 elements of a row is numbered like a whole array",
    ),
    "attention windows indexed locally": (
        mutant.AttentionWindowIndexedLocally,
        "attention-windows",
        "mask of the window",
    ),
    "attention gradient with a fresh mask": (
        mutant.AttentionGradientWithFreshMask,
        "attention-gradient",
        "gradient of queries",
    ),
}

# These contracts take most of the time and describe none of the mutants.
LARGE = ("large-mask", "rate", "independence")


def failures(backend, contracts=()):
    results = [run_cell(cell) for cell in cells(backend, contracts) if isinstance(cell, Cell)]
    assert results
    return [result for result in results if result.status == "failed"]


def failing_dtypes(backend, contract):
    return {result.dtype for result in failures(backend, [contract])}


def test_passes_the_correct_backend_in_every_contract():
    backend = mutant.Correct()
    assert [str(result) for result in failures(backend)] == []
    assert {cell.contract.name for cell in cells(backend) if isinstance(cell, Cell)} == {*CONTRACTS}


@pytest.mark.parametrize("before", ["shape-dtype-device", "gradient-mask", "steps", "output"])
def test_counts_traces_after_any_other_contract(before):
    assert failures(mutant.Correct(), [before, "traces", "layer-traces"]) == []


class Derived(mutant.Correct):
    """The second compiled mode wraps the first."""

    modes = ("eager", "compiled", "checkpoint")
    compiled_modes = ("compiled", "checkpoint")
    derived_modes = MappingProxyType({"checkpoint": "compiled"})


def test_skips_only_contracts_on_decisions_in_derived_modes():
    planned = [item for item in cells(Derived()) if item.mode == "checkpoint"]
    skipped = {item.contract for item in planned if isinstance(item, NotApplicable)}
    on_decisions = {name for name, contract in CONTRACTS.items() if not contract.in_derived_modes}
    assert skipped == on_decisions
    run = {item.contract.name for item in planned if isinstance(item, Cell)}
    assert run == {*CONTRACTS} - on_decisions


def test_runs_derived_modes_with_all_dtypes():
    planned = [item for item in cells(Derived(), ["output"]) if isinstance(item, Cell)]
    dtypes = {mode: [c.dtype for c in planned if c.mode == mode] for mode in Derived.modes}
    assert dtypes["checkpoint"] == dtypes["compiled"] == dtypes["eager"]


def test_skips_members_with_the_reason_of_the_backend():
    class Few(mutant.Correct):
        members = MappingProxyType(
            {"drop_path": None, "drop_key": None, "drop_block": "the kernel has no blocks"}
        )
        mode_exclusions = MappingProxyType({"compiled": {"drop_key": "not compiled yet"}})

        def drop_member(self, x, *arguments, member, **options):
            assert member in ("drop_path", "drop_key")
            return super().drop_member(x, *arguments, member=member, **options)

    contracts = ["family-drop-path", "family-drop-key", "family-drop-block", "family-gradient"]
    assert failures(Few(), [*contracts, "family-gaussian-noise"]) == []
    planned = list(cells(Few(), [*contracts, "family-gaussian-noise"]))
    skipped = {(i.contract, i.mode): i.reason for i in planned if isinstance(i, NotApplicable)}
    assert skipped == {
        ("family-drop-key", "compiled"): "not compiled yet",
        **{("family-drop-block", m): "the kernel has no blocks" for m in Few.modes},
        **{
            ("family-gaussian-noise", m): "the member gaussian_noise is not declared"
            for m in Few.modes
        },
    }


def test_runs_contracts_that_only_the_wrapped_mode_excludes():
    class Limited(Derived):
        mode_exclusions = MappingProxyType(
            {"compiled": {"windows": "none yet"}, "checkpoint": {"threshold": "its own reason"}}
        )

    planned = [c for c in cells(Limited(), ["windows", "threshold"]) if c.mode == "checkpoint"]
    assert [str(item) for item in planned if isinstance(item, Cell)] == [
        "windows-correct-cpu-float32-checkpoint"
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
    ids=["not compiled", "wraps an eager mode", "wraps itself", "unknown mode"],
)
def test_validates_derived_modes_of_unregistered_backends(derived_modes):
    class Invalid(Derived):
        pass

    Invalid.derived_modes = derived_modes
    ((mode, base),) = derived_modes.items()
    with pytest.raises(ValueError, match=f"got '{mode}': '{base}'"):
        list(cells(Invalid()))


@pytest.mark.parametrize(("backend", "contract", "evidence"), MUTANTS.values(), ids=MUTANTS)
def test_catches_a_mutant_in_its_contract_and_dependent_ones(backend, contract, evidence):
    failed = failures(backend(), [name for name in CONTRACTS if name not in LARGE])
    assert roots({result.contract for result in failed}) == [contract]
    (first, *_) = (result for result in failed if result.contract == contract)
    assert evidence in f"{first.expected}, got {first.actual}: {first.cause}"


@pytest.mark.slow
def test_catches_installed_mutants_on_the_command_line(install, tmp_path):
    (tmp_path / "mutant_backends.py").write_text(Path(mutant.__file__).read_text())
    compiled = (
        mutant.CompiledFloat32Comparison,
        mutant.CompiledGradientWithFloat16Scale,
        mutant.CompiledOnceForAllRates,
        mutant.CompiledProductRoundedOnce,
        mutant.CompiledWindowRowsPadded,
        mutant.RetracedEveryStep,
        mutant.TracesNotCounted,
    )
    rows = [row for row in MUTANTS.values() if row[0] not in compiled]
    rows = [row for row in rows if not row[1].startswith("attention")]  # to save time
    backends = [mutant.Correct, *(backend for backend, *_ in rows)]
    for backend in backends:
        name = backend.__name__
        # One mode only, since each backend is a process and all of them take half a minute.
        members = f"    name = {name!r}\n    modes, compiled_modes = ('eager',), ()"
        install(name, f"class make(__import__('mutant_backends').{name}):\n{members}")
    options = [part for backend in backends for part in ("--backend", backend.__name__)]
    contracts = {contract for _, contract, _ in rows}
    options += [part for contract in contracts for part in ("--contract", contract)]
    result = CliRunner().invoke(main, ["conformance", *options])
    assert result.exit_code == 1
    red = {line.partition("-cpu-")[0] for line in result.output.splitlines() if line[:1] == "✗"}
    for backend, contract, evidence in rows:
        assert f"✗ {contract}-{backend.__name__}" in red
        assert evidence.partition(", got")[0] in result.output
    assert not any(line.endswith("-Correct") for line in red)


def test_has_dependencies_without_cycles():
    dependencies = {name for names in DEPENDENCIES.values() for name in names}
    assert {*DEPENDENCIES, *dependencies} <= set(CONTRACTS)
    for name in CONTRACTS:
        assert len(roots([name, *DEPENDENCIES.get(name, ())])) >= 1
        assert roots([name]) == [name]


@pytest.mark.parametrize("golden", golden_masks(), ids=lambda golden: golden.name)
def test_diagnoses_any_inverted_golden_mask(golden):
    keep = np.broadcast_to(golden.keep, golden.shape)
    causes = find_common_causes([(golden.model, ~keep), (golden.model, ~keep)])
    assert golden.keep.size == 0 or any("inverted" in cause for cause in causes)


@pytest.mark.parametrize("golden", golden_outputs(), ids=lambda golden: golden.name)
def test_diagnoses_a_golden_output_unless_it_conforms(golden):
    for y in (golden.y, golden.y[::-1], golden.x):
        conforms = differing(y, golden.y, golden.x).size == 0
        assert (diagnose(golden.model, y, golden.x, pairs=False) is None) == conforms


@pytest.fixture(params=[Numpy, Torch], ids=["numpy", "torch"])
def backend(request):
    """A backend without kernels, since compiled kernels would lack the defect."""
    backend = request.param()
    backend.modes = ("eager",)
    return backend


def test_catches_a_wrong_piece_after_the_first(backend, monkeypatch):
    pieces = Window.pieces

    def shifted(self, most):
        for number, (base, axes) in enumerate(pieces(self, most)):
            yield Piece(base + 8 * (number > 0), axes)

    monkeypatch.setattr(Window, "pieces", shifted)
    assert failing_dtypes(backend, "large-mask")


@pytest.mark.parametrize("contract", ["mask", "threshold", "windows", "output"])
def test_fails_a_contract_without_vectors_to_compare(contract):
    class TakesNoStep(Numpy):
        step_limit = 0

    assert failing_dtypes(TakesNoStep(), contract)


def test_gives_the_reason_for_a_missing_fused_mode():
    with unidrop.force_path("portable"):
        backends = Numpy(), Torch()
    for backend in backends:
        assert "fused" not in backend.modes
        assert backend.missing_modes["fused"] == "unidrop.force_path forces it"
    assert "fused" not in Numpy().missing_modes


def test_fails_a_backend_without_layouts():
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

    return type("Changed", (Numpy,), {"name": "broken", **members, "__init__": init})


@pytest.mark.parametrize(
    ("make", "mention"),
    [
        (raising(SystemExit(0)), "SystemExit"),
        (raising(RuntimeError("boom")), "boom"),
        (dict, "{} lacks name, modes"),
        (changed(name="other"), "name must be 'broken', as the entry point, got 'other'"),
        (changed(modes=()), "modes must not be empty, got ()"),
        (changed(devices=()), "devices must not be empty, got ()"),
        (changed(dtypes=lambda self, mode: ()), "dtypes('eager') must not be empty, got ()"),
        (changed(dtypes=lambda self, mode: 1 / 0), "division by zero"),
        (
            changed(dtypes=("float64",)),
            "dtypes must be a method with one argument, got ('float64',)",
        ),
        (changed(capabilities=None), "capabilities must be a mapping, got None"),
        (changed(capabilities={"window": None}), "got ['window']"),
        (changed(capabilities={"windows": ""}), "must be None or a reason, got ''"),
        (changed(members={"drop_paths": None}), "members must be among drop_path, alpha_dropout"),
        (changed(members={"drop_path": ""}), "members['drop_path'] must be None or a reason"),
        (changed(capabilities={"layer": None}), "has no method layer"),
        (changed(modes=("eager", "eager")), "modes must be unique, got ('eager', 'eager')"),
        (changed(compiled_modes=("compiled",)), "compiled_modes must be among ('eager',"),
        (changed(mode_exclusions={"comp": {}}), "mode_exclusions must be among ('eager',"),
        (changed(missing_modes={"eager": "why"}), "missing_modes must not be among ('eager',"),
        (
            changed(derived_modes={"fit": "eager"}),
            "derived_modes must map a compiled mode to a compiled mode that is not derived",
        ),
    ],
    ids=[
        *("exits", "raises", "not a backend", "name", "modes", "devices"),
        *("dtypes", "dtypes-raises", "dtypes-tuple"),
        *("capabilities", "misspelled", "no reason", "other member", "member without reason"),
        *("no method", "duplicate modes"),
        *("compiled_modes", "mode_exclusions", "missing_modes", "derived_modes"),
    ],
)
def test_names_the_defect_of_a_broken_backend_and_loads_others(make, mention, monkeypatch):
    points = [
        EntryPoint("broken", "broken:make", "unidrop.backends"),
        EntryPoint("numpy", "unidrop.conformance.backends.numpy:Numpy", "unidrop.backends"),
    ]
    monkeypatch.setitem(sys.modules, "broken", SimpleNamespace(make=make))
    monkeypatch.setattr("unidrop.conformance.backend.entry_points", lambda group: points)
    broken, numpy = load_backends()
    assert isinstance(numpy, Numpy)
    assert isinstance(broken, BackendNotRun)
    assert not broken.is_missing
    assert mention in broken.error
    assert "Traceback" in broken.details


def test_rejects_two_backends_with_one_name(monkeypatch):
    numpy, torch = (
        f"unidrop.conformance.backends.{name}" for name in ("numpy:Numpy", "torch:Torch")
    )
    points = [EntryPoint("numpy", value, "unidrop.backends") for value in (numpy, torch)]
    monkeypatch.setattr("unidrop.conformance.backend.entry_points", lambda group: points)
    (backend,) = load_backends()
    assert isinstance(backend, BackendNotRun)
    assert "the name must belong to one backend, got ['unidrop" in backend.error


@pytest.mark.parametrize(
    ("library", "error"),
    [("no_such_library", "no_such_library is not installed"), ("absent", "not installed")],
)
def test_does_not_fail_a_backend_whose_library_is_missing(monkeypatch, library, error):
    points = [EntryPoint("absent", "module:Backend", "unidrop.backends")]
    module = SimpleNamespace(Backend=raising(ModuleNotFoundError("no", name=library)))
    monkeypatch.setitem(sys.modules, "module", module)
    monkeypatch.setattr("unidrop.conformance.backend.entry_points", lambda group: points)
    (backend,) = load_backends()
    assert isinstance(backend, BackendNotRun)
    assert backend.is_missing
    assert backend.error == error


def test_fails_only_the_cell_of_a_dropout_that_exits(backend, monkeypatch):
    monkeypatch.setattr(type(backend), "dropout", lambda *arguments, **options: sys.exit(0))
    assert failing_dtypes(backend, "mask")
    assert not failing_dtypes(backend, "generator")


def test_reports_an_error_of_the_wrong_type():
    class RaisesAnything(Numpy):
        modes = ("eager",)

        def __init__(self):
            pass

        def dropout(self, x, p, seed, step, **options):
            raise LookupError(f"no such rate as {p}")

    (result,) = failures(RaisesAnything(), ["bad-rate"])
    assert result.expected.startswith("ValueError that contains '-0.1'")
    assert result.actual == "LookupError('no such rate as -0.1')"
