"""Dropout for JAX: keys, transformations, what the backward pass keeps, and what is compiled."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax

import unidrop
from unidrop import Key
from unidrop.adapters.jax import dropout

KEY = Key(42).fold_in("encoder/0")
RATE = 0.3


def values(shape, dtype="float32"):
    return np.linspace(-2, 2, int(np.prod(shape)), dtype=dtype).reshape(shape)


def wanted(x, key=KEY, rate=RATE, **options):
    with unidrop.only("portable"):
        return unidrop.dropout(np.asarray(x), rate, key, **options)


def assert_bits(came, expected):
    came = np.asarray(came)
    assert came.dtype == expected.dtype
    assert came.shape == expected.shape
    assert came.tobytes() == expected.tobytes()


def step_function(x, step):
    return dropout(x, RATE, KEY.fold_in(step))


# --- Values ---------------------------------------------------------------------------------------


# Around the sizes at which the program changes: a block, a word of blocks, few blocks and many.
@pytest.mark.parametrize("size", [1, 7, 8, 33, 16383, 16384, 16385, 16416, 20001])
def test_the_mask_is_the_specifications_at_any_size(size):
    y = jax.jit(step_function)(jnp.ones(size), 5)
    mask = reference.keep_mask((size,), RATE, int(KEY.fold_in(5)))
    assert (np.asarray(y) != 0).astype(int).tolist() == mask


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("shape", [(5, 13), (3, 20000)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"broadcast_axes": (0,)},
        {"global_shape": (100, 30000), "start": (7, 13)},
        {"global_shape": (100, 2**35), "start": (7, 2**34 + 5)},
    ],
    ids=str,
)
def test_windows_and_broadcast_axes_are_the_cores(x64, shape, options):
    x = values(shape)
    with jax.enable_x64(x64):
        own = {("broadcast_dims" if n == "broadcast_axes" else n): v for n, v in options.items()}
        y = jax.jit(lambda x: dropout(x, RATE, KEY, **own))(jnp.asarray(x))
    assert_bits(y, wanted(x, **options))


@pytest.mark.parametrize("whole", [(64, 24), (64, 13)], ids=["whole blocks", "odd rows"])
def test_a_start_may_be_traced(whole):
    x = values((4, whole[1]))
    f = jax.jit(lambda x, row: dropout(x, RATE, KEY, global_shape=whole, start=(row, 0)))
    for row in (0, 3, 60):
        assert_bits(f(x, row), wanted(x, global_shape=whole, start=(row, 0)))


@pytest.mark.parametrize("size", [34, 20000])
def test_the_bits_are_the_same_with_64_bit_numbers_and_without(size):
    x = values((size,))
    with jax.enable_x64(True):
        wide = np.asarray(jax.jit(step_function)(x, 3))
        mask = unidrop.keep_mask((size,), RATE, KEY.fold_in(3), xp=jnp)
    narrow = unidrop.keep_mask((size,), RATE, KEY.fold_in(3), xp=jnp)
    assert_bits(wide, wanted(x, KEY.fold_in(3)))
    assert_bits(narrow, np.asarray(mask))
    assert_bits(narrow, wide != 0)


def test_a_double_lowered_outside_the_world_it_was_traced_in_keeps_its_dtype():
    x = values((100,), "float64")
    with jax.enable_x64(True):
        traced = jax.jit(lambda x: dropout(x, RATE, KEY)).trace(jnp.asarray(x))
        y = traced.lower().compile()(jnp.asarray(x))
    assert_bits(y, wanted(x))


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
def test_numpy_arrays_are_taken_as_jax_numpy_takes_them(dtype):
    x = values((33,)).astype(dtype)
    y = dropout(x, RATE, KEY)
    assert isinstance(y, jax.Array)
    assert_bits(y, wanted(x))


def test_a_python_number_is_a_0_d_array():
    assert dropout(1.0, 0.999999, KEY).shape == ()


@pytest.mark.parametrize("x", [[1.0, 2.0], "x", None], ids=str)
def test_what_is_no_array_raises(x):
    with pytest.raises(TypeError, match=r"x has to be a jax\.Array"):
        dropout(x, RATE, KEY)


def test_deterministic_and_rate_0_return_x_and_need_no_key():
    x = jnp.ones(3)
    assert dropout(x, RATE, deterministic=True) is x
    assert dropout(x, 0.0) is x
    y, mask = dropout(x, RATE, deterministic=True, return_mask=True)
    assert y is x
    assert mask.all()


def test_the_mask_that_is_returned_is_the_one_applied():
    x = jnp.ones((5, 7))
    y, mask = jax.jit(lambda x: dropout(x, RATE, KEY, return_mask=True))(x)
    assert_bits(np.asarray(y) != 0, np.asarray(mask))
    assert_bits(y, wanted(x))


@pytest.mark.parametrize("rate", [float("nan"), -0.1, 1.1])
def test_a_bad_rate_raises_and_is_named(rate):
    with pytest.raises(ValueError, match="rate has to be between 0 and 1"):
        dropout(jnp.ones(3), rate, KEY)


def test_a_traced_rate_raises():
    with pytest.raises(TypeError, match="rate has to be a Python int or float"):
        jax.jit(lambda rate: dropout(jnp.ones(3), rate, KEY))(0.5)


# --- Keys -----------------------------------------------------------------------------------------


def test_a_key_of_jax_is_the_key_of_its_64_bits():
    data = np.array([0x89ABCDEF, 0x01234567], np.uint32)
    expected = wanted(values((50,)), Key(0x89ABCDEF01234567))
    for key in (data, jnp.asarray(data), jax.random.wrap_key_data(jnp.asarray(data))):
        assert_bits(dropout(values((50,)), RATE, key), expected)
        assert_bits(jax.jit(lambda x, k: dropout(x, RATE, k))(values((50,)), key), expected)


@pytest.mark.parametrize("name", ["rbg", "unsafe_rbg"])
def test_a_key_of_another_generator_raises_and_names_it(name):
    with pytest.raises(ValueError, match=name):
        dropout(jnp.ones(3), RATE, jax.random.key(0, impl=name))
    with pytest.raises(ValueError, match="rbg"):
        dropout(jnp.ones(3), RATE, jax.random.PRNGKey(0, impl=name))


@pytest.mark.parametrize(
    "keys",
    [
        lambda: jax.random.split(jax.random.key(0), 3),
        lambda: jax.random.split(jax.random.PRNGKey(0), 3),
        lambda: jax.vmap(Key(0).fold_in)(jnp.arange(3)),
    ],
    ids=["typed", "raw", "Key"],
)
def test_a_batch_of_keys_raises_and_says_what_to_do(keys):
    with pytest.raises(ValueError, match=r"a batch of them, of shape \(3,\): apply jax\.vmap"):
        dropout(jnp.ones(3), RATE, keys())


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "function",
    [
        lambda k: unidrop.dropout(jnp.ones(3), RATE, k),
        lambda k: unidrop.keep_mask((3,), RATE, k, xp=jnp),
    ],
    ids=["dropout", "keep_mask"],
)
def test_the_core_refuses_a_batch_of_keys_and_says_what_to_do(transform, function):
    keys = jax.vmap(Key(0).fold_in)(jnp.arange(3))
    with pytest.raises(ValueError, match=r"a batch of them, of shape \(3,\): map the function"):
        transform(function)(keys)


@pytest.mark.parametrize("key", [42, None, jnp.ones(2), "key", np.uint32(3)], ids=repr)
def test_what_is_no_key_raises(key):
    with pytest.raises(TypeError, match=r"key has to be a unidrop\.Key"):
        dropout(jnp.ones(3), RATE, key)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63 + 5, 2**64 - 1])
def test_a_key_goes_through_a_tree_as_itself(seed):
    key = Key(seed)
    leaves, tree = jax.tree.flatten(key)
    assert [leaf.dtype for leaf in leaves] == [np.uint32, np.uint32]
    assert jax.tree.unflatten(tree, leaves) == key
    lo, hi = jax.jit(lambda k: k.words)(key)
    assert int(hi) << 32 | int(lo) == seed


@pytest.mark.parametrize(
    "leaf",
    [None, object(), 0, jax.ShapeDtypeStruct((), "uint32"), "leaf", jnp.zeros(3)],
    ids=["None", "object", "axis", "shape", "text", "array"],
)
def test_a_key_holds_whatever_a_tree_puts_for_a_word(leaf):
    held = jax.tree.map(lambda _: leaf, KEY)
    assert isinstance(held, Key)
    assert held.words == (leaf, leaf)
    assert held == held
    assert isinstance(hash(held), int)
    assert repr(held)
    assert jax.tree.leaves(held, is_leaf=lambda v: v is None) == [leaf, leaf]


def test_axes_may_stand_for_words():
    keys = jax.vmap(Key(1).fold_in)(jnp.arange(3))
    axes = jax.tree.map(lambda _: 0, keys)
    y = jax.vmap(lambda k, x: dropout(x, RATE, k), in_axes=(axes, None))(keys, jnp.ones(9))
    for i in range(3):
        assert_bits(y[i], wanted(np.ones(9, "float32"), Key(1).fold_in(i)))


def test_a_key_is_carried_by_a_scan_in_both_worlds():
    def turn(key, _):
        key = key.fold_in(1)
        return key, key.words

    expected = KEY
    for _ in range(3):
        expected = expected.fold_in(1)
    for x64 in (False, True):
        with jax.enable_x64(x64):
            lo, hi = lax.scan(turn, KEY, None, length=3)[0].words
        assert int(hi) << 32 | int(lo) == int(expected)


@pytest.mark.parametrize("step", [np.int32(7), np.uint32(2**32 - 1), np.int32(-1), 7, np.uint8(7)])
def test_a_step_is_zero_extended_whatever_its_dtype(step):
    x = values((33,))
    number = int(step) % 2**32
    assert_bits(jax.jit(step_function)(x, step), wanted(x, KEY.fold_in(number)))


def test_a_numpy_step_inside_a_trace_is_its_number():
    x = values((33,))
    y = jax.jit(lambda x: step_function(x, np.int64(2**40)))(x)
    assert_bits(y, wanted(x, KEY.fold_in(2**40)))


def test_a_step_that_is_differentiated_too_has_no_gradient():
    x = values((33,))

    def function(x, step):
        return step_function(x, step).sum()

    gradient, none = jax.grad(function, argnums=(0, 1), allow_int=True)(x, 3)
    assert_bits(gradient, wanted(np.ones_like(x), KEY.fold_in(3)))
    assert none.dtype == jax.dtypes.float0


# --- Transformations ------------------------------------------------------------------------------


def squares(x, step):
    return (step_function(x, step) ** 2).sum() / 2


def twice(x, step):
    """The gradient of `squares`: the scale and the mask, applied twice."""
    key = KEY.fold_in(step)
    return wanted(wanted(x, key), key)


GRADIENTS = {
    "grad": jax.grad(squares),
    "value_and_grad": lambda x, s: jax.value_and_grad(squares)(x, s)[1],
    "jit of grad": jax.jit(jax.grad(squares)),
    "grad of jit": jax.grad(jax.jit(squares)),
    "grad of checkpoint": jax.grad(jax.checkpoint(squares)),
    "grad of checkpoint with a policy": jax.grad(
        jax.checkpoint(squares, policy=jax.checkpoint_policies.dots_saveable)
    ),
    "checkpoint of checkpoint": jax.grad(jax.checkpoint(jax.checkpoint(squares))),
    "linearize": lambda x, s: jax.linear_transpose(jax.linearize(lambda v: squares(v, s), x)[1], x)(
        np.float32(1)
    )[0],
    "jacfwd": lambda x, s: jax.jacfwd(squares)(x, s),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_by_the_mask_of_the_key(name):
    x = values((23,))
    np.testing.assert_allclose(GRADIENTS[name](x, 3), twice(x, 3), rtol=1e-6)


def test_forward_mode_is_dropout_of_the_tangent():
    x, t = values((33,)), values((33,))[::-1].copy()
    y, tangent = jax.jvp(lambda v: step_function(v, 2), (x,), (t,))
    assert_bits(y, wanted(x, KEY.fold_in(2)))
    assert_bits(tangent, wanted(t, KEY.fold_in(2)))


def test_the_hessian_of_half_the_squares_is_diagonal_with_the_squared_scale():
    hessian = jax.hessian(lambda v: squares(v, 4))(jnp.asarray(values((9,))))
    np.testing.assert_allclose(hessian, np.diag(twice(np.ones(9, "float32"), 4)), rtol=1e-6)


@pytest.mark.parametrize("size", [9, 20001])
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 0)], ids=str)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_vmap_over_arrays_and_keys_is_each_call_by_itself(size, axes, transform):
    xs, steps = values((3, size)), np.arange(3, dtype=np.int32)
    x = {0: xs, 1: xs.T, None: xs[0]}[axes[0]]
    step = steps if axes[1] == 0 else steps[1]
    ys = transform(jax.vmap(step_function, in_axes=axes))(x, step)
    for i in range(3):
        row, number = xs[0 if axes[0] is None else i], int(1 if axes[1] is None else i)
        assert_bits(ys[i], wanted(row, KEY.fold_in(number)))


def test_vmap_of_vmap_and_its_gradient_are_each_call_by_itself():
    xs, steps = values((2, 3, 17)), jnp.arange(6).reshape(2, 3)
    ys = jax.vmap(jax.vmap(step_function))(xs, steps)
    gradients = jax.jit(jax.grad(lambda x: jax.vmap(jax.vmap(squares))(x, steps).sum()))(xs)
    for i, j in np.ndindex(2, 3):
        assert_bits(ys[i, j], wanted(xs[i, j], KEY.fold_in(3 * i + j)))
        np.testing.assert_allclose(gradients[i, j], twice(xs[i, j], 3 * i + j), rtol=1e-6)


def test_a_window_whose_start_is_mapped_is_each_window_by_itself():
    x, whole = values((4, 13)), (12, 13)
    f = jax.vmap(lambda row: dropout(x, RATE, KEY, global_shape=whole, start=(row, 0)))
    for i, y in enumerate(f(jnp.arange(3) * 4)):
        assert_bits(y, wanted(x, global_shape=whole, start=(4 * i, 0)))


LOOPS = {
    "scan": lambda x: lax.scan(lambda x, s: (step_function(x, s), None), x, jnp.arange(4))[0],
    "fori_loop": lambda x: lax.fori_loop(0, 4, lambda s, x: step_function(x, s), x),
    "while_loop": lambda x: lax.while_loop(
        lambda c: c[0] < 4, lambda c: (c[0] + 1, step_function(c[1], c[0])), (0, x)
    )[1],
    "scan of checkpoint": lambda x: lax.scan(
        jax.checkpoint(lambda x, s: (step_function(x, s), None)), x, jnp.arange(4)
    )[0],
}


@pytest.mark.parametrize("name", LOOPS)
def test_in_a_loop_each_turn_has_the_mask_of_its_step(name):
    x = expected = values((64,)) + np.float32(3)
    for step in range(4):
        expected = wanted(expected, KEY.fold_in(step))
    assert_bits(jax.jit(LOOPS[name])(x), expected)


@pytest.mark.parametrize("name", ["scan", "scan of checkpoint"])
def test_the_gradient_of_a_loop_is_by_all_its_masks(name):
    x = values((16,))
    expected = np.ones(16, "float32")
    for step in reversed(range(4)):
        expected = wanted(expected, KEY.fold_in(step))
    assert_bits(jax.grad(lambda x: LOOPS[name](x).sum())(x), expected)


def test_a_donated_array_is_dropped_from():
    x = values((64,))
    y = jax.jit(step_function, donate_argnums=0)(jnp.array(x), 3)
    assert_bits(y, wanted(x, KEY.fold_in(3)))


def test_shapes_are_known_without_computing():
    shape = jax.eval_shape(step_function, jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), 1)
    assert (shape.shape, shape.dtype) == ((3, 4), jnp.bfloat16)


# --- What is kept, and what is compiled -----------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 40000])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_backward_pass_keeps_nothing_of_the_arrays_size(size, mapped):
    f = step_function
    if mapped:
        f = jax.vmap(f)
        x, step = jnp.ones((2, size)), jnp.arange(2)
    else:
        x, step = jnp.ones(size), jnp.asarray(3)
    _, linear = jax.vjp(lambda v: f(v, step), x)
    kept = [leaf for leaf in jax.tree.leaves(linear) if hasattr(leaf, "shape")]
    assert kept
    assert max(np.size(leaf) for leaf in kept) <= 2


def test_a_backward_pass_in_a_program_of_its_own_is_given_the_key_alone():
    @jax.jit
    def forward(x, step):
        return jax.vjp(lambda v: step_function(v, step), x)

    y, pullback = forward(values((5000,)), 3)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pullback)) <= 8
    assert_bits(jax.jit(lambda f, u: f(u)[0])(pullback, y), wanted(y, KEY.fold_in(3)))


STEPS = {
    "a step": (step_function, lambda n: n),
    "a Key": (lambda x, key: dropout(x, RATE, key), lambda n: KEY.fold_in(n)),
    "a key of jax": (
        lambda x, key: dropout(x, RATE, key),
        lambda n: jax.random.fold_in(jax.random.key(0), n),
    ),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("transform", [lambda f: f, jax.grad], ids=["forward", "gradient"])
def test_nothing_is_traced_again_over_100_steps(name, transform):
    function, argument = STEPS[name]
    traces = []

    def counted(x, key):
        traces.append(1)
        return function(x, key).sum()

    compiled = jax.jit(transform(counted))
    x = jnp.ones(33)
    sums = {np.asarray(compiled(x, argument(n))).tobytes() for n in range(100)}
    assert len(traces) == 1
    assert compiled._cache_size() == 1
    assert len(sums) > 10


def test_eager_calls_compile_one_program_for_all_steps():
    from unidrop.adapters.libraries import jax_dropout

    x = jnp.ones((3, 11))
    with unidrop.only("portable"):
        dropout(x, 0.123, KEY)
        before = jax_dropout._run._cache_size()
        for step in range(20):
            assert_bits(dropout(x, 0.123, KEY.fold_in(step)), wanted(x, KEY.fold_in(step), 0.123))
    assert jax_dropout._run._cache_size() == before


def test_threads_get_the_masks_of_their_keys():
    x = values((50, 3))
    f = jax.jit(step_function)
    with ThreadPoolExecutor(8) as pool:
        for step, y in enumerate(pool.map(lambda s: np.asarray(f(x, s)), range(32))):
            assert_bits(y, wanted(x, KEY.fold_in(step)))


def test_ahead_of_time_compilation_gives_the_same():
    x = values((40, 512))
    compiled = jax.jit(step_function).lower(x, 0).compile()
    assert_bits(compiled(x, 3), wanted(x, KEY.fold_in(3)))


LOADING = """
import sys
import numpy as np
from jax import export
function = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
x = np.load(sys.argv[2])
np.save(sys.argv[3], [function.call(x, 3), function.vjp().call(x, 3, x)[0]])
assert "unidrop" not in sys.modules
"""


def test_an_exported_function_runs_where_unidrop_is_not_imported(tmp_path):
    x = values((33, 600))
    exported = jax.export.export(jax.jit(step_function))(x, 3)
    (tmp_path / "f").write_bytes(exported.serialize(vjp_order=1))
    np.save(tmp_path / "x.npy", x)
    files = [str(tmp_path / name) for name in ("f", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", LOADING, *files], check=True)
    for came in np.load(tmp_path / "y.npy"):
        assert_bits(came, wanted(x, KEY.fold_in(3)))


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
        with unidrop.only("portable"):
            wanted = unidrop.dropout(x, 0.3, Key(42).fold_in(3))
        for g in (f, jax.grad(lambda v, s: (f(v, s) * jax.lax.stop_gradient(v)).sum())):
            compiled = jax.jit(g).lower(placed, 3).compile()
            text = compiled.as_text()
            assert not re.search("all-|collective-permute|reduce-scatter", text), (shape, spec)
            assert (np.asarray(compiled(placed, 3)) == wanted).all(), (shape, spec, kind)
print("same")
"""


def test_a_partitioned_program_has_the_whole_mask_and_no_communication():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    run = [sys.executable, "-c", TWO_DEVICES]
    shown = subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "same"


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
    came = subprocess.run(run, env=environment, check=False, capture_output=True, text=True)
    assert came.stdout.strip() == "same", came.stderr
