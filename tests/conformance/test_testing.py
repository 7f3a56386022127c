"""Test `parametrize_with_contracts` in the test suite of another package."""

import textwrap

import pytest

from unidrop import conformance, testing

CARELESS = """
import unidrop
from unidrop.conformance.backends.numpy import Numpy


class make(Numpy):
    name = "careless"

    def __init__(self):
        super().__init__()
        self.modes = ("eager",)

    def dropout(self, x, p, seed, step, *, mode, broadcast_axes=(), **options):
        return unidrop.dropout(x, p, unidrop.Key(seed).fold_in(step), **options)
"""

MODELESS = """
from unidrop.conformance.backends.numpy import Numpy


class make(Numpy):
    name = "modeless"

    def __init__(self):
        super().__init__()
        self.modes = ("eager",)
        self.missing_modes = {"graph": "no graphs"}

    def dtypes(self, mode):
        return {"eager": ("float16", "float64")}[mode]
"""


@pytest.fixture
def suite(install, pytester, monkeypatch):
    """Install a backend that ignores broadcast axes, and run a test module for it."""
    pytester.makeini("[pytest]")  # else pytest searches the folders above, perhaps our clone
    install("careless", CARELESS)
    for variable in ("UNIDROP_BACKENDS", "UNIDROP_SEED"):
        monkeypatch.delenv(variable, raising=False)

    def run(decorator, *arguments, body="cell.check()"):
        pytester.makepyfile(
            f"""
            from careless import make
            from unidrop.testing import parametrize_with_contracts

            @parametrize_with_contracts({decorator})
            def test_conforms(cell):
                {textwrap.indent(body, " " * 16).strip()}
            """
        )
        # In this process, since starting one takes longer. Each run would also reimport Hypothesis.
        plugins = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
        return pytester.runpytest_inprocess("-v", "-ra", *plugins, *arguments)

    return run


def test_names_an_item_for_each_contract_and_dtype(suite):
    result = suite("['careless'], contracts=['mask', 'output', 'broadcast-axes']")
    result.assert_outcomes(passed=7, failed=1)
    result.stdout.fnmatch_lines_random(
        [
            "*test_conforms[[]mask-careless-cpu-float32-eager[]] PASSED*",
            "*test_conforms[[]output-careless-cpu-float16-eager[]] PASSED*",
            "*test_conforms[[]broadcast-axes-careless-cpu-float32-eager[]] FAILED*",
        ]
    )


def test_accepts_an_unregistered_backend(suite):
    suite("[make()], contracts=['mask']").assert_outcomes(passed=1)


def test_skips_excluded_contracts_with_the_declared_reason(suite):
    result = suite("['careless'], contracts=['mask', 'layer-calls', 'layer-gradient']")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*test_conforms[[]layer-calls-careless-eager[]] SKIPPED*",
            "SKIPPED*NumPy has no layers",
        ]
    )


def test_filters_skipped_items_by_where(suite):
    decorator = "['careless'], where=lambda cell: cell.contract.name == 'mask'"
    suite(decorator).assert_outcomes(passed=1)


@pytest.mark.parametrize("attribute", ["device == 'cpu'", "dtype == 'float32'"])
def test_passes_device_and_dtype_of_skipped_items_to_where(suite, attribute):
    decorator = f"['careless'], contracts=['mask', 'layer-calls'], where=lambda c: c.{attribute}"
    suite(decorator).assert_outcomes(passed=1, skipped=1)


def test_passes_dtype_of_first_mode_to_where_for_missing_modes(suite, install):
    install("modeless", MODELESS)
    decorator = "['modeless'], contracts=['mask'], where=lambda cell: cell.dtype == 'float16'"
    result = suite(decorator)
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*mask-modeless-graph[]] SKIPPED*", "SKIPPED*no graphs"])


def test_shows_the_reason_of_an_expected_failure(suite):
    decorator = (
        "['careless'], contracts=['mask', 'broadcast-axes'], "
        "expected_failures={'broadcast-*': 'not yet, see issue 7'}"
    )
    result = suite(decorator, "-rx")
    outcomes = result.parseoutcomes()
    assert outcomes["xfailed"] == 1
    assert "failed" not in outcomes
    result.stdout.fnmatch_lines(["*not yet, see issue 7*"])


def test_fails_an_expected_failure_that_passes(suite):
    decorator = "['careless'], contracts=['mask'], expected_failures={'mask': 'not yet'}"
    suite(decorator).assert_outcomes(failed=1)


def test_rejects_an_expected_failure_without_an_item(suite):
    result = suite("['careless'], expected_failures={'maks': 'not yet'}")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*expected_failures must match contracts or items*maks*"])


@pytest.mark.parametrize("how", ["option", "variable"])
def test_selects_backends_by_option_or_variable(suite, monkeypatch, how):
    arguments = ["--unidrop-backend", "numpy"] if how == "option" else []
    if how == "variable":
        monkeypatch.setenv("UNIDROP_BACKENDS", "numpy,array-api-strict")
    result = suite("['careless', 'numpy'], contracts=['mask']", *arguments)
    result.assert_outcomes(passed=3)
    assert "careless-cpu" not in result.stdout.str()


@pytest.mark.parametrize("seed", ["-1", "abc"])
def test_rejects_an_invalid_seed(suite, monkeypatch, seed):
    monkeypatch.setenv("UNIDROP_SEED", seed)
    result = suite("['careless']")
    assert result.ret != 0
    result.stdout.fnmatch_lines([f"*seed must be in [[]0, 2[*][*]64), got '{seed}'*"])


@pytest.mark.parametrize("arguments", ["'careless'", "['careless'], contracts='careless'"])
def test_rejects_a_string_instead_of_a_list(suite, arguments):
    result = suite(arguments)
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*backends and contracts must be lists, got 'careless'*"])


def test_rejects_an_unknown_backend(suite):
    result = suite("['careless']", "--unidrop-backend", "carefull")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*backend must be one of*careless*got*carefull*"])


@pytest.mark.parametrize("how", ["option", "variable"])
def test_sets_the_seed_by_option_or_variable(suite, monkeypatch, how):
    arguments = ["--unidrop-seed", "7"] if how == "option" else []
    if how == "variable":
        monkeypatch.setenv("UNIDROP_SEED", "7")
    body = "assert cell.seed == 7\ncell.check()"
    suite("['careless'], contracts=['steps', 'rate']", *arguments, body=body).assert_outcomes(
        passed=2
    )


UNAVAILABLE = """
from unidrop.conformance import BackendUnavailableError


def make():
    raise BackendUnavailableError("no GPU")
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [(UNAVAILABLE, "no GPU"), ("import no_such_library", "no_such_library is not installed")],
    ids=["unavailable", "not installed"],
)
def test_skips_a_backend_that_cannot_run_as_one_item(suite, install, code, reason):
    install("absent", code)
    decorator = (
        "['careless', 'absent'], contracts=['mask'], where=lambda cell: cell.dtype == 'float32', "
        "expected_failures={'*-absent-*': 'not yet'}"
    )
    result = suite(decorator)
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*test_conforms[[]absent[]] SKIPPED*",
            f"SKIPPED*absent: {reason}",
        ]
    )


def test_skips_a_backend_that_an_option_names(suite, install):
    install("absent", UNAVAILABLE)
    result = suite("contracts=['mask']", "--unidrop-backend", "absent")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*test_conforms[[]absent[]] SKIPPED*"])


def test_ignores_a_missing_backend_that_nobody_names(install, monkeypatch):
    install("absent", UNAVAILABLE)
    monkeypatch.setattr(conformance, "backend_names", lambda: ["absent", "numpy"])
    assert [backend.name for backend in testing._load(set(), None)] == ["numpy"]


def test_rejects_a_broken_backend_with_its_error(suite, install):
    install("broken", "1 / 0")
    result = suite("['broken']")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*backend broken failed to load: ZeroDivisionError*"])


def test_imports_no_framework_without_decorated_tests(pytester):
    pytester.makeini("[pytest]")
    pytester.makepyfile(
        """
        import sys

        def test_modules():
            loaded = {name for name in sys.modules if name.startswith("unidrop")}
            assert not any(name in sys.modules for name in ("torch", "jax", "tensorflow"))
            assert "unidrop.conformance.contracts" not in loaded
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
