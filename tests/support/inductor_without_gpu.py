"""What Inductor generates for a GPU, on a machine that has none; a script, because it patches much.

It prints the results of its scenarios as JSON. There are two stand-ins for a GPU:

* The CPU as a device of Triton, whose interpreter runs the generated kernels. So torch.compile runs
  from Dynamo to the gradient, on values, and every launch is counted.
* An H100 that exists by name only, with tensors of PyTorch's fake mode. Inductor generates code for
  it, and parts to be captured in CUDA graphs, but nothing runs.
"""

import copy
import ctypes
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# Triton reads this when it is imported.
os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn
from torch._dynamo.device_interface import (
    CpuInterface,
    get_interface_for_device,
    register_interface_for_device,
)
from torch._inductor import ir
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import unidrop
from unidrop import Key
from unidrop.adapters.torch import Dropout, dropout, inductor, scaled_dot_product_attention
from unidrop.philox import ODD_MULTIPLIER, philox

operator = torch.ops.unidrop.dropout

torch._functorch.config.enable_autograd_cache = False
torch._inductor.config.fx_graph_cache = False
torch._inductor.config.compile_threads = 1

BLOCK = 256


class InterpretedKernel:
    """A generated kernel, which Triton's interpreter runs in blocks of few elements."""

    def __init__(self, name, source):
        self.name = name
        # The interpreter knows no functions of CUDA's library.
        source = re.sub(r"libdevice\.(\w+\()", r"tl.math.\1", source)
        self.function = getattr(PyCodeCache.load(source), name)

    def run(self, *arguments, stream=None):
        launches.append(self.name)
        names = self.function.arg_names
        sizes = dict(zip(names, arguments, strict=False))
        grid = [-(-sizes.get(f"{axis}numel", 1) // BLOCK) for axis in "xyz"]
        self.function[tuple(grid)](*arguments, **{n: BLOCK for n in names if n.endswith("BLOCK")})


launches, codes = [], []


def interpret_triton():
    """Let Inductor compile for the CPU by Triton, and let Triton's interpreter run the result."""
    torch._inductor.config.cpu_backend = "triton"
    triton_helpers.set_driver_to_cpu = lambda: None
    triton_heuristics.pointwise = lambda **options: lambda function: function
    AsyncCompile.triton = lambda self, name, source, **options: InterpretedKernel(name, source)
    GraphLowering.save_output_code = codes.append


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))


def called_operators(code):
    return re.findall(r"torch\.ops\.unidrop\.(\w+)\.default\(", code)


def compile_and_compare(function, *arguments, differentiated=1, dynamic=None, calls=1):
    """Return what a compiled function and its gradient launch, and whether the bits are right."""
    torch._dynamo.reset()
    launches.clear(), codes.clear()
    twin, saved = copy.deepcopy(function), []
    compiled = torch.compile(function, dynamic=dynamic, fullgraph=True)
    is_equal = True
    for _ in range(calls):
        launches.clear(), saved.clear()
        inputs = [x.clone().requires_grad_() for x in arguments[:differentiated]]
        x = *inputs, *arguments[differentiated:]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append([str(t.dtype), *t.shape]) or t, lambda t: t
        ):
            y = compiled(*x)
        forward = list(launches)
        outputs = y if isinstance(y, tuple) else (y,)
        expected = twin(*x)
        expected = expected if isinstance(expected, tuple) else (expected,)
        pairs = [*zip(outputs, expected, strict=True)]
        launches.clear()
        if differentiated:
            upstream = [torch.arange(e.numel()).reshape(e.shape).to(e.dtype) for e in expected]
            actual = torch.autograd.grad(outputs, inputs, upstream)
            right = torch.autograd.grad(expected, inputs, upstream)
            pairs += zip(actual, right, strict=True)
        backward = list(launches)
        is_equal = is_equal and all(
            torch.equal(a, b) and a.stride() == b.stride() for a, b in pairs
        )
    return {
        "is_equal": is_equal,
        "forward": len(forward),
        "backward": len(backward),
        "operators": [called_operators(code) for code in codes],
        "saved": sorted(saved, key=str),
    }


KEY = torch.tensor([5, 6])
EVEN = philox((0, 0, 0, 0), (5, 6))[0]
ODD = EVEN * ODD_MULTIPLIER % 2**32
X = torch.arange(-420, 420).reshape(4, 6, 5, 7) / 8
X.view(-1)[::9] = -torch.inf  # an operator drops infinity too


def sublayer(x, bias, residual, key):
    return operator(nn.functional.gelu(x + bias), key, 0.1, ()) + residual


def dropped(x, key):
    return operator(x, key, 0.1, ())


def normalized(x, residual, key):
    return nn.functional.layer_norm(operator(x, key, 0.1, ()) + residual, x.shape[-1:])


class Seeded(nn.Sequential):
    """A layer among operations that Inductor generates kernels for."""

    def forward(self, x):
        return self[0](x * 2) + 1


def interpreted_scenarios():
    """Yield the name and the results of each scenario that runs."""
    rows, bias, residual = X.reshape(20, 42), torch.ones(42), torch.zeros(20, 42)
    yield "sublayer", compile_and_compare(sublayer, rows, bias, residual, KEY)
    yield "layer", compile_and_compare(Seeded(Dropout(0.5, seed=42)), X, calls=2)
    halves = (torch.float16, torch.bfloat16)
    yield (
        "dtypes",
        compile_and_compare(
            lambda a, b, c, d, key: (
                operator(a, key, 0.3, ()),
                operator(b, key, 0.3, ()),
                operator(c, key, 0.3, ()),
                # The interpreter rounds to bfloat16 toward zero, so this product is exact.
                operator(d, key, 0.5, ()),
            ),
            rows,
            rows.double() / 3,
            *(rows.to(dtype) for dtype in halves),
            KEY,
            differentiated=0,
        ),
    )
    yield (
        "layouts and rates",
        compile_and_compare(
            lambda x, key: (
                operator(x.permute(2, 0, 3, 1), key, 0.3, ()),
                operator(x, key, 0.3, (-1, 0)),
                operator(x[0, 0, 0, 0], key, 0.5, ()),
                operator(x, key, EVEN / 2**32, ()),
                operator(x, key, ODD / 2**32, ()),
                operator(x, key, 0.0, ()),
                operator(x, key, 1e-12, ()),
                operator(x, key, 1.0, ()),
            ),
            X,
            KEY,
        ),
    )
    yield (
        "varying shapes",
        compile_and_compare(
            lambda x, key: operator(x.permute(2, 0, 3, 1), key, 0.3, (3,)), X, KEY, dynamic=True
        ),
    )
    yield (
        "windows",
        compile_and_compare(
            lambda x, key, start, middle, first: (
                operator(x, key, 0.3, (), [1 << 20, 60, 1 << 15, 1 << 18], start),
                operator(x, key, 0.3, (1,), [1 << 20, 60, 1 << 15, 1 << 28], start),
                operator(x, key, 0.3, (), [1 << 20, 6, 1 << 15, 7], middle),
                operator(x, key, 0.3, (), [1 << 40, 6, 5, 7], first),
            ),
            X,
            torch.tensor([-1, 1 << 40 | 7]),
            torch.tensor([1 << 19, 7, 30000, 900]),
            torch.tensor([1 << 19, 0, 30000, 0]),
            torch.tensor([1 << 39 | 3, 0, 0, 0]),
        ),
    )
    yield (
        "a complex dtype",
        compile_and_compare(
            lambda x, key: torch.view_as_real(operator(torch.view_as_complex(x), key, 0.5, ())),
            torch.ones(8, 3, 2),
            KEY,
        ),
    )
    whole = [1 << 20, 60, 1 << 15, 1 << 15]
    yield (
        "a constant window",
        compile_and_compare(
            # Inductor knows the values of these starts, and may compute with them itself.
            lambda x, key: (
                operator(x, key, 0.3, (), whole, torch.full((4,), 0)),
                unidrop.dropout(x, 0.3, Key(42), global_shape=whole, start=(1 << 19, 7, 9, 900)),
            ),
            X,
            KEY,
            differentiated=0,
        ),
    )
    inductor.philox = None  # an exception while a node is lowered
    yield "opaque", compile_and_compare(sublayer, rows, bias, residual, KEY)


PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
    gcnArchName="",
    is_integrated=False,
)


class FakeH100(CpuInterface):
    """The answers of an H100 to Inductor's questions."""

    class Worker(CpuInterface.Worker):
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: PROPERTIES)

    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_compute_capability = staticmethod(lambda device=None: 90)
    get_device_properties = staticmethod(lambda device=None: PROPERTIES)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)


def fake_h100():
    """Let tensors of PyTorch's fake mode be on a GPU, and Inductor generate code for it."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            is_active=lambda: True,
            get_device_interface=lambda: FakeH100,
        )
    )
    get_interface_for_device("cpu")  # registers all devices, which must not happen afterwards
    for name in ("cuda", "cuda:0"):
        register_interface_for_device(name, FakeH100)
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    torch.cuda._exchange_device = lambda device: 0
    torch.cuda._maybe_exchange_device = lambda device: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: PROPERTIES
    torch.cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda state, device=None: None
    joint_graph.lazy_init = lambda *arguments: None  # it runs patterns on the device
    # PyTorch without CUDA has no guard for the device, which does nothing on a CPU.
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[0]


class GeneratedError(Exception):
    """Raised once the code of a graph has been generated."""


def inspect_module(results, graph):
    """Append what the generated code contains, instead of compiling it."""
    code = graph.codegen()[0].value
    operators = []
    for fused in graph.scheduler.nodes:
        for node in fused.get_nodes():
            if isinstance(node.node, ir.FallbackKernel):
                devices = {argument.get_device().type for argument in node.node.inputs}
                is_captured = graph.scheduler.should_partition(node) is None
                name = node.node.op_overload.name().removeprefix("unidrop::")
                operators.append([name, sorted(devices), is_captured])
    results.append(
        {
            "kernels": code.count(".run("),
            "operators": operators,
            # The index of the kernel, and the number of an element that is made from it.
            "is_64_bit": [".to(tl.int64) * XBLOCK" in code, "(x0).to(tl.uint64)" in code],
        }
    )
    raise GeneratedError


def generate(function, *arguments):
    """Return what the code for the fake GPU contains."""
    results = []
    torch._dynamo.reset()
    try:
        with mock.patch.object(
            GraphLowering, "compile_to_module", lambda graph: inspect_module(results, graph)
        ):
            torch.compile(function, fullgraph=True)(*arguments)
    except Exception:
        if not results:
            raise
    (result,) = results
    return result


def attention(x, step):
    key = Key(42).fold_in(step)
    return scaled_dot_product_attention(x * 2, x, x, None, 0.1, True, dropout_key=key) + 1


def fake_scenarios():
    """Yield the name and the code of each scenario that only generates code."""
    with torch._inductor.config.patch("triton.cudagraphs", True), FakeTensorMode():
        x = torch.empty((64, 256), device="cuda")
        key, cpu_key = (torch.empty((2,), dtype=torch.int64, device=d) for d in ("cuda", "cpu"))
        step, cpu_step = (torch.empty((), dtype=torch.int64, device=d) for d in ("cuda", "cpu"))
        layer = Dropout(0.1, seed=42)
        layer._apply(lambda t: torch.empty_like(t, device="cuda"))
        window = {"global_shape": (128, 256), "start": (5, 0)}
        yield "sublayer", generate(sublayer, x, x[0], x, key)
        yield "a key on the CPU", generate(sublayer, x, x[0], x, cpu_key)
        yield "a tensor on the CPU", generate(dropped, torch.empty(64, 256), cpu_key)
        yield "layer", generate(lambda x: layer(x * 2) + 1, x)
        yield "drawn key", generate(lambda x: dropout(x * 2, 0.1) + 1, x)
        yield "constant key", generate(lambda x: dropout(x * 2, 0.1, key=Key(42)) + 1, x)
        for name, s in (("a step", step), ("a step on the CPU", cpu_step)):
            yield name, generate(lambda x, s: dropout(x * 2, 0.1, key=Key(42).fold_in(s)) + 1, x, s)
        yield "a window", generate(lambda x: unidrop.dropout(x, 0.1, Key(42), **window) + 1, x)
        yield "a norm", generate(normalized, x, x, key)
        yield (
            "a mask",
            generate(lambda x: unidrop.dropout(x, 0.1, Key(42), return_mask=True), x),
        )
        heads = torch.empty((2, 4, 64, 32), device="cuda", dtype=torch.bfloat16)
        yield "attention", generate(attention, heads, step)
        huge = torch.empty((1 << 17, 1 << 16), dtype=torch.bfloat16, device="cuda")
        yield "2^33 elements", generate(dropped, huge, key)


if __name__ == "__main__":
    fake_h100()
    generated = dict(fake_scenarios())
    interpret_triton()
    json.dump({"interpreted": dict(interpreted_scenarios()), "generated": generated}, sys.stdout)
