"""What JAX keeps for the backward pass, what it compiles, and when."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_by_the_core import KEY, RATE, assert_bits, step_function, values, wanted

import unidrop
from unidrop.adapters.jax import dropout


@pytest.mark.parametrize("size", [1000, 40000])
@pytest.mark.parametrize("mapped", [False, True])
def test_keeps_nothing_of_array_size_for_backward_pass(size, mapped):
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


def test_passes_key_alone_to_separate_backward_pass():
    @jax.jit
    def forward(x, step):
        return jax.vjp(lambda v: step_function(v, step), x)

    y, pullback = forward(values((5000,)), 3)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pullback)) <= 8
    assert_bits(jax.jit(lambda f, u: f(u)[0])(pullback, y), wanted(y, KEY.fold_in(3)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, key: dropout(x, RATE, key, return_mask=True),
        lambda x, key: unidrop.keep_mask(x.shape, RATE, key, xp=jnp),
    ],
    ids=["returned mask", "keep_mask"],
)
def test_makes_mask_once_by_its_operation(function):
    operations = [
        equation.primitive.name
        for equation in jax.make_jaxpr(function)(jnp.ones((3, 70)), KEY).eqns
    ]
    assert operations.count("unidrop_dropout") == 1
    assert len(operations) < 20  # the generator alone has some hundred


def test_refuses_mask_in_program_on_fused_path():
    with unidrop.force_path("fused"), pytest.raises(RuntimeError, match="demands fused kernels"):
        jax.jit(lambda: unidrop.keep_mask((33,), RATE, KEY, xp=jnp))()


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
def test_traces_100_steps_once(name, transform):
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


def test_compiles_one_program_for_eager_steps():
    from unidrop.adapters.jax import primitive

    x = jnp.ones((3, 11))
    with unidrop.force_path("portable"):
        dropout(x, 0.123, KEY)
        before = primitive._run._cache_size()
        for step in range(20):
            assert_bits(dropout(x, 0.123, KEY.fold_in(step)), wanted(x, KEY.fold_in(step), 0.123))
    assert primitive._run._cache_size() == before


@pytest.mark.parametrize("size", [100, 40000])
def test_holds_generator_once_for_key_and_once_for_mask(size):
    with unidrop.force_path("portable"):
        program = jax.jit(step_function).lower(jnp.ones(size), 0).compile().as_text()
    # The mask needs 20 for its rounds and a few for its elements; the key's loop needs one round's.
    assert 20 <= program.count(" multiply(") <= 50
    # Without the keys of each round, which XLA would move out of the loop.
    assert program.count(" fusion(") <= 25


def test_shares_lowered_code_between_layers_of_one_shape():
    def layers(x, number):
        for site in range(number):
            x = jnp.sin(dropout(x, RATE, KEY.fold_in(site)))
        return x.sum()

    x = jnp.ones((3, 5))
    with unidrop.force_path("portable"):
        texts = [jax.jit(jax.grad(partial(layers, number=n))).lower(x).as_text() for n in (1, 9)]
    once, often = (text.count(str(0xD2511F53)) for text in texts)
    assert often == once > 0


def test_exports_function_of_several_platforms():
    x = values((33,))
    exported = jax.export.export(jax.jit(step_function), platforms=["cpu", "cuda", "tpu"])(x, 3)
    assert_bits(exported.call(x, 3), wanted(x, KEY.fold_in(3)))


def test_exports_symbolic_shapes_without_dropout_only():
    batch = jax.export.symbolic_shape("batch")
    like, x = jax.ShapeDtypeStruct((*batch, 8), "float32"), values((3, 8))
    for options in ({"deterministic": True}, {"return_mask": True, "deterministic": True}):
        exported = jax.export.export(jax.jit(partial(dropout, rate=0.5, key=KEY, **options)))(like)
        y, *mask = jax.tree.leaves(exported.call(x))
        assert_bits(y, x)
        assert all(kept.all() and kept.shape == (3, 8) for kept in mask)
    with pytest.raises(TypeError, match=r"^x must have a shape of integers, got \(batch, 8\)"):
        jax.export.export(jax.jit(partial(dropout, rate=0.5, key=KEY)))(like)


def test_gives_threads_masks_of_their_keys():
    x = values((50, 3))
    f = jax.jit(step_function)
    with ThreadPoolExecutor(8) as pool:
        for step, y in enumerate(pool.map(lambda s: np.asarray(f(x, s)), range(32))):
            assert_bits(y, wanted(x, KEY.fold_in(step)))


def test_gives_same_bits_compiled_ahead_of_time():
    x = values((40, 512))
    compiled = jax.jit(step_function).lower(x, 0).compile()
    assert_bits(compiled(x, 3), wanted(x, KEY.fold_in(3)))


LOADING = """
import sys
import numpy as np
from jax import export
function = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
x = np.load(sys.argv[2])
steps = [(function.call(x, n), function.vjp().call(x, n, x)[0]) for n in range(20)]
np.save(sys.argv[3], steps)
assert "unidrop" not in sys.modules
"""


@pytest.mark.slow
def test_runs_exported_function_without_unidrop(tmp_path):
    x = values((33, 600))
    exported = jax.export.export(jax.jit(step_function))(x, 3)
    (tmp_path / "f").write_bytes(exported.serialize(vjp_order=1))
    np.save(tmp_path / "x.npy", x)
    files = [str(tmp_path / name) for name in ("f", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", LOADING, *files], check=True)
    steps = np.load(tmp_path / "y.npy")
    assert len(steps) == 20
    for number, results in enumerate(steps):
        for actual in results:
            assert_bits(actual, wanted(x, KEY.fold_in(number)))
