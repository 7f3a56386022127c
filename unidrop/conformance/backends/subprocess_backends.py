"""The backends that live in processes of their own, where no framework is imported here.

Keras has one backend a process, and TensorFlow and JAX one set of devices.
"""

from collections.abc import Mapping
from typing import ClassVar

from unidrop.conformance import RemoteBackend

__all__ = ["JaxOnTwoDevices", "KerasJax", "KerasNumpy", "KerasOnTwoDevices", "KerasTorch"]


class _Keras(RemoteBackend):
    target = "unidrop.conformance.backends.keras:Keras"


class KerasJax(_Keras):
    """Keras on JAX."""

    name = "keras-jax"
    environment: ClassVar[Mapping[str, str]] = {"KERAS_BACKEND": "jax"}


class KerasTorch(_Keras):
    """Keras on PyTorch."""

    name = "keras-torch"
    environment: ClassVar[Mapping[str, str]] = {
        "KERAS_BACKEND": "torch",
        # The only kernel of C++ counts one integer: it needs no vectors, for which torch would
        # compile something first to see whether there are any.
        "TORCHINDUCTOR_VEC_ISA_OK": "0",
    }


class KerasNumpy(_Keras):
    """Keras on NumPy, which has no training but does drop."""

    name = "keras-numpy"
    environment: ClassVar[Mapping[str, str]] = {"KERAS_BACKEND": "numpy"}


class KerasOnTwoDevices(RemoteBackend):
    """Keras in the replicas of `tf.distribute.MirroredStrategy`."""

    name = "keras-2-devices"
    target = "unidrop.conformance.backends.keras_devices:KerasOnTwoDevices"
    environment: ClassVar[Mapping[str, str]] = {"KERAS_BACKEND": "tensorflow"}


class JaxOnTwoDevices(RemoteBackend):
    """JAX in a process whose CPU is two devices."""

    name = "jax-2-devices"
    target = "unidrop.conformance.backends.jax_devices:JaxOnTwoDevices"
    environment: ClassVar[Mapping[str, str]] = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
