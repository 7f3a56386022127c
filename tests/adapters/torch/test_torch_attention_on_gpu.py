"""Attention of PyTorch by the kernels of a GPU, in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch_attention_on_gpu

pytestmark = [pytest.mark.triton, pytest.mark.slow]  # the interpreter runs each program


def test_attention_by_kernels_equals_tiles_of_pytorch():
    run = subprocess.run(
        [sys.executable, torch_attention_on_gpu.__file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
