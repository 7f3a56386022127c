"""Run the Keras layer on two devices, in the replicas of `tf.distribute.MirroredStrategy`.

TensorFlow configures its devices once per process, so `subprocess_backends` runs this backend in
its own process.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from unidrop.adapters.keras import Dropout
from unidrop.conformance import use_mode_path
from unidrop.conformance.backends.keras import Keras
from unidrop.conformance.backends.keras_modes import EagerRunner

__all__ = ["KerasOnTwoDevices"]

_DEVICES = ("CPU:0", "CPU:1")
_GRAPH = "tf.function"


class KerasOnTwoDevices(Keras):
    """Each replica has a part of x, split along the first axis like a batch.

    If the batch has one example, the second replica has an empty part. A 0-d array is a batch of
    one example.
    """

    name = "keras-2-devices"
    capabilities: Mapping[str, str | None] = {
        **Keras.capabilities,
        **dict.fromkeys(
            ("attention", "attention_gradient"),
            "the matrix holds queries, keys and values in one vector, which replicas would split",
        ),
    }

    members: Mapping[str, str | None] = {
        **Keras.members,
        "drop_block": "its scale depends on the whole array, and each replica has a part",
    }

    def __init__(self) -> None:
        (cpu,) = tf.config.list_physical_devices("CPU")
        halves = [tf.config.LogicalDeviceConfiguration() for _ in _DEVICES]
        tf.config.set_logical_device_configuration(cpu, halves)
        # TensorFlow would warn that eager replicas are slow and that contracts retrace.
        tf.get_logger().setLevel("ERROR")
        super().__init__()
        self.strategy = tf.distribute.MirroredStrategy(_DEVICES)
        # The graph mode tests replicas on the portable path, so eager replicas use kernels.
        self.modes = ("fused" if "fused" in self.modes else "eager", _GRAPH)
        self.compiled_modes = (_GRAPH,)
        self.mode_exclusions = {}
        self.derived_modes = {}
        self.missing_modes = {
            "XLA": "XLA compiles for one device and cannot read variables on another",
        }

    def scope(self, mode: str) -> AbstractContextManager[Any]:
        """Return the context that mirrors a layer's state on the replicas."""
        scope: AbstractContextManager[Any] = self.strategy.scope()
        return scope

    def make_runner(self, layer: Dropout, mode: str) -> Any:
        """Return an object that runs a layer in each replica."""
        runner = _GraphRunner if mode == _GRAPH else _ReplicaRunner
        return runner(layer, self.count_trace, self.strategy, mode)


class _ReplicaRunner(EagerRunner):
    """Call a layer in each replica with `Strategy.run`."""

    def __init__(
        self, layer: Dropout, count_trace: Callable[[], None], strategy: Any, mode: str
    ) -> None:
        super().__init__(layer, count_trace)
        self._strategy = strategy
        self._mode = mode

    def __call__(self, x: Any, *, training: bool) -> Any:
        return _join(self._get_parts(self._run(self._distribute(x), training)), x)

    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Differentiate in each replica with its own tape."""
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

        y = self._get_parts(self._strategy.run(forward, (self._distribute(x),)))
        return _join(y, x), lambda upstream: _join(
            self._get_parts(self._strategy.run(backward, (self._distribute(upstream),))), x
        )

    def _run(self, values: Any, training: bool) -> Any:
        return self._strategy.run(self._drop, (values, training))

    def _drop(self, part: Any, training: bool) -> Any:
        # Each replica has its own thread, and a forced path applies to one thread.
        with use_mode_path(self._mode):
            return self._layer(part, training=training)

    def _distribute(self, x: Any) -> Any:
        """Return the parts of a batch as per-replica values."""
        parts = _split(x)
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group]
        )

    def _get_parts(self, values: Any) -> Any:
        return self._strategy.experimental_local_results(values)


class _GraphRunner(_ReplicaRunner):
    """Call a layer in each replica from one `tf.function`."""

    def __init__(self, layer: Dropout, count_trace: Callable[[], None], *args: Any) -> None:
        super().__init__(layer, count_trace, *args)
        self._function = tf.function(self._traced)

    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Differentiate through the function, whose backward function runs in all replicas."""
        values = self._distribute(x)
        parts = self._get_parts(values)
        with tf.GradientTape() as tape:
            tape.watch(parts)
            y = self._get_parts(self._run(values, True))
        return _join(y, x), lambda upstream: _join(
            tape.gradient(y, parts, output_gradients=_split(upstream)), x
        )

    def _run(self, values: Any, training: bool) -> Any:
        return self._function(values, training)

    def _traced(self, values: Any, training: bool) -> Any:
        self._count_trace()
        return super()._run(values, training)


def _rank() -> Any:
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def _split(x: Any) -> tuple[Any, Any]:
    """Split a batch in two parts; the first is longer if the length is odd."""
    batch = x if x.shape.rank else x[None]
    longer = (batch.shape[0] + 1) // 2
    return batch[:longer], batch[longer:]


def _join(parts: Any, x: Any) -> Any:
    """Join the parts of a batch, which is a 0-d array if x is."""
    joined = tf.concat(parts, axis=0)
    return joined if x.shape.rank else joined[0]
