"""Cases of dropout on two devices of JAX; `test_jax_devices.py` runs this as a process.

It prints "passed" or a traceback for each case, as JSON.
"""

import json
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax_off_the_cpu import lower_as_off_the_cpu

import unidrop
from unidrop import Key
from unidrop.adapters.jax import dot_product_attention, dropout

KEY = Key(42)


ROWS, COLUMNS, FEW = ((64, 2048), ("d",)), ((64, 2048), (None, "d")), ((8, 24), ("d",))


def partitioned(kind, layouts):
    """A partitioned program has the whole mask, and its devices do not communicate."""

    def drop(x, step):
        return dropout(x, 0.3, KEY.fold_in(step))

    def gradient(x, step):
        return jax.grad(lambda v: (drop(v, step) * jax.lax.stop_gradient(v)).sum())(x)

    mesh = jax.make_mesh((2,), ("d",), (kind,))
    for shape, spec in layouts:
        x = np.linspace(-1, 1, shape[0] * shape[1], dtype="float32").reshape(shape)
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        with unidrop.force_path("portable"):
            wanted = unidrop.dropout(x, 0.3, KEY.fold_in(3))
        for function in (drop, gradient):
            compiled = jax.jit(function).lower(placed, 3).compile()
            text = compiled.as_text()
            assert not re.search("all-|collective-permute|reduce-scatter", text), (shape, spec)
            assert not re.search("custom_call_target=.unidrop", text), (shape, spec)
            assert (np.asarray(compiled(placed, 3)) == wanted).all(), (shape, spec)


def mask_beside_gradient():
    """A mask beside a gradient is on the device of its key."""
    second = jax.devices()[1]
    x = jax.device_put(jnp.ones((3, 70)), second)
    key = jax.device_put(KEY, second)

    def loss(x):
        y, mask = dropout(x, 0.3, key, return_mask=True)
        return y.sum(), mask

    _, mask = jax.grad(loss, has_aux=True)(x)
    assert mask.devices() == {second}, mask.devices()
    assert (np.asarray(mask) == unidrop.keep_mask((3, 70), 0.3, KEY)).all()


def gradients_of_shared_array(drop, masks):
    """An array that devices share has the gradients of all their masks."""
    mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,))
    x = np.linspace(1, 2, 3 * 7, dtype="float32").reshape(3, 7)
    masks = np.asarray(masks)
    assert (masks[0] != masks[1]).any()
    specs = {"mesh": mesh, "in_specs": PartitionSpec(), "out_specs": PartitionSpec()}

    for power in (1, 2):

        def own(x, power=power):
            # The ranks' losses differ in weight, so that no sum is right by symmetry.
            rank = jax.lax.axis_index("d")
            return jax.lax.psum((drop(x, rank) ** power).sum() * (rank + 1), "d")

        loss = jax.shard_map(own, **specs)
        inside = jax.shard_map(jax.grad(own), **specs)
        weights = masks * np.float32([1, 2])[:, None, None] * 2**power
        total = (weights * x**power).sum()
        slope = weights.sum(0) * (2 * x if power == 2 else 1)
        for transform in (jax.jit,) if power == 1 else (lambda f: f, jax.jit):
            np.testing.assert_allclose(transform(loss)(x), total, rtol=1e-6)
            np.testing.assert_allclose(transform(jax.grad(loss))(x), slope, rtol=1e-6)
            np.testing.assert_allclose(transform(inside)(x), slope, rtol=1e-6)


def gradients_with_keys():
    """Each device folds its rank into the key."""
    gradients_of_shared_array(
        lambda x, rank: dropout(x, 0.5, KEY.fold_in(rank)),
        [unidrop.keep_mask((3, 7), 0.5, KEY.fold_in(rank)) for rank in range(2)],
    )


def gradients_with_windows():
    """Each device starts at its rows of the whole."""
    gradients_of_shared_array(
        lambda x, rank: dropout(x, 0.5, KEY, global_shape=(6, 7), start=(rank * 3, 0)),
        np.split(np.asarray(unidrop.keep_mask((6, 7), 0.5, KEY)), 2),
    )


def mask_on_requested_device():
    """A mask is on the requested device, wherever its window's start is."""
    second = jax.devices()[1]
    window = {"global_shape": (99, 8), "start": (jnp.int32(4), 0)}
    mask = unidrop.keep_mask((3, 8), 0.4, KEY, xp=jnp, device=second, **window)
    assert mask.device == second


def kernels_on_second_device():
    """A program for one of the devices calls kernels."""
    x = jax.device_put(np.ones((64, 9), "float32"), jax.devices()[1])
    compiled = jax.jit(lambda x: dropout(x, 0.3, KEY)).lower(x).compile()
    assert re.search("custom_call_target=.unidrop", compiled.as_text())
    y = compiled(x)
    assert y.devices() == x.devices(), y.devices()
    assert (np.asarray(y) == unidrop.dropout(np.asarray(x), 0.3, KEY)).all()


ATTENTION = {"is_causal": True, "dropout_rate": 0.3, "dropout_key": KEY}


def assert_attention_of_devices(attend, spec):
    """Attention of devices has the output and the gradients of attention of one device."""
    mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,))
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((2, 12, 2, 4), dtype="float32") for _ in range(3)]
    specs = {"mesh": mesh, "in_specs": spec, "out_specs": spec}

    def run(f, *arrays):
        y, vjp = jax.vjp(f, *arrays)
        return y, *vjp(y)

    options = {"xla_backend_optimization_level": "0"}  # to take less time
    run = jax.jit(run, static_argnums=0, compiler_options=options)
    expected = run(lambda *x: dot_product_attention(*x, **ATTENTION), *arrays)
    for actual in (
        run(jax.shard_map(attend, **specs), *arrays),
        run(
            lambda *x: dot_product_attention(*x, **ATTENTION),
            *(jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays),
        ),
    ):
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=3e-6)


def attention_of_batches():
    """Each device has a part of the batch."""
    window = {"global_shape": (2, 2, 12, 12)}

    def attend(query, key, value):
        start = jax.lax.axis_index("d"), 0, 0, 0
        return dot_product_attention(query, key, value, start=start, **window, **ATTENTION)

    assert_attention_of_devices(attend, PartitionSpec("d"))


def attention_of_a_ring():
    """Each device has a part of the sequence, and sends its keys around."""

    def attend(query, key, value):
        parts, rank = [], jax.lax.axis_index("d")
        for step in range(2):
            start = 0, 0, rank * 6, (rank + step) % 2 * 6
            options = {"start": start, "global_shape": (2, 2, 12, 12), "return_residual": True}
            parts.append(dot_product_attention(query, key, value, **options, **ATTENTION))
            key, value = jax.lax.ppermute((key, value), "d", [(0, 1), (1, 0)])
        outputs, residuals = map(jnp.stack, zip(*parts, strict=True))
        return (outputs * jax.nn.softmax(residuals, axis=0)[..., None]).sum(0)

    assert_attention_of_devices(attend, PartitionSpec(None, "d"))


def off_the_cpu(case):
    """Run a case with the programs of other platforms."""
    with lower_as_off_the_cpu():
        case()


CASES = {
    "partitioned_auto": lambda: partitioned(jax.sharding.AxisType.Auto, [ROWS, COLUMNS, FEW]),
    "partitioned_explicit": lambda: partitioned(jax.sharding.AxisType.Explicit, [COLUMNS]),
    "mask_beside_gradient": mask_beside_gradient,
    "gradients_of_shared_array_with_keys_of_devices": gradients_with_keys,
    "gradients_of_shared_array_with_windows_of_devices": gradients_with_windows,
    "partitioned_off_the_cpu": lambda: off_the_cpu(
        lambda: partitioned(jax.sharding.AxisType.Auto, [ROWS, COLUMNS])
    ),
    "windows_of_devices_off_the_cpu": lambda: off_the_cpu(gradients_with_windows),
    "mask_on_requested_device": mask_on_requested_device,
    "kernels_on_second_device": kernels_on_second_device,
    "attention_of_batches": attention_of_batches,
    "attention_of_a_ring": attention_of_a_ring,
}


def result(case):
    """Return "passed", or the traceback of a case."""
    try:
        case()
    except Exception:
        return traceback.format_exc()
    return "passed"


if __name__ == "__main__":
    assert len(jax.devices()) == 2
    print(json.dumps({name: result(case) for name, case in CASES.items()}))
