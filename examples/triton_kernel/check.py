"""Compare the kernel of dropout_add.py with the golden vectors of masks and of float32 outputs.

    unidrop vectors --out vectors
    python examples/triton_kernel/check.py vectors/vectors.json

It needs PyTorch. Without a GPU, set TRITON_INTERPRET=1: Triton then interprets the kernel on the
CPU.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from dropout_add import dropout_add

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def run(x, vector):
    """Return dropout of x. The residual is -0, the only number whose sum with any x is x."""
    key = int(vector["key"], 16)
    residual, y = torch.full_like(x, -0.0), torch.empty_like(x)
    dropout_add(x, residual, y, float(vector["p"]), (key % 2**32, key >> 32))
    return y.cpu()


def check_mask(vector):
    """Compare the decisions about ones."""
    y = run(torch.ones(len(vector["keep"]), device=DEVICE), vector)
    return "".join("1" if value else "0" for value in y.tolist()) == vector["keep"]


def check_output(vector):
    """Compare bits; every NaN conforms."""
    x, expected = (
        torch.tensor([int(bits, 16) for bits in vector[name]]).to(torch.int32).view(torch.float32)
        for name in "xy"
    )
    y = run(x.to(DEVICE), vector)
    same = (y.view(torch.int32) == expected.view(torch.int32)) | (y.isnan() & expected.isnan())
    return bool(same.all())


def main(path):
    """Check all vectors that need no window and no other dtype."""
    if DEVICE == "cpu":  # the interpreter multiplies by NumPy, which warns of an infinite product
        warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)
    elif not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU; set TRITON_INTERPRET=1 to interpret the kernel on the CPU")
    vectors = json.loads(Path(path).read_text(encoding="utf-8"))
    assert vectors["stream"] == 1, "stream must be 1"
    masks = [v for v in vectors["masks"] if v["keep"] and v["global_shape"] is None]
    outputs = [v for v in vectors["outputs"] if v["dtype"] == "float32" and float(v["p"]) > 0]
    results = [(v["name"], check_mask(v)) for v in masks]
    results += [(v["name"], check_output(v)) for v in outputs]
    failed = [name for name, holds in results if not holds]
    print(f"{len(results)} vectors checked on {DEVICE}, {len(failed)} failed", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
