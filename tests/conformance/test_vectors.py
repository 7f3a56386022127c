"""Test the golden vectors that `unidrop vectors` writes, and the C program that reads them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner

from unidrop.cli import main

CHECK = Path(__file__).resolve().parents[2] / "examples" / "c" / "check.c"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new") / "nested folder"
    result = CliRunner().invoke(main, ["vectors", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    assert [Path(line).name for line in result.output.splitlines()] == [
        *("README.md", "schema.json", "vectors.json")
    ]
    return folder


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_accepts_the_vectors_by_schema(written):
    schema = read(written / "schema.json")
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(read(written / "vectors.json"), schema)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("masks", "keep", "102"),
        ("outputs", "dtype", "int8"),
        ("keys", "key", "2a"),
        ("attention", "y", ["0"]),
        ("permutations", "indices", [-1]),
        ("members", "options", {"p": 1.5}),
        (None, "", 2),
    ],
)
def test_rejects_an_invalid_vector_by_schema(written, section, field, value):
    # One vector of each section, since validating the whole file takes seconds.
    vectors = read(written / "vectors.json")
    few = {name: vectors if name == "stream" else vectors[:1] for name, vectors in vectors.items()}
    schema = read(written / "schema.json")
    jsonschema.validate(few, schema)
    if section is None:
        few["stream"] = value
    else:
        few[section][0][field] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(few, schema)


def test_explains_every_field_in_readme(written):
    vectors = read(written / "vectors.json")
    readme = (written / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`\"?(\w+)\"?`", readme))
    fields = {field for section in vectors.values() if section != 1 for field in section[0]}
    fields |= {option for vector in vectors["members"] for option in vector["options"]}
    assert {*vectors, *fields} <= named | {"stream"}


def test_writes_each_vector_on_its_own_line(written):
    lines = (written / "vectors.json").read_text(encoding="utf-8").splitlines()
    vectors = [json.loads(line.rstrip(",")) for line in lines if re.match(r"{.+", line)]
    whole = read(written / "vectors.json")
    assert vectors == [vector for section in whole.values() if section != 1 for vector in section]


def test_names_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, ["vectors", "--out", str(tmp_path / "file" / "folder")])
    assert result.exit_code == 2
    assert "file" in result.output


def compiled(source, folder):
    program = folder / "check"
    subprocess.run([COMPILER, "-O2", "-o", program, source, "-lm"], check=True)
    return program


@pytest.mark.skipif(COMPILER is None, reason="no C compiler is installed")
def test_accepts_the_vectors_in_short_c_program(written, tmp_path):
    assert len(CHECK.read_text(encoding="utf-8").splitlines()) < 150
    program = compiled(CHECK, tmp_path)
    run = subprocess.run([program, written / "vectors.json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    vectors = read(written / "vectors.json")
    checked, failed, skipped = map(int, re.findall(r"\d+", run.stdout))
    assert failed == 0
    assert checked + skipped == sum(
        len(vectors[section]) for section in ("generator", "keys", "masks", "outputs")
    )
    strings = sum(any("str" in data for data in key["fold_in"]) for key in vectors["keys"])
    halves = sum(output["dtype"].endswith("float16") for output in vectors["outputs"])
    assert skipped == strings + halves


@pytest.mark.skipif(COMPILER is None, reason="no C compiler is installed")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("round < 10", "round < 7"),
        (">= (uint64_t)rint", "> (uint64_t)rint"),
        ("rint(p * 0x1p32)", "(p * 0x1p32)"),
        ("x[i / 2 % 4] * 0x6C078965u :", "x[i / 2 % 4] :"),
        ("x[1] << 32 | x[0]", "x[0] << 32 | x[1]"),
        ("stride *= whole[d]", "stride *= lengths[d]"),
        ("f * (float)s", "f * s"),
    ],
)
def test_fails_in_mutated_c_program(written, tmp_path, right, wrong):
    source = CHECK.read_text(encoding="utf-8")
    assert source.count(right) == 1
    changed = tmp_path / "changed.c"
    changed.write_text(source.replace(right, wrong), encoding="utf-8")
    program = compiled(changed, tmp_path)
    run = subprocess.run([program, written / "vectors.json"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "vector failed" in run.stderr


@pytest.mark.skipif(COMPILER is None, reason="no C compiler is installed")
def test_rejects_another_stream_version_in_c_program(written, tmp_path):
    other = tmp_path / "vectors.json"
    other.write_text((written / "vectors.json").read_text().replace('"stream": 1', '"stream": 2'))
    run = subprocess.run([compiled(CHECK, tmp_path), other], capture_output=True, text=True)
    assert run.returncode == 2
    assert "stream must be 1, got 2" in run.stderr
