"""Entry points of the backends that depend on environment variables.

They declare the variables without importing a framework.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from unidrop.conformance import SubprocessBackend
from unidrop.conformance.isolation import RUN_FOLDER_ENV_VAR

_PACKAGE = __name__.rpartition(".")[0]


def _jax() -> dict[str, str]:
    """Return the defaults of every process that uses JAX."""
    # Otherwise one process would take the whole GPU.
    defaults = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    folder = os.environ.get(RUN_FOLDER_ENV_VAR)
    # A user who sets the cache's folder also decides what it holds, and for how long.
    if folder is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # What JAX compiles for one mode then serves the others and the other backends on JAX.
        defaults["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder, "jax"))
        defaults["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return defaults


JAX_DEFAULTS: Mapping[str, str] = _jax()

_TENSORFLOW_DEFAULTS = {
    # Otherwise one process would take the whole GPU.
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    # Its build's messages would hide the reason of a crash.
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# Compiling PyTorch's headers in advance takes longer than the small programs here.
_TORCH_DEFAULTS = {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}

torch = SubprocessBackend("torch", f"{_PACKAGE}.torch:Torch", defaults=_TORCH_DEFAULTS)

torch_cuda = SubprocessBackend(
    "torch-cuda", f"{_PACKAGE}.torch_gpu:TorchOnCuda", defaults=_TORCH_DEFAULTS
)

torch_triton = SubprocessBackend(
    "torch-triton",
    f"{_PACKAGE}.torch_gpu:TorchOnTriton",
    environment={"TRITON_INTERPRET": "1"},
    defaults=_TORCH_DEFAULTS,
)

tensorflow = SubprocessBackend(
    "tensorflow", f"{_PACKAGE}.tensorflow:TensorFlow", defaults=_TENSORFLOW_DEFAULTS
)

jax = SubprocessBackend("jax", f"{_PACKAGE}.jax:Jax", defaults=JAX_DEFAULTS)

jax_2_devices = SubprocessBackend(
    "jax-2-devices",
    f"{_PACKAGE}.jax_devices:JaxOnTwoDevices",
    environment={
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    },
    defaults=JAX_DEFAULTS,
)

jax_cuda = SubprocessBackend("jax-cuda", f"{_PACKAGE}.jax:JaxOnCuda", defaults=JAX_DEFAULTS)

flax = SubprocessBackend("flax", f"{_PACKAGE}.flax:Flax", defaults=JAX_DEFAULTS)

keras = SubprocessBackend(
    "keras",
    f"{_PACKAGE}.keras:Keras",
    defaults={**JAX_DEFAULTS, **_TENSORFLOW_DEFAULTS, **_TORCH_DEFAULTS},
)

keras_2_devices = SubprocessBackend(
    "keras-2-devices",
    f"{_PACKAGE}.keras_devices:KerasOnTwoDevices",
    environment={"KERAS_BACKEND": "tensorflow"},
    defaults=_TENSORFLOW_DEFAULTS,
)

keras_jax = SubprocessBackend(
    "keras-jax",
    f"{_PACKAGE}.keras:Keras",
    environment={"KERAS_BACKEND": "jax"},
    defaults=JAX_DEFAULTS,
)

keras_numpy = SubprocessBackend(
    "keras-numpy", f"{_PACKAGE}.keras:Keras", environment={"KERAS_BACKEND": "numpy"}
)

keras_torch = SubprocessBackend(
    "keras-torch",
    f"{_PACKAGE}.keras:Keras",
    environment={"KERAS_BACKEND": "torch"},
    defaults={
        **_TORCH_DEFAULTS,
        # Its only C++ kernel counts one integer and needs no vector instructions. Otherwise PyTorch
        # first compiles a program to find out which ones the CPU has.
        "TORCHINDUCTOR_VEC_ISA_OK": "0",
    },
)
