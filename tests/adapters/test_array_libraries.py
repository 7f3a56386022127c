"""Arrays of each framework in the core, where the matrix does not look: keys, starts, errors."""

import re
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tensorflow as tf
import torch
from array_libraries import LIBRARIES
from standard_arrays import KEY, SITE, assert_mask, assert_output, expected_mask, patterns

import unidrop
from unidrop import Key, dropout, keep_mask
from unidrop.library import get_library


def in_use(request):
    found = LIBRARIES[request.param]
    with found.context(), unidrop.force_path("portable"):
        yield found


library = pytest.fixture(in_use, params=LIBRARIES, name="library")
# Each with 64-bit integers.
wide = pytest.fixture(in_use, params=[name for name in LIBRARIES if name != "jax"], name="wide")


def key_number(key):
    """Return the number of a key of arrays."""
    lo, hi = (int(word) for word in key.words)
    return hi << 32 | lo


# --- Devices -------------------------------------------------------------------------------------


def test_knows_arrays_of_the_cpu(library):
    x = library.array(np.ones(3, np.float32))
    assert get_library(x).arrays.is_on_cpu(x)


def test_knows_tensors_of_other_devices():
    x = torch.ones(3, device="meta")
    assert not get_library(x).arrays.is_on_cpu(x)


# --- Keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_folds_in_array_as_its_bits(wide, bits):
    for dtype in (f"int{bits}", f"uint{bits}"):
        info = np.iinfo(dtype)
        for value in (7, int(info.min), int(info.max)):
            key = SITE.fold_in(wide.scalar(value, dtype))
            expected = reference.fold_in(int(SITE), value % 2**bits)
            assert key_number(key) == expected, (dtype, value)


def test_folds_on_from_array(library):
    key = SITE.fold_in(library.scalar(7))
    assert key.is_traced
    for data in (3, 2**40 + 3, 2**64 - 1, "b", ""):
        assert key_number(key.fold_in(data)) == int(SITE.fold_in(7).fold_in(data))
    assert key_number(key.fold_in(library.scalar(8))) == int(SITE.fold_in(7).fold_in(8))


def test_zero_extends_negative_step(library):
    key = SITE.fold_in(library.scalar(-1, "int32"))
    assert key_number(key) == int(SITE.fold_in(2**32 - 1))


def test_accepts_arrays_as_words(library):
    for lo, hi in [(1, 2), (0, 0), (2**31 - 1, 0), (5, 2**31 - 1)]:
        arrays = library.scalar(lo), library.scalar(hi)
        for words in ((lo, arrays[1]), (arrays[0], hi), arrays):
            key = Key.from_words(*words)
            assert key_number(key) == hi << 32 | lo
            assert key_number(key.fold_in("b")) == int(Key(hi << 32 | lo).fold_in("b"))


def test_accepts_tensorflow_variable_as_step():
    key = SITE.fold_in(tf.Variable(7, dtype=tf.int64))
    assert key_number(key) == int(SITE.fold_in(7))


def test_joins_words_of_jax_with_64_bit_integers_and_without():
    with jax.enable_x64(True):
        key = Key(2**63 + 12345).fold_in(jnp.uint64(2**63 + 9))
    expected = Key(2**63 + 12345).fold_in(2**63 + 9)
    with jax.enable_x64(False):
        assert np.array_equal(keep_mask((64,), 0.5, key, xp=jnp), keep_mask((64,), 0.5, expected))
        on = key.fold_in(7).fold_in("a").fold_in(jnp.int32(3))
    assert key_number(on) == int(expected.fold_in(7).fold_in("a").fold_in(3))


def test_rejects_64_bit_step_if_jax_has_no_64_bit_integers():
    with jax.enable_x64(True):
        step = jnp.asarray(2**33 + 5, dtype="int64")
    with jax.enable_x64(False), pytest.raises(ValueError, match="data must have at most 32 bits"):
        Key(1).fold_in(step)


def test_refuses_number_and_equality_of_key_of_arrays(library):
    key, twin = (SITE.fold_in(library.scalar(7)) for _ in range(2))
    with pytest.raises(TypeError, match=r"Key made of arrays.*words"):
        int(key)
    assert key == key
    assert hash(key) == hash(key)
    assert key not in (twin, SITE.fold_in(7))


def test_hashes_compares_and_shows_tracer():
    def traced(step):
        key = SITE.fold_in(step)
        assert hash(key) == hash(key)
        assert key != SITE
        assert "Key.from_words" in repr(key)
        return key.words

    jax.jit(traced)(7)


# --- Windows and pieces --------------------------------------------------------------------------

BLOCKS = {
    "1-d from within a block": ((13,), (100,), (11,)),
    "aligned rows from within a block": ((3, 5), (6, 32), (2, 11)),
    "unaligned rows": ((3, 5), (6, 11), (2, 3)),
    "rows of whole blocks": ((5, 2, 8), (2**31, 2, 8), (2**31 - 5, 0, 0)),
    "rows across 2^32": ((3, 7), (2**33, 5**2), (2**32 // 25 - 1, 9)),
    "to 2^64": ((3, 7), (2**33, 2**31), (2**33 - 3, 2**31 - 7)),
    "1-d to 2^64": ((9,), (2**64,), (2**64 - 9,)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_accepts_arrays_as_start(library, name):
    shape, whole, start = BLOCKS[name]
    expected = expected_mask(shape, 0.5, global_shape=whole, start=start)
    largest = np.iinfo(library.integer).max
    arrays = [library.scalar(s) if s <= largest else s for s in start]
    mixed = [*start[:-1], arrays[-1]]
    for given in (arrays, mixed):
        mask = keep_mask(shape, 0.5, KEY, xp=library.xp, global_shape=whole, start=given)
        assert_mask(library.numpy(mask), expected)


def test_accepts_array_key_in_window_of_unaligned_rows(library):
    window = {"global_shape": (6, 11), "start": (2, 3)}
    mask = keep_mask((3, 5), 0.5, SITE.fold_in(library.scalar(7)), xp=library.xp, **window)
    assert_mask(library.numpy(mask), expected_mask((3, 5), 0.5, **window))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((300_001,), "complex64"), ((3, 100_001), "float32")], ids=str
)
def test_makes_large_output_of_numpys_bits(library, shape, dtype):
    x = np.ones(shape, dtype)
    y = library.numpy(dropout(library.array(x), 0.5, KEY))
    np.testing.assert_array_equal(patterns(y), patterns(dropout(x, 0.5, KEY)))


def test_makes_mask_on_given_device(library):
    for device, options in product(
        library.devices, [{}, {"training": False}, {"global_shape": (11,), "start": (3,)}]
    ):
        mask = keep_mask((5,), 0.5, KEY, xp=library.xp, device=device, **options)
        assert str(device).strip("/").lower() in str(mask.device).lower()


# --- Compiled ------------------------------------------------------------------------------------

JITS = {
    "jax": jax.jit,
    "jax-x64": jax.jit,
    "tensorflow": tf.function,
    "tensorflow-xla": tf.function(jit_compile=True),
}


@pytest.fixture(params=JITS)
def compiled(request):
    """Return each compiler in turn, and the library that it compiles."""
    found = LIBRARIES[request.param.removesuffix("-xla")]
    with found.context():
        yield found, JITS[request.param]


@pytest.mark.parametrize(
    ("shape", "whole", "start"),
    [
        ((3, 5), (6, 11), (2, 3)),
        ((3, 24), (2**38, 24), (2**31 - 3, 0)),
        ((3, 7), (2**33, 2**31), (2**31 - 3, 2**31 - 7)),
    ],
    ids=str,
)
def test_accepts_traced_start(compiled, shape, whole, start):
    library, jit = compiled
    mask = jit(
        lambda *start: keep_mask(shape, 0.5, KEY, xp=library.xp, global_shape=whole, start=start)
    )(*map(library.scalar, start))
    expected = expected_mask(shape, 0.5, global_shape=whole, start=start)
    assert_mask(library.numpy(mask), expected)


def test_accepts_traced_key(compiled):
    library, jit = compiled

    def masks(step):
        key = SITE.fold_in(step)
        on = key.fold_in(2**40).fold_in("b")
        shapes = ((), (0, 3), (37,))
        made = [keep_mask(shape, 0.5, key, xp=library.xp) for shape in shapes]
        return *made, keep_mask((37,), 0.5, on, xp=library.xp), *on.words

    *made, further, lo, hi = jit(masks)(library.scalar(7))
    on = KEY.fold_in(2**40).fold_in("b")
    for mask in made:
        assert_mask(library.numpy(mask), expected_mask(tuple(mask.shape), 0.5))
    assert_mask(library.numpy(further), expected_mask((37,), 0.5, on))
    assert int(hi) << 32 | int(lo) == int(on)


@pytest.mark.parametrize("step", [-1, 2**31 - 1, 2**40 + 3])
def test_folds_in_traced_step_as_its_bits(compiled, step):
    library, jit = compiled
    if step >= 2**31 and library.integer == "int32":
        return
    lo, hi = jit(lambda step: SITE.fold_in(step).words)(library.scalar(step))
    bits = np.iinfo(library.integer).bits
    assert int(hi) << 32 | int(lo) == int(SITE.fold_in(step % 2**bits))


def test_gives_specified_output_compiled(compiled):
    library, jit = compiled
    for dtype in ("float32", "complex64"):
        x = np.random.default_rng(0).standard_normal((3, 37)).astype(dtype)
        drop = jit(lambda x, step: dropout(x, 0.1, SITE.fold_in(step)))
        y = library.numpy(drop(library.array(x), library.scalar(7)))
        assert_output(y, x, expected_mask(x.shape, 0.1), 0.1, flushes=library.flushes)


def test_rejects_traced_integer_as_rate():
    with pytest.raises(TypeError, match=r"\bp .*Trace"):
        jax.jit(lambda p: keep_mask((3,), p, KEY, xp=jnp))(1)
    with pytest.raises(TypeError, match=r"\bp .*Tensor"):
        tf.function(lambda p: keep_mask((3,), p, KEY, xp=tf))(tf.constant(1))


# --- Bad input -----------------------------------------------------------------------------------


def test_rejects_array_of_another_library_as_rate(library):
    for p in (library.array(np.asarray(0.5, "float32")), library.scalar(1)):
        for call in (lambda p: dropout(np.ones(3), p, KEY), lambda p: keep_mask((3,), p, KEY)):
            with pytest.raises(TypeError, match=r"\bp .*" + re.escape(repr(p))):
                call(p)


def test_rejects_arrays_as_axes_and_lengths(library):
    zero = library.scalar(0)
    for options in (
        {"broadcast_axes": (zero,)},
        {"global_shape": (zero + 3, 5), "start": (0, 0)},
    ):
        (name, _), *_ = options.items()
        with pytest.raises(TypeError, match=rf"{name} .*integers"):
            keep_mask((3, 5), 0.5, KEY, **options)
    with pytest.raises(ValueError, match="axis 0"):
        keep_mask((3, 5), 0.5, KEY, global_shape=(2, 5), start=(zero, 0))


@pytest.mark.parametrize(
    ("value", "error"), [(0.5, TypeError), (True, TypeError), ([0], ValueError)], ids=repr
)
def test_rejects_array_that_is_not_an_integer(library, value, error):
    array = library.array(np.asarray(value, "int32" if value == [0] else None))
    with pytest.raises(error, match=r"^start "):
        keep_mask((5,), 0.5, KEY, xp=library.xp, global_shape=(50,), start=(array,))
    with pytest.raises(error, match=r"^data "):
        SITE.fold_in(array)
    with pytest.raises(error, match=r"^hi "):
        Key.from_words(library.scalar(1), array)
    if error is TypeError:  # PyTorch makes an index of one element
        with pytest.raises(TypeError, match=r"^seed "):
            Key(array)


def test_rejects_integer_array(library):
    for dtype in ("bool", "int8", "int32", "uint8"):
        x = library.array(np.ones(5, dtype))
        for training in (True, False):
            with pytest.raises(TypeError, match=rf"^x .*floating-point dtype.*{dtype}"):
                dropout(x, 0.5, KEY, training=training)


@pytest.mark.parametrize("x", [torch.nn.Linear(2, 2), torch.float32], ids=["module", "dtype"])
def test_rejects_what_torch_has_beside_tensors(x):
    with pytest.raises(TypeError, match=r"^x .*array"):
        dropout(x, 0.5, KEY)
