"""The matrix in somebody else's test suite."""

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
        self.missing_modes = {"graph": "there are no graphs"}

    def dtypes(self, mode):
        return {"eager": ("float16", "float64")}[mode]
"""


@pytest.fixture
def suite(install, pytester, monkeypatch):
    """Run a test module of the package of a backend that is not quite right."""
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
        return pytester.runpytest_subprocess("-v", "-ra", "-p", "no:cacheprovider", *arguments)

    return run


def test_each_contract_and_dtype_is_an_item_named_as_in_the_matrix(suite):
    result = suite("['careless'], contracts=['mask', 'output', 'broadcast-axes']")
    result.assert_outcomes(passed=7, failed=1)
    result.stdout.fnmatch_lines_random(
        [
            "*test_conforms[[]mask-careless-cpu-float32-eager[]] PASSED*",
            "*test_conforms[[]output-careless-cpu-float16-eager[]] PASSED*",
            "*test_conforms[[]broadcast-axes-careless-cpu-float32-eager[]] FAILED*",
        ]
    )


def test_a_backend_that_is_not_registered_can_be_given_itself(suite):
    suite("[make()], contracts=['mask']").assert_outcomes(passed=1)


def test_what_does_not_apply_is_skipped_with_the_reason_that_is_declared(suite):
    result = suite("['careless'], contracts=['mask', 'layer-calls', 'layer-gradient']")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*test_conforms[[]layer-calls-careless-eager[]] SKIPPED*",
            "SKIPPED*NumPy has functions, and no layers",
        ]
    )


def test_what_does_not_apply_is_no_item_where_the_cell_is_not_wanted(suite):
    decorator = "['careless'], where=lambda cell: cell.contract.name == 'mask'"
    suite(decorator).assert_outcomes(passed=1)


@pytest.mark.parametrize("attribute", ["device == 'cpu'", "dtype == 'float32'"])
def test_what_does_not_apply_is_asked_for_with_a_device_and_a_dtype(suite, attribute):
    decorator = f"['careless'], contracts=['mask', 'layer-calls'], where=lambda c: c.{attribute}"
    suite(decorator).assert_outcomes(passed=1, skipped=1)


def test_a_mode_that_is_missing_is_asked_for_with_a_dtype_of_the_first_mode(suite, install):
    install("modeless", MODELESS)
    decorator = "['modeless'], contracts=['mask'], where=lambda cell: cell.dtype == 'float16'"
    result = suite(decorator)
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*mask-modeless-graph[]] SKIPPED*", "SKIPPED*there are no graphs"])


def test_a_failure_that_is_expected_is_no_failure_and_its_reason_is_shown(suite):
    decorator = (
        "['careless'], contracts=['mask', 'broadcast-axes'], "
        "expected_failures={'broadcast-*': 'not yet, see issue 7'}"
    )
    result = suite(decorator, "-rx")
    outcomes = result.parseoutcomes()
    assert outcomes["xfailed"] == 1
    assert "failed" not in outcomes
    result.stdout.fnmatch_lines(["*not yet, see issue 7*"])


def test_an_expected_failure_that_passes_is_a_failure(suite):
    decorator = "['careless'], contracts=['mask'], expected_failures={'mask': 'not yet'}"
    suite(decorator).assert_outcomes(failed=1)


def test_an_expected_failure_that_is_no_item_is_an_error(suite):
    result = suite("['careless'], expected_failures={'maks': 'not yet'}")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*expected_failures has to name contracts or items*maks*"])


@pytest.mark.parametrize("how", ["option", "variable"])
def test_backends_are_chosen_by_an_option_or_a_variable(suite, monkeypatch, how):
    arguments = ["--unidrop-backend", "numpy"] if how == "option" else []
    if how == "variable":
        monkeypatch.setenv("UNIDROP_BACKENDS", "numpy,array-api-strict")
    result = suite("['careless', 'numpy'], contracts=['mask']", *arguments)
    result.assert_outcomes(passed=2)
    assert "careless-cpu" not in result.stdout.str()


@pytest.mark.parametrize("seed", ["-1", "abc"])
def test_a_seed_that_is_none_is_an_error(suite, monkeypatch, seed):
    monkeypatch.setenv("UNIDROP_SEED", seed)
    result = suite("['careless']")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*the seed has to be 0 <= seed < 2[*][*]64*"])


def test_a_name_that_is_given_as_a_string_is_an_error(suite):
    result = suite("'careless'")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*backends and contracts have to be lists*careless*"])


def test_a_choice_that_names_no_backend_is_an_error(suite):
    result = suite("['careless']", "--unidrop-backend", "carefull")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*backend has to be one of*careless*carefull*"])


@pytest.mark.parametrize("how", ["option", "variable"])
def test_the_seed_is_chosen_by_an_option_or_a_variable(suite, monkeypatch, how):
    arguments = ["--unidrop-seed", "7"] if how == "option" else []
    if how == "variable":
        monkeypatch.setenv("UNIDROP_SEED", "7")
    body = "assert cell.seed == 7\ncell.check()"
    suite("['careless'], contracts=['steps', 'rate']", *arguments, body=body).assert_outcomes(
        passed=2
    )


UNTESTED = """
from unidrop.conformance import BackendUnavailableError


def make():
    raise BackendUnavailableError("there is no GPU")
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [(UNTESTED, "there is no GPU"), ("import no_such_library", "*no_such_library*")],
    ids=["unavailable", "not installed"],
)
def test_a_backend_that_can_not_be_run_here_is_one_skipped_item_with_the_reason(
    suite, install, code, reason
):
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
            f"SKIPPED*backend absent can't be run here: {reason}",
        ]
    )


def test_a_backend_that_can_not_be_run_here_is_an_item_where_the_options_name_it(suite, install):
    install("absent", UNTESTED)
    result = suite("contracts=['mask']", "--unidrop-backend", "absent")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*test_conforms[[]absent[]] SKIPPED*"])


def test_a_backend_that_can_not_be_run_here_is_no_item_where_nobody_names_it(install, monkeypatch):
    install("absent", UNTESTED)
    monkeypatch.setattr(conformance, "backend_names", lambda: ["absent", "numpy"])
    assert [backend.name for backend in testing._loaded(set(), None)] == ["numpy"]


def test_a_backend_that_is_broken_is_an_error_that_says_why(suite, install):
    install("broken", "1 / 0")
    result = suite("['broken']")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*backend broken could not be loaded: ZeroDivisionError*"])


def test_pytest_without_such_tests_imports_nothing_of_unidrop(pytester):
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
