"""Compile the kernels for GPUs without one, and report instructions, registers and estimates.

    python tools/gpu_report.py
    python tools/gpu_report.py --architecture 90
    python tools/gpu_report.py --only "flat float32"

Triton compiles for any NVIDIA architecture on any machine, and its wheel contains NVIDIA's
disassembler. The tests compare the same figures with their budgets. It exits with 1 if Triton is
missing, and with 2 on bad arguments.
"""

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    sys.exit('Triton is not installed: pip install ".[triton]"')

from unidrop.fused.triton import attention_launch, launch
from unidrop.rate import Rate

ARCHITECTURES = (80, 90, 100)
WIDE_LOAD, WIDE_STORE = r"LDG.*\.128", r"STG.*\.128"
THREADS = 128  # of a program: four warps

_POINTERS = {"bool": "*i1", "float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
_POINTERS |= {"float64": "*fp64", "complex64": "*fp32", "complex128": "*fp64"}
ITEM_SIZES = {"bool": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ITEM_SIZES |= {"complex64": 8, "complex128": 16}

# Lanes of a multiprocessor per clock, in the pipes that a kernel of integers can fill.
_LANES = {"issue": 128, "alu": 64, "fma": 64}
_PIPES = {
    "uniform": r"U[A-Z]|R2UR|S2UR",
    "fma": r"IMAD|FMUL|FADD|FFMA|HMUL2|HADD2|HFMA2",
    "alu": r"IADD|VIADD|LOP|PLOP3|SHF|PRMT|SEL|ISETP|FSEL|FSETP|LEA|F2FP|VIMNMX|IMNMX|MOV|CS2R"
    r"|SGXT|FMNMX|P2R|R2P",
    "memory": r"LDG|STG|LDS|STS|LDC|LDL|STL|SHFL|BAR",
    "other": r"",
}


@dataclass(frozen=True)
class Chip:
    """A GPU: its multiprocessors, clock in Hz and memory bandwidth in bytes per second."""

    name: str
    architecture: int
    multiprocessors: int
    clock: float
    bandwidth: float


# The bandwidths are the peaks in NVIDIA's data sheets. The rates of float32 there give the clocks:
# 19.5 TFLOPS of A100, and 51 of H100 PCIe, which has 114 multiprocessors. H100 SXM and H200 SXM are
# the same chip. Their 67 TFLOPS give 1.98 GHz, which a GPU may not hold under load, so the estimate
# assumes the lower clock for both.
CHIPS = (
    Chip("A100 80 GB SXM", 80, 108, 1.41e9, 2.039e12),
    Chip("H100 SXM", 90, 132, 1.755e9, 3.35e12),
    Chip("H200 SXM", 90, 132, 1.755e9, 4.8e12),
)
_REACHED = 0.9  # the share of the peak bandwidth that a copy reaches


@dataclass(frozen=True)
class Case:
    """Arrays of one dtype and layout, and the number of the first element."""

    name: str
    kind: str
    shape: tuple[int, ...]
    mask_strides: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None
    begins_block: bool = True
    is_far: bool = False

    @property
    def launch(self) -> Any:
        """The launch that `unidrop.fused.triton` prepares."""
        c_order = get_c_strides(self.shape)
        strides = self.strides or c_order
        mask_strides = c_order if self.mask_strides is None else self.mask_strides
        arguments = (self.kind, self.shape, mask_strides, strides, strides)
        return launch._prepare(*arguments, self.begins_block, self.is_far)

    def compile(self, architecture: int) -> "Compiled":
        """Compile the kernel as a launch with a key in device memory would."""
        prepared = self.launch
        threads = math.prod(prepared.grid) * len(prepared.runs) * THREADS
        pointers = dict.fromkeys(("x_ptr", "y_ptr"), _POINTERS[self.kind])
        cubin, shared = compile_kernel(
            prepared.kernel,
            pointers | {"key_ptr": "*i64"},
            prepared.constants,
            architecture,
            aligned=tuple(pointers),
        )
        return Compiled(cubin, shared, math.prod(self.shape) / threads)


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    architecture: int,
    aligned: tuple[str, ...] = (),
    **options: Any,
) -> tuple[bytes, int]:
    """Return the machine code of a kernel and its bytes of shared memory.

    ``types`` are of pointers, and of numbers without an annotation; other pointers are None.
    ``aligned`` names the arguments that 16 divides.
    """
    constants = dict(constants)
    signature: dict[str, str] = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in types:
            signature[name] = types[name]
        elif parameter.is_constexpr or name.endswith("_ptr"):
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        else:
            signature[name] = parameter.annotation_type
    names = list(signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=options)
    return compiled.asm["cubin"], compiled.metadata.shared


def compile_next_key(architecture: int) -> "Compiled":
    """Compile the kernel that advances a call number; its unit is a call, not an element."""
    pointers = dict.fromkeys(("calls_ptr", "key_ptr", "out_ptr"), "*i64")
    code = compile_kernel(
        launch._get_kernels().next_key, pointers, {"TAG": 1}, architecture, num_warps=1
    )
    return Compiled(*code, 1)


ATTENTION = ("attend", "differentiate_queries", "differentiate_keys")


def compile_attention(
    name: str,
    architecture: int,
    kind: str = "bfloat16",
    *,
    p: float = 0.1,
    features: int = 64,
    keys: int = 1024,
    is_causal: bool = False,
    bias: str | None = None,
    is_placed: bool = True,
) -> "Compiled":
    """Compile a kernel of attention; its elements are the weights of one tile.

    ``bias`` is the dtype of a mask. Without ``is_placed``, the base is in memory.
    """
    axes = 2, 8, 8, 1024, keys, features, features
    strides = (8 * 1024 * keys, 1024 * keys, keys)
    attention = attention_launch.Attention(
        kind, *axes, is_causal, 0, features**-0.5, Rate.from_p(p), strides, 0
    )
    _, constants = attention_launch._prepare(
        attention, 0 if bias is None else 1, attention_launch._UNIT, is_placed
    )
    tile = attention_launch._choose_tile(name, attention, bias)
    kernel = getattr(attention_launch._get_kernels(), name)
    numbers = {"key_ptr": "*i64"} | dict.fromkeys(("sizes_ptr", "delta_ptr"), "*fp32")
    numbers |= {} if bias is None else {"bias_ptr": _POINTERS[bias]}
    numbers |= {} if is_placed else {"place_ptr": "*i64"}
    arrays = [f"{x}_ptr" for x in ("q", "k", "v", "o", "do", "dq", "dk", "dv")]
    arrays = [x for x in arrays if x in kernel.arg_names]
    types = dict.fromkeys(arrays, _POINTERS[kind])
    types |= {x: pointer for x, pointer in numbers.items() if x in kernel.arg_names}
    constants = constants | {"ROWS": tile.rows, "COLUMNS": tile.columns}
    cubin, shared = compile_kernel(
        kernel, types, constants, architecture, tuple(arrays),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return Compiled(cubin, shared, tile.rows * tile.columns / (32 * tile.warps))


def get_c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of C order."""
    strides = [1]
    for length in shape[:0:-1]:
        strides.append(strides[-1] * length)
    return tuple(strides[::-1])


@dataclass(frozen=True)
class Compiled:
    """Machine code; its figures are per thread, and a thread has this many elements."""

    cubin: bytes
    shared: int
    elements: float

    @cached_property
    def _texts(self) -> tuple[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(self.cubin)
            return _run("nvdisasm", "-c", path), _run("cuobjdump", "--dump-resource-usage", path)

    @cached_property
    def instructions(self) -> list[str]:
        """The operations of the code, except padding and the jump after its end."""
        pattern = r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
        found = re.findall(pattern, self._texts[0], re.MULTILINE)
        return [name for name in found if name not in ("NOP", "BRA")]

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return self._resource("REG")

    @property
    def spilled(self) -> int:
        """Bytes of a thread outside of its registers."""
        return self._resource("STACK") + self._resource("LOCAL")

    def _resource(self, name: str) -> int:
        match = re.search(rf"{name}:(\d+)", self._texts[1])
        assert match is not None
        return int(match[1])

    @property
    def per_element(self) -> float:
        """Instructions for an element."""
        return len(self.instructions) / self.elements

    def count(self, pattern: str) -> int:
        """Return how many instructions begin with a pattern."""
        return sum(re.match(pattern, name) is not None for name in self.instructions)

    @property
    def pipes(self) -> Counter[str]:
        """The slots of each pipe that a thread occupies; a 64-bit product occupies two."""
        counts = Counter(issue=len(self.instructions))
        for name in self.instructions:
            pipe = next(pipe for pipe, pattern in _PIPES.items() if re.match(pattern, name))
            counts[pipe] += 2 if re.match(r"IMAD\.(WIDE|HI)", name) else 1
        return counts

    def estimate(self, chip: Chip, item_size: int) -> float:
        """Return the time of the busiest pipe over the time of memory: below 1 memory decides."""
        slots = max(self.pipes[pipe] / lanes for pipe, lanes in _LANES.items()) / self.elements
        computing = slots / (chip.multiprocessors * chip.clock)
        return computing / (2 * item_size / (_REACHED * chip.bandwidth))


def _run(tool: str, *arguments: Any) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [folder / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def make_cases() -> list[Case]:
    """Return the cases of the report."""
    far = 1 << 22
    cases = [Case(f"flat {kind}", kind, (far,)) for kind in ITEM_SIZES]
    cases += [Case(f"flat {kind}, 64-bit", kind, (1 << 31,)) for kind in ("bfloat16", "float32")]
    cases += [Case("flat bfloat16, odd size", "bfloat16", (far + 1,))]
    for kind in ("bfloat16", "float32", "float64", "complex64"):
        window = (8192, 1)
        cases += [
            Case(f"window {kind}", kind, (2048, 1024), window),
            Case(f"unaligned window {kind}", kind, (2048, 1024), window, None, False),
            Case(f"unaligned run {kind}", kind, (far,), None, None, False),
            Case(f"heads {kind}", kind, (8, 16, 512, 64), None, (524288, 64, 1024, 1)),
            Case(f"transposed {kind}", kind, (2048, 2048), None, (1, 2048)),
            Case(f"shared rows {kind}", kind, (32, 2048, 64), (0, 64, 1)),
            Case(f"channels {kind}", kind, (32, 256, 1024), (256, 1, 0)),
            Case(f"strided {kind}", kind, (2048, 512), None, (2048, 2)),
            Case(f"one column {kind}", kind, (far, 1), (8, 1), (1, 1)),
        ]
    return cases


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, action="append")
    parser.add_argument("--only", default="", help="part of a kernel's name")
    arguments = parser.parse_args()
    cases = [case for case in make_cases() if arguments.only in case.name]
    kernels = [name for name in ATTENTION if arguments.only in name]
    if not cases and not kernels:
        parser.error(f"--only must be part of the name of a kernel, got {arguments.only!r}")
    names = " ".join(f"{chip.name:>15}" for chip in CHIPS)
    print(f"{'kernel':34} sm  instructions  registers  spilled  shared  wide {names}")
    for case in cases:
        for architecture in arguments.architecture or ARCHITECTURES:
            code = case.compile(architecture)
            wide = f"{code.count(WIDE_LOAD)}+{code.count(WIDE_STORE)}"
            estimates = " ".join(
                f"{code.estimate(chip, ITEM_SIZES[case.kind]):15.2f}"
                if chip.architecture == architecture
                else " " * 15
                for chip in CHIPS
            )
            print(
                f"{case.name:34} {architecture:3} {code.per_element:12.1f} {code.registers:10} "
                f"{code.spilled:8} {code.shared:7} {wide:>5} {estimates}",
                flush=True,
            )
    for name in kernels:
        for features in (64, 128):
            for architecture in arguments.architecture or ARCHITECTURES:
                code = compile_attention(name, architecture, features=features, is_causal=True)
                label = f"{name}, {features}"
                print(
                    f"{label:34} {architecture:3} {code.per_element:12.1f} "
                    f"{code.registers:10} {code.spilled:8} {code.shared:7}",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
