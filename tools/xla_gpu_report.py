"""Compile JAX's programs of dropout for an H100, on a machine without a GPU, and count.

    pip install --no-deps --target FOLDER jax-cuda13-pjrt==VERSION
    python tools/xla_gpu_report.py FOLDER

VERSION must be the version of jaxlib, which `pip show jaxlib` prints. The plugin must not be
installed beside JAX: JAX would register it a second time.

For each program it prints how many kernels XLA launches, how many loops and arrays of bool the
program has, and the instructions of its largest kernel for each element. Instructions need ptxas of
CUDA, and cuobjdump, which Triton contains too.

It exits with 1 if a program with our dropout has a loop, keeps a mask, or launches more kernels
than the same program with `jax.random.bernoulli`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DUMP = Path(tempfile.mkdtemp())
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
os.environ["XLA_FLAGS"] = (
    f"--xla_dump_to={DUMP} --xla_gpu_cuda_data_dir={CUDA} --xla_gpu_autotune_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402 # after the flags
import jax.numpy as jnp  # noqa: E402
from jax._src.lib import xla_client  # noqa: E402
from jax.experimental.topologies import TopologyDescription  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from unidrop import Key  # noqa: E402
from unidrop.adapters.jax import dropout  # noqa: E402

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  shared_memory_per_block_optin: 232448 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

KEY, P = Key(42), 0.1


def drop(x: Any, step: Any) -> Any:
    """Apply dropout under the key of a step."""
    return dropout(x, P, KEY.fold_in(step))


def drop_native(x: Any, step: Any) -> Any:
    """Apply dropout as JAX's users write it."""
    key = jax.random.fold_in(jax.random.key(0), step)
    return jnp.where(jax.random.bernoulli(key, 1 - P, x.shape), x / (1 - P), 0).astype(x.dtype)


def train(apply: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Return the gradient of two layers, with dropout after each."""

    def loss(weights: tuple[Any, Any], x: Any, step: Any) -> Any:
        hidden = apply(jax.nn.gelu(x @ weights[0]), step)
        return (((apply(hidden @ weights[1], step + 1) + x).astype("float32")) ** 2).mean()

    return jax.grad(loss)


def get_programs() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Return each program with the types of its arguments."""
    step = jax.ShapeDtypeStruct((), jnp.uint32)

    def array(*shape: int, dtype: str = "bfloat16") -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    wide, x = array(4096, 1024, dtype="float32"), array(4096, 1024)
    layers = (array(1024, 4096), array(4096, 1024)), array(8192, 1024), step
    return {
        "x * 1.1, float32": (lambda x: x * 1.1, (wide,)),
        "x * 1.1, bfloat16": (lambda x: x * 1.1, (x,)),
        "dropout, float32": (drop, (wide, step)),
        "dropout, bfloat16": (drop, (x, step)),
        "bernoulli and where, bfloat16": (drop_native, (x, step)),
        "gradient, bfloat16": (
            lambda x, step: jax.grad(lambda v: (drop(v, step).astype("float32") ** 2).sum())(x),
            (x, step),
        ),
        "dropout(gelu(x + b)) + r, bfloat16": (
            lambda x, b, r, step: drop(jax.nn.gelu(x + b), step) + r,
            (x, array(1024), x, step),
        ),
        "a key for each row, bfloat16": (
            lambda x, step: jax.vmap(drop)(x, jnp.arange(4096, dtype="uint32") + step),
            (x, step),
        ),
        "a traced window, bfloat16": (
            lambda x, step: dropout(x, P, KEY, global_shape=(8192, 1024), start=(step, 0)),
            (x, step),
        ),
        "training step, bfloat16": (train(drop), layers),
        "training step by bernoulli": (train(drop_native), layers),
    }


def get_device(folder: str) -> Any:
    """Return an H100 to compile for."""
    plugin = Path(folder, "jax_plugins", "xla_cuda13", "xla_cuda_plugin.so")
    if not plugin.exists():
        raise SystemExit(f"FOLDER must contain JAX's plugin for CUDA 13, got {folder}\n\n{__doc__}")
    if _is_installed():
        raise SystemExit("JAX's plugin must be in FOLDER alone: pip uninstall jax-cuda13-pjrt")
    xla_client.load_pjrt_plugin_dynamically("cuda", str(plugin))
    try:
        xla_client.initialize_pjrt_plugin("cuda")
    except Exception as error:  # without a driver the topology still works
        print(f"no GPU here: {str(error).splitlines()[0]}", file=sys.stderr)
    options = {"topology": "1x1x1", "target_config": H100}
    topology = xla_client._xla.get_default_c_api_topology("cuda", "1x1x1", options)
    return TopologyDescription(topology._make_compile_only_devices()).devices[0]


def _is_installed() -> bool:
    try:
        return find_spec("jax_plugins.xla_cuda13") is not None
    except ModuleNotFoundError:
        return False


def count_instructions() -> float | None:
    """Return the instructions of the largest kernel that XLA has dumped, for each element."""
    spec = find_spec("triton")
    packages = Path(spec.origin).parent if spec and spec.origin else Path()
    ptxas = shutil.which("ptxas", path=f"{CUDA / 'bin'}{os.pathsep}{os.environ['PATH']}")
    own = packages / "backends/nvidia/bin/cuobjdump"
    cuobjdump = shutil.which("cuobjdump") or (str(own) if own.exists() else None)
    if ptxas is None or cuobjdump is None:
        return None
    largest, cubin = 0.0, DUMP / "kernel.cubin"
    for ptx in DUMP.glob("*.ptx"):
        if ".entry" in ptx.read_text() and "gemm" not in ptx.read_text():
            subprocess.run([ptxas, "-arch=sm_90a", "-o", cubin, ptx], check=True)
            sass = subprocess.check_output([cuobjdump, "-sass", cubin], text=True)
            lines = re.findall(r"/\*[0-9a-f]{4,5}\*/ +(.*?);", sass)
            instructions = sum("NOP" not in line for line in lines)
            # A thread has four elements, unless it stores single ones.
            if re.search(r"STG\.E\.(64|128)", sass):
                largest = max(largest, instructions / 4)
    return largest or None


def find_faults(counts: dict[str, tuple[int, int, int]]) -> list[str]:
    """Return the faults of programs with our dropout, from kernels, loops and masks of each."""
    most = {name: kernels for name, (kernels, _, _) in counts.items() if "bernoulli" in name}
    alone, step = most["bernoulli and where, bfloat16"], most["training step by bernoulli"]
    faults = []
    for name in counts.keys() - most.keys():
        kernels, loops, masks = counts[name]
        limit = step if name.startswith("training step") else alone
        if loops or masks or kernels > limit:
            faults.append(
                f"{name}: {kernels} kernels (at most {limit} are allowed), {loops} loops, "
                f"{masks} masks"
            )
    return sorted(faults)


def main() -> int:
    """Print one row for each program, and return the exit status."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    device = get_device(sys.argv[1])
    sharding = SingleDeviceSharding(device)
    print(f"{'program':36} {'kernels':>8} {'loops':>6} {'masks':>6} {'instructions':>13}")
    counts = {}
    for name, (function, arguments) in get_programs().items():
        shutil.rmtree(DUMP)
        jitted = jax.jit(function, in_shardings=sharding, out_shardings=sharding)
        text = jitted.lower(*arguments).compile().as_text()
        entry = text[text.index("ENTRY") :]  # other computations become parts of kernels
        instructions = count_instructions()
        kernels = len(re.findall(r" fusion[(]", entry))
        loops = len(re.findall(r" while[(]", text))
        masks = len(re.findall(r"pred.[0-9]+,[0-9]+.", entry))
        counts[name] = kernels, loops, masks
        print(
            f"{name:36} {kernels:8} {loops:6} {masks:6} "
            f"{'' if instructions is None else format(instructions, '.1f'):>13}"
        )
    faults = find_faults(counts)
    print(*faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
