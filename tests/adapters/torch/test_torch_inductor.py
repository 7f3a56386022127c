"""Dropout in the kernels that Inductor generates, which Triton's interpreter runs."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unidrop.adapters.torch import inductor

pytestmark = [pytest.mark.triton, pytest.mark.slow]  # a script compiles 20 graphs

SCRIPT = Path(__file__).parents[2] / "support/inductor_without_gpu.py"

# What a layer in PyTorch's own graph saves: what `sublayer` needs for gelu, and a key.
KEY = ["torch.int64", 2]
ROWS, BIAS = ["torch.float32", 20, 42], ["torch.float32", 42]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the results of the script, which patches PyTorch, by kind and scenario."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor")),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_fuses_dropout_with_its_neighbors(results):
    actual = results["interpreted"]["sublayer"]
    assert (actual["forward"], actual["backward"], actual["operators"]) == (1, 1, [[], []])


def test_saves_a_key_and_no_mask(results):
    assert results["interpreted"]["sublayer"]["saved"] == [ROWS, BIAS, KEY]


def test_fuses_a_seeded_layer(results):
    actual = results["interpreted"]["layer"]
    assert actual["is_equal"]
    assert (actual["forward"], actual["backward"]) == (1, 1)
    assert actual["operators"] == [["call_key"], []]
    assert actual["saved"] == [KEY]


@pytest.mark.parametrize(
    "name", ["dtypes", "layouts and rates", "varying shapes", "windows", "a constant window"]
)
def test_gives_the_bits_of_the_operator(results, name):
    actual = results["interpreted"][name]
    assert actual["is_equal"]
    assert not any(actual["operators"])  # else the bits come from the operator


def test_leaves_complex_numbers_to_the_operator(results):
    actual = results["interpreted"]["a complex dtype"]
    assert actual["is_equal"]
    assert actual["operators"] == [["dropout"], ["dropout"]]


def test_calls_the_operator_if_lowering_raises(results):
    actual = results["interpreted"]["opaque"]
    assert (actual["forward"], actual["backward"]) == (2, 1)
    assert actual["operators"] == [["dropout"], ["dropout"]]
    assert actual["saved"] == [ROWS, BIAS, KEY]


@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("sublayer", []),
        ("a norm", []),
        ("layer", ["call_key"]),
        ("drawn key", ["draw_key"]),
        ("constant key", []),
        ("a step", ["fold_in"]),
        ("a step on the CPU", ["integers", "fold_in"]),
        ("a window", []),
    ],
)
def test_generates_one_kernel_for_a_gpu(results, name, operators):
    actual = results["generated"][name]
    constants = name == "a step"  # the operator that folds it in reads a key
    assert actual["kernels"] == 1 + constants
    assert [operator for operator, *_ in actual["operators"]] == operators


def test_captures_no_operator_that_reads_the_cpu(results):
    public = {**results["generated"]}
    del public["a key on the CPU"]  # the functions move a key to the device
    captured = {
        (operator, *devices)
        for code in public.values()
        for operator, devices, is_captured in code["operators"]
        if is_captured
    }
    names = "attend", "call_key", "fold_in", "keep_mask"
    assert captured == {(name, "cuda") for name in names}


def test_calls_one_operator_for_attention(results):
    operators = [name for name, *_ in results["generated"]["attention"]["operators"]]
    assert operators == ["fold_in", "attend"]


@pytest.mark.parametrize("name", ["a key on the CPU", "a tensor on the CPU"])
def test_calls_the_operator_for_words_on_the_cpu(results, name):
    assert [operator for operator, *_ in results["generated"][name]["operators"]] == ["dropout"]


def test_computes_large_indices_in_64_bits(results):
    assert results["generated"]["2^33 elements"]["is_64_bit"] == [True, True]
    assert results["generated"]["sublayer"]["is_64_bit"] == [False, False]


def test_survives_a_changed_inductor(monkeypatch, caplog):
    import torch._inductor.lowering

    monkeypatch.setattr(inductor, "_is_registered", False)
    monkeypatch.delattr(torch._inductor.lowering, "register_lowering")
    before = dict(torch._inductor.lowering.lowerings)
    with caplog.at_level(logging.DEBUG, inductor.__name__):
        inductor.register(torch.device("cuda"))
    assert torch._inductor.lowering.lowerings == before
    assert "dropout is opaque" in caplog.text


def test_registers_nothing_for_the_cpu(monkeypatch):
    import torch._inductor.lowering

    monkeypatch.setattr(inductor, "_is_registered", False)
    inductor.register(torch.device("cpu"))
    assert not inductor._is_registered


def test_does_not_import_inductor(monkeypatch):
    monkeypatch.setattr(inductor, "_is_registered", False)
    monkeypatch.delitem(sys.modules, "torch._inductor.lowering", raising=False)
    inductor.register(torch.device("cuda"))
    assert not inductor._is_registered
