"""A rate that is an array: the bits of the eager call at each rate, by one trace for all of them.

`test_keras_schedule.py` tests the layers of Keras.
"""

from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
import torch
from array_libraries import from_torch, to_torch
from flax import nnx
from jax import numpy as jnp
from keras_models import assert_bits
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import unidrop
import unidrop.adapters.flax as for_flax
import unidrop.adapters.jax as for_jax
import unidrop.adapters.numpy as for_numpy
import unidrop.adapters.tensorflow as for_tensorflow
import unidrop.adapters.torch as for_torch
from unidrop import Key, family, keep_mask
from unidrop.adapters.jax import primitive
from unidrop.adapters.tensorflow import xla
from unidrop.adapters.torch.buffers import BUFFERS
from unidrop.library import get_library
from unidrop.plan import DropoutPlan
from unidrop.rate import KEEP_NOTHING, Rate
from unidrop.schedule import ScheduledRate

KEY = Key(42).fold_in("encoder/0")
X = (3 * np.random.default_rng(0).standard_normal((4, 6, 9))).astype("float32")
X[0, 0, :4] = (np.nan, np.inf, -np.inf, -0.0)

# From a warm-up without dropout to a rate that drops everything.
STEPS = 50
SCHEDULE = np.linspace(0, 1, STEPS).astype("float32")

EDGES = [0.0, -0.0, 5e-324, 1e-40, 2**-34, 2**-33, 3 * 2**-33, 9 * 2**-33, 11 * 2**-33, 0.1, 1 / 3]
EDGES += [0.5, 1 - 2**-24, 1 - 2**-32, 1 - 2**-33, 1 - 2**-34, 1 - 2**-53, 1.0]
BAD = [-0.1, 1.5, np.nextafter(np.float32(1), np.float32(2)), -1e-30, np.inf, np.nan]

MEMBERS = {
    "dropout": ("dropout", {}),
    "path": ("drop_path", {}),
    "path unscaled": ("drop_path", {"scale_by_keep": False}),
    "locked": ("locked_dropout", {"axis": 1}),
}
members = pytest.mark.parametrize(("name", "options"), MEMBERS.values(), ids=MEMBERS)


def in_core(name, x, p, step, **options):
    function = unidrop.dropout if name == "dropout" else getattr(family, name)
    return function(x, p, KEY.fold_in(step), **options)


def in_numpy(name, x, p, step, **options):
    return getattr(for_numpy, name)(x, p, key=KEY.fold_in(step), **options)


def in_jax(name, x, p, step, **options):
    return getattr(for_jax, name)(x, p, KEY.fold_in(step), **options)


def in_tensorflow(name, x, p, step, **options):
    return getattr(for_tensorflow, name)(x, p, key=KEY.fold_in(step), **options)


def in_torch(name, x, p, step, **options):
    options = {"batch_first": True} if "axis" in options else options
    return getattr(for_torch, name)(x, p, training=True, key=KEY.fold_in(step), **options)


def compile_torch(function):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True), lambda: counter.frame_count


def compile_jax(function):
    traces = []

    def counted(*arguments):
        traces.append(arguments)
        return function(*arguments)

    return jax.jit(counted), lambda: len(traces)


def compile_tensorflow(function, **options):
    function = tf.function(function, autograph=False, **options)
    return function, function.experimental_get_tracing_count


class Framework:
    """How a framework compiles, and converts arrays of NumPy."""

    def __init__(self, call, convert, compile, to_numpy=np.asarray):
        self.call, self.convert, self.compile, self.to_numpy = call, convert, compile, to_numpy


FRAMEWORKS = {
    "torch": Framework(in_torch, to_torch, compile_torch, from_torch),
    "jax": Framework(in_jax, jnp.asarray, compile_jax),
    "tensorflow": Framework(in_tensorflow, tf.constant, compile_tensorflow),
    "xla": Framework(in_tensorflow, tf.constant, lambda f: compile_tensorflow(f, jit_compile=True)),
}


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return FRAMEWORKS[request.param]


@pytest.fixture
def like_gpu(monkeypatch):
    """Let PyTorch treat tensors of the CPU as if reading them waited for a GPU."""
    monkeypatch.setattr(BUFFERS, "is_interpreted", True)
    with unidrop.force_path("portable"):
        yield


# --- The same bits, by one trace ------------------------------------------------------------------


@pytest.mark.slow
@members
def test_traces_once_for_all_rates(framework, name, options):
    function, count_traces = framework.compile(
        lambda x, p, step: framework.call(name, x, p, step, **options)
    )
    x = framework.convert(X)
    for step, p in enumerate(SCHEDULE):
        wanted = in_core(name, X, float(p), step, **options)
        y = function(x, framework.convert(p), framework.convert(np.int32(step)))
        assert_bits(framework.to_numpy(y), wanted)
    assert count_traces() == 1


@members
def test_takes_array_as_eager_rate(name, options):
    p = np.float32(0.3)
    wanted = in_core(name, X, float(p), 0, **options)
    for call, convert, to_numpy in (
        (in_core, np.asarray, np.asarray),
        (in_numpy, np.asarray, np.asarray),
        (in_torch, to_torch, from_torch),
        (in_jax, jnp.asarray, np.asarray),
        (in_tensorflow, tf.constant, np.asarray),
        (in_tensorflow, lambda x: tf.Variable(x) if np.ndim(x) == 0 else x, np.asarray),
    ):
        assert_bits(to_numpy(call(name, convert(X), convert(p), 0, **options)), wanted)


def as_dtype(dtype):
    return X.astype(getattr(ml_dtypes, dtype, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, xla.LEAST], ids=["small", "large"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_has_eager_bits_at_edges_in_tensorflow(dtype, size):
    x = as_dtype(dtype)
    x = x if size is None else np.resize(x, size)
    for jit_compile in (False, True):
        function, _ = compile_tensorflow(
            lambda x, p: in_tensorflow("dropout", x, p, 0), jit_compile=jit_compile
        )
        for p in EDGES:
            y = function(tf.constant(x), tf.constant(p, tf.float64))
            assert_bits(np.asarray(y), in_core("dropout", x, p, 0))


@pytest.mark.parametrize("x64", [False, True])
def test_has_eager_bits_at_edges_in_jax(x64):
    with jax.enable_x64(x64):
        for dtype in ("bfloat16", "complex64", "complex128" if x64 else "float32"):
            x = as_dtype(dtype)
            function, count_traces = compile_jax(lambda x, p: in_jax("dropout", x, p, 0))
            for p in EDGES if x64 else np.float32(EDGES):
                y = function(jnp.asarray(x), jnp.asarray(p))
                assert_bits(np.asarray(y), in_core("dropout", x, float(p), 0))
            assert count_traces() == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex128"])
def test_has_eager_bits_at_edges_on_gpu(dtype, like_gpu):
    x = to_torch(as_dtype(dtype))
    for p in EDGES:
        y = in_torch("dropout", x, torch.tensor(p, dtype=torch.float64), 0)
        assert_bits(from_torch(y), from_torch(in_torch("dropout", x, p, 0)))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0, 2**-33, 1 - 2**-24, 1.5, np.nan])
def test_has_eager_bits_in_programs_for_gpus_of_jax(p):
    x, p = jnp.asarray(X), np.float32(p)
    plan = DropoutPlan.from_args(x, ScheduledRate(None))
    lo, hi = map(np.uint32, KEY.words)
    options = {"plan": plan, "batch": (), "is_for_cpu": False}
    y = primitive._shared_rule(x, lo, hi, jnp.asarray(p), **options)
    if 0 <= p <= 1:
        assert_bits(np.asarray(y), unidrop.dropout(X, float(p), KEY))
    else:
        assert np.isnan(y).all()


# Signaling, quiet and negative NaN, and subnormals. A product by 1 would change some of them.
STRANGE = np.uint32([0x7F800001, 0x7FC00001, 0xFF812345, 1, 0x80000001, 0x80000000, 0x7F800000])


def test_returns_input_to_the_bit_at_rate_0(framework):
    x = framework.convert(STRANGE.view("float32"))
    function, _ = framework.compile(lambda x, p: framework.call("dropout", x, p, 0))
    y = function(x, framework.convert(np.float32(0)))
    assert framework.to_numpy(y).tobytes() == STRANGE.tobytes()


# --- The threshold and the scale ------------------------------------------------------------------


def make_rates():
    """Return rates in float64 of all magnitudes, near 1, and halfway between two thresholds."""
    rng = np.random.default_rng(1)
    small = rng.random(2000) * 2.0 ** -rng.integers(0, 60, 2000)
    halves = (rng.integers(0, 2**32, 2000) + 0.5) / 2**32
    return np.concatenate([EDGES, rng.random(2000), small, 1 - small, halves])


def as_numbers(p):
    """Return the thresholds, whether anything is kept, and the scales of an array of rates."""
    rate = ScheduledRate(p)
    threshold, keeps_some = rate.limits(get_library(p), None)
    return threshold, keeps_some, rate.scale_in("float64"), rate.scale_in("float32")


def check_numbers(numbers, rates):
    threshold, keeps_some, double, single = (np.asarray(number) for number in numbers)
    found = np.where(keeps_some, threshold.astype("int64"), KEEP_NOTHING)
    expected = [Rate.from_p(float(p)) for p in rates]
    assert found.tolist() == [rate.threshold for rate in expected]
    below = rates < 1
    for dtype, scale in (("float64", double), ("float32", single)):
        wanted = np.array([rate.scale_in(dtype) for rate in expected], dtype)
        assert_bits(scale[below], wanted[below])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_computes_specified_threshold_and_scale(dtype):
    rates = make_rates().astype(dtype)
    check_numbers(as_numbers(torch.from_numpy(rates)), rates)
    with jax.enable_x64(True):
        check_numbers(jax.jit(as_numbers)(jnp.asarray(rates)), rates)
    for jit_compile in (False, True):
        function, _ = compile_tensorflow(as_numbers, jit_compile=jit_compile)
        check_numbers(function(tf.constant(rates)), rates)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", BAD)
def test_rejects_known_rate_outside_0_and_1(p):
    calls = (in_core, np.asarray), (in_numpy, np.asarray), (in_torch, to_torch)
    for call, convert in (*calls, (in_jax, jnp.asarray), (in_tensorflow, tf.constant)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            call("dropout", convert(X), convert(np.float32(p)), 0)
    for make in (for_torch.Dropout, for_torch.DropPath):
        with pytest.raises(ValueError, match="between 0 and 1"):
            make(torch.tensor(p))
    for make in (for_flax.Dropout, for_flax.DropPath):
        with pytest.raises(ValueError, match="between 0 and 1"):
            make(nnx.Variable(jnp.float32(p)))


def test_returns_nan_for_bad_rate_of_program(framework):
    def call(x, p):
        y = framework.call("dropout", x, p, 0)
        return y, framework.call("dropout", x, p, 0, return_mask=True)

    function, _ = framework.compile(call)
    for dtype in ("float32", "complex64"):
        x = framework.convert(X.astype(dtype))
        for p in BAD:
            if framework is FRAMEWORKS["torch"]:  # the operator runs on the CPU, and raises
                with pytest.raises(ValueError, match="between 0 and 1"):
                    function(x, framework.convert(np.float32(p)))
                continue
            y, (again, mask) = function(x, framework.convert(np.float32(p)))
            assert not np.asarray(mask).any()
            for part in (np.real, np.imag) if dtype == "complex64" else (np.asarray,):
                assert np.isnan(part(np.asarray(y))).all()
                assert np.isnan(part(np.asarray(again))).all()


def test_returns_nan_for_bad_rate_on_gpu(like_gpu):
    for p in BAD:
        y, mask = for_torch.dropout(to_torch(X), torch.tensor(p), key=KEY, return_mask=True)
        assert y.isnan().all()
        assert not mask.any()
        options = {"key": KEY, "return_mask": True}
        call = partial(for_torch.dropout, p=torch.tensor(p), **options)
        _, mask = torch.vmap(call, randomness="same")(to_torch(X))
        assert not mask.any()


OTHERS = {
    "alpha": ("alpha_dropout", {}),
    "feature alpha": ("feature_alpha_dropout", {}),
    "key": ("drop_key", {}),
    "gaussian": ("gaussian_dropout", {}),
    "patch": ("patch_dropout", {}),
    "block": ("drop_block", {"block_size": 2, "axes": (1, 2)}),
}


@pytest.mark.parametrize(("name", "options"), OTHERS.values(), ids=OTHERS)
def test_rejects_array_for_formulas_that_need_a_number(name, options):
    match = r"dropout probability \w+ must be a Python int or float .*pass a Python float"
    function = getattr(family, name)
    with pytest.raises(TypeError, match=match):
        function(X, np.asarray(0.5), KEY, **options)
    with pytest.raises(TypeError, match=match):
        jax.jit(lambda p: in_jax(name, X, p, 0, **options))(0.5)
    if name != "feature_alpha_dropout":
        with pytest.raises(TypeError, match=match):
            in_tensorflow(name, X, tf.constant(0.5), 0, **options)
    if name != "drop_block":
        with pytest.raises(TypeError, match=match):
            getattr(for_torch, name)(to_torch(X), torch.tensor(0.5), key=KEY)


@pytest.mark.parametrize("name", ["AlphaDropout", "DropKey", "GaussianDropout", "PatchDropout"])
def test_rejects_array_in_modules_that_need_a_number(name):
    for make, p in ((getattr(for_torch, name), torch.tensor(0.5)), (getattr(for_flax, name), 0.5)):
        with pytest.raises(TypeError, match="must be a Python int or float"):
            make(p if isinstance(p, torch.Tensor) else jnp.float32(p))


def test_names_rate_where_formula_needs_its_number():
    with pytest.raises(TypeError, match=r"^rate must be a Python int or float"):
        family.plan_alpha_dropout(X, ScheduledRate(np.asarray(0.5), name="rate"))
    with pytest.raises(TypeError, match=r"^p must be a Python int or float"):
        family.plan_drop_key(X, ScheduledRate(np.asarray(0.5)))


def test_demands_kernels_that_need_a_number(like_gpu):
    with unidrop.force_path("fused"), pytest.raises(RuntimeError, match="its rate is an array"):
        for_torch.dropout(to_torch(X), torch.tensor(0.5), key=KEY)


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_has_gradient_of_x_from_the_key_and_none_of_the_rate():
    p, upstream = np.float32(0.25), np.ones_like(X)
    wanted = for_numpy.dropout_backward(upstream, float(p), key=KEY.fold_in(0))
    assert_bits(for_numpy.dropout_backward(upstream, np.asarray(p), key=KEY.fold_in(0)), wanted)
    for wrap in (lambda f: f, jax.jit):
        gradient = jax.grad(lambda x, p: in_jax("dropout", x, p, 0).sum(), argnums=(0, 1))
        of_x, of_p = wrap(gradient)(jnp.asarray(X), p)
        assert_bits(np.asarray(of_x), wanted)
        assert of_p == 0
        alone = jax.grad(lambda p: in_jax("dropout", jnp.ones(9), p, 0).sum())
        assert wrap(alone)(p) == 0

    @tf.function
    def differentiate(x, p):
        with tf.GradientTape() as tape:
            tape.watch((x, p))
            y = in_tensorflow("dropout", x, p, 0)
        of_x, of_p = tape.gradient(y, (x, p))
        assert of_p is None
        return of_x

    assert_bits(np.asarray(differentiate(tf.constant(X), tf.constant(p))), wanted)
    function, _ = compile_torch(lambda x, p: in_torch("dropout", x, p, 0))
    x = to_torch(X).requires_grad_()
    for call in (function, lambda x, p: in_torch("dropout", x, p, 0)):
        (of_x,) = torch.autograd.grad(call(x, torch.tensor(p)).sum(), x)
        assert_bits(from_torch(of_x), wanted)
    with pytest.raises(TypeError, match=r"p must not require a gradient: pass p\.detach"):
        in_torch("dropout", x, torch.tensor(p, requires_grad=True), 0)


def test_keeps_rate_of_forward_pass(like_gpu):
    p, x = torch.tensor(0.25), to_torch(X).requires_grad_()
    y = in_torch("dropout", x, p, 0)
    p.fill_(0.75)
    (of_x,) = torch.autograd.grad(y.sum(), x)
    wanted = for_numpy.dropout_backward(np.ones_like(X), 0.25, key=KEY.fold_in(0))
    assert_bits(from_torch(of_x), wanted)


# --- Transformations ------------------------------------------------------------------------------

RATES = np.float32([0, 0.25, 0.3, 1])


@pytest.mark.slow
def test_maps_over_rates():
    wanted = np.stack([in_core("dropout", X, float(p), i) for i, p in enumerate(RATES)])

    def call(p, step):
        return in_jax("dropout", jnp.asarray(X), p, step)

    numbers = jnp.asarray(RATES), jnp.arange(4)
    assert_bits(np.asarray(jax.vmap(call)(*numbers)), wanted)
    assert_bits(np.asarray(jax.jit(jax.vmap(call))(*numbers)), wanted)
    assert_bits(np.asarray(jax.lax.map(lambda pair: call(*pair), numbers)), wanted)
    _, scanned = jax.lax.scan(lambda step, p: (step + 1, call(p, step)), 0, numbers[0])
    assert_bits(np.asarray(scanned), wanted)
    with pytest.raises(ValueError, match=r"between 0 and 1, but got 2\.0"):
        jax.vmap(call)(2 * numbers[0], numbers[1])
    shared = np.stack([in_core("dropout", X, float(p), 0) for p in RATES])
    assert_bits(np.asarray(jax.jit(jax.vmap(call, (0, None)))(numbers[0], 0)), shared)
    mapped = torch.vmap(lambda p: in_torch("dropout", to_torch(X), p, 0))(torch.tensor(RATES))
    assert_bits(from_torch(mapped), shared)
    x, p = torch.stack([to_torch(X)] * 4), torch.tensor(RATES[2])
    same = torch.vmap(lambda x: in_torch("dropout", x, p, 0), randomness="same")(x)
    assert_bits(from_torch(same[3]), shared[2])


@pytest.mark.parametrize(
    ("compile", "convert", "xp"),
    [
        (lambda f: f, jnp.asarray, jnp),
        (jax.jit, jnp.asarray, jnp),
        (lambda f: compile_tensorflow(f)[0], tf.constant, tf),
        (lambda f: compile_torch(f)[0], to_torch, torch),
    ],
    ids=["eager", "jax", "tensorflow", "torch"],
)
def test_returns_mask_of_array(compile, convert, xp):
    function = compile(lambda p: keep_mask((60,), p, KEY, xp=xp))
    for p in RATES:
        wanted = keep_mask((60,), float(p), KEY)
        assert np.array_equal(np.asarray(function(convert(p))), wanted)


def test_calls_kernels_in_programs_of_jax():
    program = jax.jit(lambda x, p: for_jax.dropout(x, p, KEY))
    assert "custom-call" in program.lower(X, np.float32(0.5)).compile().as_text()


def test_reads_variable_when_graph_runs():
    rate = tf.Variable(0.25)
    function = tf.function(lambda x: for_tensorflow.dropout(x, rate, key=KEY))
    for p in RATES:
        rate.assign(p)
        assert_bits(np.asarray(function(X)), unidrop.dropout(X, float(p), KEY))


def test_accepts_unknown_lengths_in_tensorflow():
    signature = [tf.TensorSpec([None]), tf.TensorSpec([], tf.float32)]
    function = tf.function(
        lambda x, p: for_tensorflow.dropout(x, p, key=KEY), input_signature=signature
    )
    for size in (100, xla.LEAST + 1):
        x = np.ones(size, "float32")
        assert_bits(np.asarray(function(x, 0.25)), unidrop.dropout(x, 0.25, KEY))


# --- Layers ---------------------------------------------------------------------------------------

MODULES = {
    "Dropout": (for_torch.Dropout, {}, X),
    "Dropout2d": (for_torch.Dropout2d, {}, X[..., None]),
    "DropPath": (for_torch.DropPath, {}, X),
    "StochasticDepth": (for_torch.StochasticDepth, {"mode": "batch"}, X),
    "LockedDropout": (for_torch.LockedDropout, {}, X),
}


@pytest.mark.parametrize(("make", "options", "x"), MODULES.values(), ids=MODULES)
def test_follows_tensor_of_module_in_one_graph(make, options, x):
    scheduled = make(torch.tensor(0.0), seed=KEY, **options)
    eager, plain = make(torch.tensor(0.0), seed=KEY, **options), make(0.0, seed=KEY, **options)
    function, count_traces = compile_torch(scheduled)
    x = to_torch(x)
    for p in (0.0, 0.25, 0.3, 0.0, 1.0, 0.5):
        scheduled.p.fill_(p)
        eager.p.fill_(p)
        plain.p = float(scheduled.p)
        wanted = from_torch(plain(x))
        assert_bits(from_torch(function(x)), wanted)
        assert_bits(from_torch(eager(x)), wanted)
    assert count_traces() == 1
    assert scheduled.calls == eager.calls == plain.calls == 4  # a call at rate 0 does not count


def test_counts_no_call_at_rate_0_on_gpu(like_gpu):
    module = for_torch.Dropout(torch.tensor(0.0), seed=KEY)
    for p in (0.0, 0.5, 0.0, 0.5):
        module.p.fill_(p)
        number = int(module.calls)
        y = module(to_torch(X))
        assert_bits(from_torch(y), unidrop.dropout(X, p, KEY.fold_in(number)))
    assert module.calls == 2


@pytest.mark.slow
def test_recomputes_masks_of_scheduled_rate_in_checkpoint():
    linear = torch.nn.Linear(9, 9)
    scheduled = torch.nn.Sequential(linear, for_torch.Dropout(torch.tensor(0.0), seed=KEY), linear)
    plain = torch.nn.Sequential(linear, for_torch.Dropout(0.0, seed=KEY), linear)
    function, count_traces = compile_torch(lambda x: checkpoint(scheduled, x, use_reentrant=False))
    x = torch.linspace(-1, 1, 45).reshape(5, 9)
    for p in (0.0, 0.5, 0.25):
        scheduled[1].p.fill_(p)
        plain[1].p = p
        y, wanted = function(x), plain(x)
        assert torch.equal(y, wanted)
        weights = list(linear.parameters())
        gradients = zip(
            torch.autograd.grad(y.sum(), weights),
            torch.autograd.grad(wanted.sum(), weights),
            strict=True,
        )
        assert all(torch.allclose(a, b) for a, b in gradients)
    assert count_traces() == 1


def test_shows_and_copies_tensor_of_module():
    module = for_torch.DropPath(torch.tensor(0.25))
    assert "drop_prob=0.250" in repr(module)
    module.drop_prob = torch.tensor(0.5)
    assert module.p == 0.5
    with pytest.raises(ValueError, match=r"drop_prob .*between 0 and 1"):
        module.drop_prob = torch.tensor(2.0)


@pytest.mark.parametrize("kind", ["variable", "array"])
@pytest.mark.parametrize("make", [for_flax.Dropout, for_flax.DropPath])
def test_follows_array_of_flax_module_in_one_program(make, kind):
    scheduled = make(
        nnx.Variable(jnp.float32(0)) if kind == "variable" else jnp.float32(0), seed=KEY
    )
    plain, traces = make(0.0, seed=KEY), []

    @nnx.jit
    def function(module, x):
        traces.append(module)
        return module(x)

    for p in np.float32([0, 0.25, 0.3, 0, 1, 0.5]):
        if kind == "variable":
            scheduled.rate.set_value(jnp.float32(p))
        else:
            scheduled.rate = jnp.float32(p)
        plain.rate = float(p)
        wanted = np.asarray(plain(jnp.asarray(X)))
        assert_bits(np.asarray(function(scheduled, X)), wanted)
    assert len(traces) == 1
    assert int(scheduled.calls.get_value()) == int(plain.calls.get_value()) == 4


@pytest.mark.parametrize("is_counted", [True, False])
def test_keeps_rate_of_a_compiled_call_for_its_backward_pass(is_counted):
    layer = for_torch.Dropout(torch.tensor(0.5), seed=KEY)
    compiled, _ = compile_torch(layer)
    x = torch.ones(64, requires_grad=True)
    y = compiled(x)
    (layer.p if is_counted else layer.p.data).fill_(0.1)
    y.sum().backward()
    assert torch.equal(x.grad, y)
