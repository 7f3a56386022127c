"""Dropout on two devices of JAX: what is communicated, and what is shared."""

import os
import subprocess
import sys

import pytest


def shown_on_two_devices(code):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip()


TWO_DEVICES = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import unidrop
from unidrop import Key
from unidrop.adapters.jax import dropout
def f(x, step):
    return dropout(x, 0.3, Key(42).fold_in(step))
for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("d",), (kind,))
    for shape, spec in [((64, 2048), ("d",)), ((64, 2048), (None, "d")), ((8, 24), ("d",))]:
        x = np.linspace(-1, 1, shape[0] * shape[1], dtype="float32").reshape(shape)
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        with unidrop.force_path("portable"):
            wanted = unidrop.dropout(x, 0.3, Key(42).fold_in(3))
        for g in (f, jax.grad(lambda v, s: (f(v, s) * jax.lax.stop_gradient(v)).sum())):
            compiled = jax.jit(g).lower(placed, 3).compile()
            text = compiled.as_text()
            assert not re.search("all-|collective-permute|reduce-scatter", text), (shape, spec)
            assert (np.asarray(compiled(placed, 3)) == wanted).all(), (shape, spec, kind)
print("same")
"""


def test_a_partitioned_program_has_the_whole_mask_and_no_communication():
    assert shown_on_two_devices(TWO_DEVICES) == "same"


OF_A_KEY = """
import jax, jax.numpy as jnp, numpy as np
import unidrop
from unidrop import Key
from unidrop.adapters.jax import dropout
second = jax.devices()[1]
x = jax.device_put(jnp.ones((3, 70)), second)
key = jax.device_put(Key(42), second)
def loss(x):
    y, mask = dropout(x, 0.3, key, return_mask=True)
    return y.sum(), mask
_, mask = jax.grad(loss, has_aux=True)(x)
assert mask.devices() == {second}, mask.devices()
assert (np.asarray(mask) == unidrop.keep_mask((3, 70), 0.3, Key(42))).all()
print("there")
"""


def test_a_mask_beside_a_gradient_is_where_its_key_is():
    assert shown_on_two_devices(OF_A_KEY) == "there"


SHARED_BY_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec
import unidrop
from unidrop import Key
from unidrop.adapters.jax import dropout
KEY = Key(42)
mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,))
x = np.linspace(1, 2, 3 * 7, dtype="float32").reshape(3, 7)
cases = {
    "key": (
        lambda x, rank: dropout(x, 0.5, KEY.fold_in(rank)),
        [unidrop.keep_mask((3, 7), 0.5, KEY.fold_in(rank)) for rank in range(2)],
    ),
    "start": (
        lambda x, rank: dropout(x, 0.5, KEY, global_shape=(6, 7), start=(rank * 3, 0)),
        np.split(np.asarray(unidrop.keep_mask((6, 7), 0.5, KEY)), 2),
    ),
}
f, masks = cases[sys.argv[1]]
masks = np.asarray(masks)
assert (masks[0] != masks[1]).any()
def own(x, squared):
    # The ranks' losses differ in weight, so that no sum is right by symmetry.
    rank = jax.lax.axis_index("d")
    return jax.lax.psum((f(x, rank) ** (2 if squared else 1)).sum() * (rank + 1), "d")
for squared in (False, True):
    loss = jax.shard_map(
        lambda x: own(x, squared), mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec()
    )
    inside = jax.shard_map(
        jax.grad(lambda x: own(x, squared)),
        mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(),
    )
    weights = masks * np.float32([1, 2])[:, None, None] * (4 if squared else 2)
    total = (weights * (x**2 if squared else x)).sum()
    slope = weights.sum(0) * (2 * x if squared else 1)
    for transform in (lambda g: g, jax.jit):
        np.testing.assert_allclose(transform(loss)(x), total, rtol=1e-6)
        np.testing.assert_allclose(transform(jax.grad(loss))(x), slope, rtol=1e-6)
        np.testing.assert_allclose(transform(inside)(x), slope, rtol=1e-6)
print("same")
"""


@pytest.mark.parametrize("what_differs", ["key", "start"])
def test_what_devices_share_has_the_gradients_of_all_their_masks(what_differs):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    run = [sys.executable, "-c", SHARED_BY_DEVICES, what_differs]
    actual = subprocess.run(run, env=environment, check=False, capture_output=True, text=True)
    assert actual.stdout.strip() == "same", actual.stderr


ASKED_FOR = """
import jax, jax.numpy as jnp
from unidrop import Key, keep_mask
first, second = jax.devices()
window = {"global_shape": (99, 8), "start": (jnp.int32(4), 0)}
print(keep_mask((3, 8), 0.4, Key(9), xp=jnp, device=second, **window).device == second)
"""


def test_a_mask_is_on_the_device_that_is_asked_for_wherever_its_window_s_start_is():
    assert shown_on_two_devices(ASKED_FOR) == "True"
