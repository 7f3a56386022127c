"""Count the operations of calls on a device other than the CPU; `test_torch_launches.py` runs this.

A GPU launches a kernel for each. Tensors on "meta" have a shape and no elements, and PyTorch's
profiler counts the same operations. It prints the counts of each call as JSON.
"""

import json
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

import unidrop
from unidrop import Key
from unidrop.adapters.torch import Dropout, Dropout2d, dropout

# These make a view or an uninitialized tensor, or call another operation.
NO_KERNEL = {
    *("_to_copy", "_unsafe_view", "alias", "as_strided", "clone", "contiguous", "detach", "expand"),
    *("flatten", "full", "lift_fresh", "new_empty", "ones", "permute", "reshape", "resolve_conj"),
    *("resolve_neg", "result_type", "select", "slice", "squeeze", "stack", "to", "unsqueeze"),
    *("view", "zero_", "zeros"),
}

KEY = Key(42)
WINDOW = {"global_shape": (128, 1001), "start": (64, 0)}


def on_meta(*shape, **options):
    return torch.empty(shape, device="meta", **options)


def launches(run):
    """Return how many kernels a call would launch, by operation."""
    run()  # which imports and caches
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    counts = Counter()
    for event in profiler.events():
        namespace, _, name = event.name.partition("::")
        is_own = event.cpu_parent is None or event.cpu_parent.name != event.name
        if namespace == "aten" and is_own and not name.startswith(("empty", "__")):
            counts[name] += name not in NO_KERNEL
    return +counts


module, channels = Dropout(0.1, seed=42).to("meta"), Dropout2d(0.1, seed=1).to("meta")
x, large, larger = on_meta(1 << 12), on_meta(1 << 24), on_meta(1 << 25)
narrow, rows, images = (
    on_meta(1 << 22, dtype=torch.bfloat16),
    on_meta(64, 1000),
    on_meta(8, 64, 56, 56),
)

CALLS = {
    "small": lambda: dropout(x, 0.1, key=KEY),
    "large": lambda: dropout(large, 0.1, key=KEY),
    "two pieces": lambda: dropout(larger, 0.1, key=KEY),
    "bfloat16": lambda: dropout(narrow, 0.1, key=KEY),
    "module": lambda: module(large),
    "channels": lambda: channels(images),
    "window": lambda: unidrop.dropout(rows, 0.1, KEY, **WINDOW),
}

if __name__ == "__main__":
    print(json.dumps({name: launches(call) for name, call in CALLS.items()}))
