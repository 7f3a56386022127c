"""Keras on two devices in the matrix: the replicas of `tf.distribute.MirroredStrategy`.

TensorFlow's devices are chosen before it starts, so these live `elsewhere`, in their own process.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from unidrop.adapters.keras import Dropout
from unidrop.conformance import use_mode_path
from unidrop.conformance.backends.keras import Keras
from unidrop.conformance.backends.keras_modes import AtOnce

__all__ = ["KerasOnTwoDevices"]

_DEVICES = ("CPU:0", "CPU:1")
_GRAPH = "tf.function"


class KerasOnTwoDevices(Keras):
    """Each replica has its part of x, cut along the first axis as a batch is.

    A batch of one example leaves the second replica an empty part. What has no first axis is the
    only example of a batch.
    """

    name = "keras-2-devices"

    def __init__(self) -> None:
        (cpu,) = tf.config.list_physical_devices("CPU")
        halves = [tf.config.LogicalDeviceConfiguration() for _ in _DEVICES]
        tf.config.set_logical_device_configuration(cpu, halves)
        # That eager replicas are slow, and that each contract compiles anew, is no news here.
        tf.get_logger().setLevel("ERROR")
        super().__init__()
        self.strategy = tf.distribute.MirroredStrategy(_DEVICES)
        # As users have it: a replica on the portable path is compared in the graph.
        self.modes = ("fused" if "fused" in self.modes else "eager", _GRAPH)
        self.compiled_modes = (_GRAPH,)
        self.mode_exclusions = {}
        self.derived_modes = {}
        self.missing_modes = {
            "XLA": "XLA compiles for one device, and can't reach a replica's variables on another",
        }

    def scope(self, mode: str) -> AbstractContextManager[Any]:
        """Return the context in which a layer's state is every replica's."""
        scope: AbstractContextManager[Any] = self.strategy.scope()
        return scope

    def made(self, layer: Dropout, mode: str) -> Any:
        """Return what runs a layer in each replica."""
        return (_Graph if mode == _GRAPH else _Replicas)(layer, self.count, self.strategy, mode)


class _Replicas(AtOnce):
    """Calls a layer in each replica, by `Strategy.run`."""

    def __init__(self, layer: Dropout, count: Callable[[], None], strategy: Any, mode: str) -> None:
        super().__init__(layer, count)
        self._strategy = strategy
        self._mode = mode

    def __call__(self, x: Any, *, training: bool) -> Any:
        return _joined(self._get_parts(self._run(self._values(x), training)), x)

    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Differentiate in each replica, by a tape of its own."""
        tapes = {}

        def forward(part: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(part)
                y = self._drop(part, True)
            tapes[int(_rank())] = tape, part, y
            return y

        def backward(upstream: Any) -> Any:
            tape, part, y = tapes[int(_rank())]
            return tape.gradient(y, part, upstream)

        y = self._get_parts(self._strategy.run(forward, (self._values(x),)))
        return _joined(y, x), lambda upstream: _joined(
            self._get_parts(self._strategy.run(backward, (self._values(upstream),))), x
        )

    def _run(self, values: Any, training: bool) -> Any:
        return self._strategy.run(self._drop, (values, training))

    def _drop(self, part: Any, training: bool) -> Any:
        # A replica has a thread of its own, which is told here which path to take.
        with use_mode_path(self._mode):
            return self._layer(part, training=training)

    def _values(self, x: Any) -> Any:
        """Return the parts of a batch as the strategy's, of the first replica the longer one."""
        parts = _cut(x)
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group]
        )

    def _get_parts(self, values: Any) -> Any:
        return self._strategy.experimental_local_results(values)


class _Graph(_Replicas):
    """Calls a function that runs a layer in each replica."""

    def __init__(self, layer: Dropout, count: Callable[[], None], *args: Any) -> None:
        super().__init__(layer, count, *args)
        self._function = tf.function(self._traced)

    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Differentiate through the function, which has a backward function for all replicas."""
        values = self._values(x)
        parts = self._get_parts(values)
        with tf.GradientTape() as tape:
            tape.watch(parts)
            y = self._get_parts(self._run(values, True))
        return _joined(y, x), lambda upstream: _joined(
            tape.gradient(y, parts, output_gradients=_cut(upstream)), x
        )

    def _run(self, values: Any, training: bool) -> Any:
        return self._function(values, training)

    def _traced(self, values: Any, training: bool) -> Any:
        self._count()
        return super()._run(values, training)


def _rank() -> Any:
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def _cut(x: Any) -> tuple[Any, Any]:
    """Cut a batch in two, of which the first is longer where they can't be equal."""
    batch = x if x.shape.rank else x[None]
    longer = (batch.shape[0] + 1) // 2
    return batch[:longer], batch[longer:]


def _joined(parts: Any, x: Any) -> Any:
    """Put the parts of a batch together again."""
    return tf.reshape(tf.concat(parts, axis=0), x.shape)
