"""The command line, as a user types it."""

import ast
import json
import shlex
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from unidrop.cli import main
from unidrop.conformance import CONTRACTS, Result, check
from unidrop.conformance.compare import ContractError

ENCODER_AT_STEP_7 = ("--seed", "42", "--site", "encoder/0", "--step", "7", "--p", "0.5")


def run(*arguments):
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def careless(install):
    """Install a backend that accepts global_shape and start, and ignores them."""
    install(
        "careless",
        """
        import unidrop
        from unidrop.conformance.backends.numpy import Numpy


        class make(Numpy):
            name = "careless"

            def dropout(self, x, p, seed, step, *, mode, global_shape=None, start=None, **options):
                return unidrop.dropout(x, p, unidrop.Key(seed).fold_in(step), **options)
        """,
    )
    return "careless"


def test_exits_with_0_if_all_contracts_hold():
    result = run("conformance", "--backend", "numpy", "--table")
    assert result.exit_code == 0, result.output
    assert ", 0 failed" in result.output
    for name in CONTRACTS:
        assert name in result.output


def test_exits_with_1_and_explains_failures(careless):
    result = run("conformance", "--backend", careless, "--contract", "windows")
    assert result.exit_code == 1
    assert "0 passed, 3 failed" in result.output
    for word in ("promise", "expected", "actual", "cause      the window is ignored", "rerun"):
        assert word in result.output


def test_exits_with_1_if_nothing_applies():
    result = run("conformance", "--backend", "numpy", "--contract", "layer-calls", "--reasons")
    assert result.exit_code == 1
    assert "NumPy has no layers: layer-calls" in result.output
    assert "nothing was run: no chosen contract applies" in result.output


def test_raises_the_failure_by_reproduce_line(careless, tmp_path):
    path = tmp_path / "matrix.json"
    run("conformance", "--backend", careless, "--contract", "windows", "--json", str(path))
    cell = json.loads(path.read_text())["cells"][0]
    call = cell["reproduce"].partition("check(")[2].rpartition(")")[0]
    assert cell["reproduce"].startswith('python -c "from unidrop.conformance import check; ')
    with pytest.raises(ContractError):
        eval(f"check({call})", {"check": check})


def test_explains_the_failure_by_diff_line(careless, tmp_path):
    path = tmp_path / "matrix.json"
    run("conformance", "--backend", careless, "--contract", "windows", "--json", str(path))
    for cell in json.loads(path.read_text())["cells"]:
        command, *arguments = shlex.split(cell["diff"])
        assert command == "unidrop"
        result = run(*arguments)
        assert result.exit_code == 1
        assert result.output.startswith(f"careless, cpu, float32, {cell['mode']}: ")
        assert "this explains all of it: the window is ignored" in result.output


def test_runs_check_in_a_shell():
    code = "from unidrop.conformance import check; check('mask', 'numpy', device='cpu')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rejects_contracts_that_do_not_apply_in_check():
    with pytest.raises(ValueError, match=r"eager: NumPy has no layers"):
        check("layer-calls", "numpy")
    with pytest.raises(ValueError, match=r"mode=graph$"):
        check("mask", "numpy", mode="graph")


@pytest.mark.parametrize("name", ["mine", "it's mine", "`$HOME`", '"!!"', "ünï drop"])
def test_quotes_reproduce_line_for_a_shell(name):
    result = Result("mask", name, "cpu", "float32", "eager", "failed", 0)
    command, option, code = shlex.split(result.reproduce)
    assert (command, option) == ("python", "-c")
    call = ast.parse(code).body[-1].value
    assert [argument.value for argument in call.args] == ["mask", name]
    echoed = result.reproduce.replace("python -c", "printf %s")
    shell = subprocess.run(["sh", "-c", echoed], capture_output=True, text=True, check=True)
    assert shell.stdout == code


def test_prints_the_names_of_written_files(tmp_path):
    names = {name: tmp_path / f"matrix.{name}" for name in ("html", "json", "junit", "markdown")}
    files = [str(part) for name, path in names.items() for part in (f"--{name}", path)]
    output = run("conformance", "--backend", "numpy", "--contract", "mask", *files).output
    assert output.splitlines()[-4:] == [f"wrote {path}" for path in names.values()]


@pytest.mark.slow
def test_writes_all_cells_and_exclusions_to_json(tmp_path):
    path = tmp_path / "matrix.json"
    result = run("conformance", "--backend", "numpy", "--json", str(path))
    report = json.loads(path.read_text())
    assert f"{len(report['cells'])} passed" in result.output
    assert {cell["status"] for cell in report["cells"]} == {"passed"}
    assert {"layer-calls", "traces"} <= {missing["contract"] for missing in report["missing"]}
    assert report["stream"] == 1


def test_prints_promises_and_runs_nothing_with_list():
    result = run("conformance", "--list", "--backend", "numpy")
    assert result.exit_code == 0
    for contract in CONTRACTS.values():
        assert f"{contract.name}  {contract.promise}" in result.output
    assert "backends  numpy" in result.output
    assert "passed" not in result.output


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (("conformance", "--backend", "numpi"), "numpi"),
        (("conformance", "--contract", "masks"), "masks"),
        (("conformance", "--no-such-option"), "--no-such-option"),
        (("conformance", "--json", "no/such/folder/x.json"), "no/such/folder"),
        (("mask", "--seed", "-1", "--p", "0.5", "--shape", "4"), "seed"),
        (("mask", "--seed", "1", "--p", "1.5", "--shape", "4"), "1.5"),
        (("mask", "--seed", "1", "--p", "nan", "--shape", "4"), "nan"),
        (("mask", "--seed", "1", "--p", "0.5", "--shape", "4by8"), "4by8"),
        (("mask", "--seed", "1", "--p", "0.5", "--shape", "4x-8"), "-8"),
        (("mask", "--seed", "1", "--p", "0.5", "--shape", "4", "--step", "-3"), "-3"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_names_bad_arguments(arguments, mention):
    result = run(*arguments)
    assert result.exit_code == 2
    assert mention in result.output


def test_prints_the_specified_mask():
    result = run("mask", *ENCODER_AT_STEP_7, "--shape", "3x8")
    assert result.output.split() == ["10011001", "10001011", "01101100"]


def test_writes_key_to_json_of_mask():
    result = run("mask", *ENCODER_AT_STEP_7, "--shape", "1x8", "--json")
    assert json.loads(result.output) == {
        "stream": 1,
        "key": "4569f48a8d0f18c9",
        "p": 0.5,
        "shape": [1, 8],
        "keep": [[1, 0, 0, 1, 1, 0, 0, 1]],
    }


@pytest.mark.parametrize(("shape", "lines"), [("0", [""]), ("3x0", ["", "", ""]), ("2x1", None)])
def test_prints_a_line_for_each_row_of_mask(shape, lines):
    result = run("mask", "--seed", "1", "--p", "0.5", "--shape", shape)
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) == (len(lines) if lines else 2)


@pytest.mark.parametrize(
    "content",
    [b"PK\003\004garbage", b"\x93NUMPY\x01\x00\xa0\x0f" + b"(" * 4000],
    ids=["zip", "header"],
)
def test_exits_with_2_on_a_damaged_file(tmp_path, content):
    path = tmp_path / "damaged.npy"
    path.write_bytes(content)
    result = run("diff", str(path), "--seed", "42", "--p", "0.5")
    assert result.exit_code == 2, result.output
    assert "damaged.npy must be a .npy file" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "error", [MemoryError("1 TiB"), OSError(28, "No space left on device")], ids=["memory", "disk"]
)
def test_exits_with_2_if_the_system_refuses(monkeypatch, error):
    def refuse(text):
        raise error

    monkeypatch.setattr(click, "echo", refuse)
    with pytest.raises(click.UsageError, match=str(error.args[-1])) as caught:
        main.main(["mask", "--seed", "1", "--p", "0.5", "--shape", "3"], standalone_mode=False)
    assert caught.value.exit_code == 2


def test_exits_with_2_if_standard_output_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(click.UsageError, match="standard output must be open"):
        main.main(["conformance", "--list"], standalone_mode=False)
