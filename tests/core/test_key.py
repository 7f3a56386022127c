"""Tests of keys: their numbers, their errors, and that an array gives what an integer gives."""

import copy
import pickle
import re

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tensorflow as tf
import torch
from hypothesis import given
from hypothesis import strategies as st

from unidrop import Key

SITE = Key(42).fold_in("encoder/0")
WORD, NUMBER = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)

SCALARS = {
    "torch": lambda value, dtype: torch.tensor(value, dtype=getattr(torch, dtype)),
    "jax": lambda value, dtype: jnp.asarray(np.asarray(value, dtype)),
    "tensorflow": lambda value, dtype: tf.constant(np.asarray(value, dtype)),
    "strict": lambda value, dtype: array_api_strict.asarray(
        value, dtype=getattr(array_api_strict, dtype)
    ),
}
DTYPES = [f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u")]


@pytest.fixture(params=SCALARS)
def scalar(request):
    """Return the function that makes a 0-d array of a library; JAX's has 64-bit integers."""
    with jax.enable_x64(request.param == "jax"):
        yield SCALARS[request.param]


def number(key):
    """Return a key's number, also a traced one's."""
    lo, hi = (int(word) for word in key.words)
    return hi << 32 | lo


# --- The numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (SITE.fold_in(7), 0x4569F48A8D0F18C9),
        (Key(0).fold_in(""), 0x916CF6162038707F),
        (Key(2**64 - 1).fold_in(2**64 - 1), 0xA1951B70D619276D),
    ],
)
def test_keys_are_those_of_the_specification(key, expected):
    assert int(key) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_a_key_is_its_seed(seed):
    assert int(Key(seed)) == seed


@given(NUMBER, NUMBER | st.text())
def test_folding_in_gives_the_references_key(seed, data):
    assert int(Key(seed).fold_in(data)) == reference.fold_in(seed, data)


@pytest.mark.parametrize("data", ["e\u0301", "\u00e9", "\U0001f600", "a\0b", " "])
def test_strings_are_folded_in_as_they_are(data):
    assert int(SITE.fold_in(data)) == reference.fold_in(int(SITE), data)


def test_a_string_that_is_normalised_otherwise_is_another():
    assert SITE.fold_in("e\u0301") != SITE.fold_in("\u00e9")


def test_an_integer_and_its_digits_differ():
    assert SITE.fold_in(7) != SITE.fold_in("7")


class Index:
    """What `operator.index` takes, and nothing more."""

    def __index__(self):
        return 7


@pytest.mark.parametrize(
    "seven",
    [np.int8(7), np.uint32(7), np.int64(7), np.uint64(7), np.asarray(7), Index()],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_whatever_has_an_index_is_that_integer(seven):
    assert Key(seven) == Key(7)
    assert SITE.fold_in(seven) == SITE.fold_in(7)


def test_numpys_largest_integer_does_not_wrap():
    assert int(Key(np.uint64(2**64 - 1))) == 2**64 - 1


def test_a_string_of_numpy_is_a_string():
    assert SITE.fold_in(np.str_("a")) == SITE.fold_in("a")


# --- Errors ------------------------------------------------------------------------------------

NOT_INTEGERS = [
    True,
    np.True_,
    1.0,
    np.float64(1),
    np.float32(1),
    1j,
    b"1",
    None,
    (1,),
    np.asarray(True),
    np.asarray(1.5),
    np.asarray([1, 2]),
    torch.tensor(True),
    torch.tensor(1.0),
    tf.constant(True),
    tf.constant(1.0),
]


@pytest.mark.parametrize("seed", [*NOT_INTEGERS, "1"], ids=repr)
def test_a_seed_that_is_no_integer_raises_and_is_named(seed):
    with pytest.raises(TypeError, match=re.escape("seed must be an integer, 0 <= seed < 2**64")):
        Key(seed)


@pytest.mark.parametrize("data", NOT_INTEGERS, ids=repr)
def test_folding_in_neither_an_integer_nor_a_string_raises_and_names_data(data):
    with pytest.raises(TypeError, match=r"^data must be an integer"):
        SITE.fold_in(data)


@pytest.mark.parametrize("value", [True, 1.5, b"1", None], ids=repr)
@pytest.mark.parametrize("make", [Key, SITE.fold_in], ids=["seed", "data"])
def test_the_message_of_a_wrong_type_holds_the_value(make, value):
    with pytest.raises(TypeError, match=re.escape(repr(value))):
        make(value)


@pytest.mark.parametrize("value", [-1, 2**64, np.int64(-1), -(2**70)], ids=repr)
@pytest.mark.parametrize(("make", "name"), [(Key, "seed"), (SITE.fold_in, "data")])
def test_an_integer_outside_64_bits_raises_and_does_not_wrap(make, name, value):
    message = f"{name} must be 0 <= {name} < 2**64, got {int(value)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        make(value)


@pytest.mark.parametrize("data", ["\ud800", "encoder/\udfff"], ids=ascii)
def test_a_lone_surrogate_raises_and_names_data(data):
    with pytest.raises(ValueError, match=r"data .*UTF-8.*" + re.escape(repr(data))):
        SITE.fold_in(data)


# --- An immutable value ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_lo", "_hi", "words", "is_traced", "seed"])
def test_attributes_cannot_be_set(name):
    key = Key(42)
    with pytest.raises(AttributeError, match=name):
        setattr(key, name, 1)
    assert key == Key(42)


@pytest.mark.parametrize("name", ["_lo", "_hi"])
def test_attributes_cannot_be_deleted(name):
    key = Key(42)
    with pytest.raises(AttributeError, match=name):
        delattr(key, name)
    assert key == Key(42)


def test_folding_in_leaves_the_key_as_it_was():
    key = Key(42)
    key.fold_in("a").fold_in(1)
    assert key == Key(42)


def test_keys_of_one_number_are_equal_and_hash_alike():
    assert Key(2**40) == Key(2**40)
    assert hash(Key(2**40)) == hash(Key(2**40))


@pytest.mark.parametrize("other", [Key(43), Key(42 + 2**32), 42, "42", None], ids=repr)
def test_a_key_equals_only_keys_of_its_number(other):
    assert Key(42) != other


def test_a_key_finds_itself_in_a_dictionary():
    assert {Key(42).fold_in("a"): "found"}[Key(42).fold_in("a")] == "found"


@pytest.mark.parametrize("seed", [0, 42, 2**64 - 1])
def test_repr_evaluates_to_the_key(seed):
    assert eval(repr(Key(seed))) == Key(seed)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_key_is_equal(protocol):
    assert pickle.loads(pickle.dumps(SITE, protocol)) == SITE


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copied_key_is_equal(copied):
    assert copied(SITE) == SITE


def test_a_pickled_traced_key_has_the_same_words():
    key = SITE.fold_in(torch.tensor(7))
    assert number(pickle.loads(pickle.dumps(key))) == number(key)


# --- Traced keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["7", "least", "greatest"])
def test_an_array_folds_as_the_integer_that_its_bits_are(scalar, dtype, which):
    info = np.iinfo(dtype)
    value = {"7": 7, "least": int(info.min), "greatest": int(info.max)}[which]
    key = SITE.fold_in(scalar(value, dtype))
    assert number(key) == reference.fold_in(int(SITE), value % 2**info.bits)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
def test_a_negative_narrow_step_is_zero_extended(scalar, dtype):
    key = SITE.fold_in(scalar(-1, dtype))
    assert number(key) == int(SITE.fold_in(2 ** np.iinfo(dtype).bits - 1))


@pytest.mark.parametrize("step", [2**32 - 1, 2**32, 2**32 + 7, 2**62 + 1])
def test_a_64_bit_step_keeps_its_upper_half(scalar, step):
    assert number(SITE.fold_in(scalar(step, "int64"))) == int(SITE.fold_in(step))


@pytest.mark.parametrize("data", [3, 2**40 + 3, 2**64 - 1, "b", ""])
def test_a_traced_key_folds_on_as_the_key_it_stands_for(scalar, data):
    key = SITE.fold_in(scalar(7, "int32")).fold_in(data)
    assert number(key) == int(SITE.fold_in(7).fold_in(data))


def test_a_step_folded_into_a_traced_key_gives_the_same_bits(scalar):
    key = SITE.fold_in(scalar(7, "int32")).fold_in(scalar(8, "int64"))
    assert number(key) == int(SITE.fold_in(7).fold_in(8))


@pytest.mark.parametrize("step", [0, 7, 2**31 - 1])
def test_jax_without_64_bit_integers_gives_the_same_key(step):
    assert not jax.config.jax_enable_x64
    key = SITE.fold_in(jnp.asarray(step, dtype="int32")).fold_in("b").fold_in(2**40)
    assert number(key) == int(SITE.fold_in(step).fold_in("b").fold_in(2**40))


@pytest.mark.parametrize(("x64", "dtype"), [(False, "int32"), (True, "int32"), (True, "int64")])
@pytest.mark.parametrize("step", [7, -1])
def test_a_step_that_jax_traces_gives_the_same_key(x64, dtype, step):
    with jax.enable_x64(x64):
        words = jax.jit(lambda s: SITE.fold_in(s).fold_in("b").words)(jnp.asarray(step, dtype))
    lo, hi = map(int, words)
    assert (hi << 32 | lo) == int(SITE.fold_in(step % 2 ** np.iinfo(dtype).bits).fold_in("b"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "step"), [("int32", 7), ("int32", -1), ("int64", 2**32 + 7)])
def test_a_step_that_tensorflow_traces_gives_the_same_key(compiled, dtype, step):
    @tf.function(jit_compile=compiled)
    def words(step):
        return SITE.fold_in(step).fold_in("b").words

    lo, hi = map(int, words(tf.constant(step, dtype)))
    assert (hi << 32 | lo) == int(SITE.fold_in(step % 2 ** np.iinfo(dtype).bits).fold_in("b"))


def test_a_variable_of_tensorflow_is_a_step():
    assert number(SITE.fold_in(tf.Variable(7, dtype=tf.int64))) == int(SITE.fold_in(7))


def test_an_array_is_traced_and_an_integer_is_not(scalar):
    assert SITE.fold_in(scalar(7, "int32")).is_traced
    assert not SITE.fold_in(7).is_traced


@pytest.mark.parametrize("dtype", ["bool", "float32", "float64"])
def test_folding_in_an_array_of_no_integers_raises_and_names_its_dtype(scalar, dtype):
    with pytest.raises(TypeError, match=rf"data must be an integer.*{dtype}"):
        SITE.fold_in(scalar(1, dtype))


@pytest.mark.parametrize("shape", [(1,), (2,), (1, 1)], ids=str)
def test_folding_in_an_array_that_is_not_0_d_raises_and_names_its_shape(scalar, shape):
    data = scalar(np.ones(shape, "int32").tolist(), "int32")
    with pytest.raises(ValueError, match=r"data must be 0-d.*" + re.escape(str(shape))):
        SITE.fold_in(data)


def test_the_number_of_a_traced_key_is_not_there_and_says_so(scalar):
    key = SITE.fold_in(scalar(7, "int32"))
    with pytest.raises(TypeError, match=r"Key made of arrays.*words"):
        int(key)


def test_a_traced_key_equals_and_hashes_as_itself_alone(scalar):
    key, twin = (SITE.fold_in(scalar(7, "int32")) for _ in range(2))
    assert key == key
    assert hash(key) == hash(key)
    assert key not in (twin, SITE.fold_in(7))


def test_a_tracer_can_be_hashed_compared_and_shown():
    def traced(step):
        key = SITE.fold_in(step)
        assert hash(key) == hash(key)
        assert key != SITE
        assert "Key.from_words" in repr(key)
        return key.words

    jax.jit(traced)(7)


def test_the_attributes_of_a_traced_key_cannot_be_set(scalar):
    key = SITE.fold_in(scalar(7, "int32"))
    with pytest.raises(AttributeError, match="_lo"):
        key._lo = 1


# --- Words -------------------------------------------------------------------------------------


@given(WORD, WORD)
def test_a_key_of_two_words_is_their_number(lo, hi):
    assert Key.from_words(lo, hi) == Key(hi << 32 | lo)


@given(NUMBER)
def test_words_are_the_lower_and_the_upper_half(seed):
    assert Key.from_words(*Key(seed).words) == Key(seed)


@pytest.mark.parametrize("kind", ["arrays", "lo array", "hi array"])
@pytest.mark.parametrize(("lo", "hi"), [(1, 2), (0, 0), (2**32 - 1, 0), (5, 2**31)])
def test_words_may_be_arrays(scalar, kind, lo, hi):
    words = (
        lo if kind == "hi array" else scalar(lo, "int64"),
        hi if kind == "lo array" else scalar(hi, "int64"),
    )
    key = Key.from_words(*words)
    assert number(key) == hi << 32 | lo
    assert number(key.fold_in("b")) == int(Key(hi << 32 | lo).fold_in("b"))


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.uint64])
def test_words_of_numpy_integers_have_values_as_they_have_everywhere_else(dtype):
    assert Key.from_words(dtype(1), dtype(2)) == Key.from_words(1, 2)


@pytest.mark.parametrize("word", [-1, 2**32])
@pytest.mark.parametrize("name", ["lo", "hi"])
def test_a_word_outside_32_bits_raises_and_is_named(name, word):
    with pytest.raises(ValueError, match=rf"{name} must be .*got {word}"):
        Key.from_words(**{"lo": 0, "hi": 0, name: word})


@pytest.mark.parametrize("word", [True, 1.0, "1", None], ids=repr)
@pytest.mark.parametrize("name", ["lo", "hi"])
def test_a_word_that_is_no_integer_raises_and_is_named(name, word):
    with pytest.raises(TypeError, match=rf"^{name} must be an integer"):
        Key.from_words(**{"lo": 0, "hi": 0, name: word})


def test_a_word_that_is_not_0_d_raises_and_is_named(scalar):
    with pytest.raises(ValueError, match=r"hi must be 0-d"):
        Key.from_words(scalar(1, "int64"), scalar([1], "int64"))


def test_a_64_bit_step_where_jax_has_no_64_bit_integers_raises_rather_than_lose_its_upper_half():
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        step = jax.numpy.asarray(2**33 + 5, dtype="int64")
    with jax.enable_x64(False), pytest.raises(ValueError, match="data must have at most 32 bits"):
        Key(1).fold_in(step)
