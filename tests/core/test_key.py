"""Tests of keys: their numbers, their errors, and equal results for arrays and integers."""

import copy
import pickle
import re

import array_api_strict
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from unidrop import Key

SITE = Key(42).fold_in("encoder/0")
WORD, NUMBER = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)

DTYPES = [f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u")]


def scalar(value, dtype):
    """Return an array of array-api-strict, which is 0-d if value is a number."""
    return array_api_strict.asarray(value, dtype=getattr(array_api_strict, dtype))


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
def test_gives_keys_of_specification(key, expected):
    assert int(key) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_equals_its_seed(seed):
    assert int(Key(seed)) == seed


@given(NUMBER, NUMBER | st.text())
def test_folds_in_as_reference_does(seed, data):
    assert int(Key(seed).fold_in(data)) == reference.fold_in(seed, data)


@pytest.mark.parametrize("data", ["e\u0301", "\u00e9", "\U0001f600", "a\0b", " "])
def test_folds_in_strings_as_they_are(data):
    assert int(SITE.fold_in(data)) == reference.fold_in(int(SITE), data)


def test_distinguishes_unicode_normal_forms():
    assert SITE.fold_in("e\u0301") != SITE.fold_in("\u00e9")


def test_distinguishes_integer_from_its_digits():
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
def test_accepts_anything_with_an_index(seven):
    assert Key(seven) == Key(7)
    assert SITE.fold_in(seven) == SITE.fold_in(7)


def test_keeps_largest_numpy_integer():
    assert int(Key(np.uint64(2**64 - 1))) == 2**64 - 1


def test_accepts_numpy_string():
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
    scalar(True, "bool"),
    scalar(1.0, "float64"),
]


@pytest.mark.parametrize("seed", [*NOT_INTEGERS, "1"], ids=repr)
def test_rejects_non_integer_seed(seed):
    with pytest.raises(TypeError, match=re.escape("seed must be an integer, 0 <= seed < 2**64")):
        Key(seed)


@pytest.mark.parametrize("data", NOT_INTEGERS, ids=repr)
def test_rejects_data_that_is_not_integer_or_string(data):
    with pytest.raises(TypeError, match=r"^data must be an integer"):
        SITE.fold_in(data)


@pytest.mark.parametrize("value", [True, 1.5, b"1", None], ids=repr)
@pytest.mark.parametrize("make", [Key, SITE.fold_in], ids=["seed", "data"])
def test_shows_value_of_wrong_type(make, value):
    with pytest.raises(TypeError, match=re.escape(repr(value))):
        make(value)


@pytest.mark.parametrize("value", [-1, 2**64, np.int64(-1), -(2**70)], ids=repr)
@pytest.mark.parametrize(("make", "name"), [(Key, "seed"), (SITE.fold_in, "data")])
def test_rejects_integer_outside_64_bits(make, name, value):
    message = f"{name} must be 0 <= {name} < 2**64, got {int(value)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        make(value)


@pytest.mark.parametrize("data", ["\ud800", "encoder/\udfff"], ids=ascii)
def test_rejects_lone_surrogate(data):
    with pytest.raises(ValueError, match=r"data .*UTF-8.*" + re.escape(repr(data))):
        SITE.fold_in(data)


# --- An immutable value ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_lo", "_hi", "words", "is_traced", "seed"])
def test_rejects_setting_attributes(name):
    key = Key(42)
    with pytest.raises(AttributeError, match=name):
        setattr(key, name, 1)
    assert key == Key(42)


@pytest.mark.parametrize("name", ["_lo", "_hi"])
def test_rejects_deleting_attributes(name):
    key = Key(42)
    with pytest.raises(AttributeError, match=name):
        delattr(key, name)
    assert key == Key(42)


def test_leaves_key_as_it_was_when_folding():
    key = Key(42)
    key.fold_in("a").fold_in(1)
    assert key == Key(42)


def test_equals_key_of_same_number():
    assert Key(2**40) == Key(2**40)
    assert hash(Key(2**40)) == hash(Key(2**40))


@pytest.mark.parametrize("other", [Key(43), Key(42 + 2**32), 42, "42", None], ids=repr)
def test_differs_from_other_keys_and_numbers(other):
    assert Key(42) != other


def test_finds_itself_in_dictionary():
    assert {Key(42).fold_in("a"): "found"}[Key(42).fold_in("a")] == "found"


@pytest.mark.parametrize("seed", [0, 42, 2**64 - 1])
def test_has_repr_that_evaluates_to_key(seed):
    assert eval(repr(Key(seed))) == Key(seed)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_equals_itself_after_pickling(protocol):
    assert pickle.loads(pickle.dumps(SITE, protocol)) == SITE


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_equals_its_copy(copied):
    assert copied(SITE) == SITE


def test_pickles_traced_key_with_its_words():
    key = SITE.fold_in(scalar(7, "int64"))
    assert number(pickle.loads(pickle.dumps(key))) == number(key)


# --- Traced keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["7", "least", "greatest"])
def test_folds_in_array_as_its_bits(dtype, which):
    info = np.iinfo(dtype)
    value = {"7": 7, "least": int(info.min), "greatest": int(info.max)}[which]
    key = SITE.fold_in(scalar(value, dtype))
    assert number(key) == reference.fold_in(int(SITE), value % 2**info.bits)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
def test_zero_extends_narrow_negative_step(dtype):
    key = SITE.fold_in(scalar(-1, dtype))
    assert number(key) == int(SITE.fold_in(2 ** np.iinfo(dtype).bits - 1))


@pytest.mark.parametrize("step", [2**32 - 1, 2**32, 2**32 + 7, 2**62 + 1])
def test_keeps_upper_half_of_64_bit_step(step):
    assert number(SITE.fold_in(scalar(step, "int64"))) == int(SITE.fold_in(step))


@pytest.mark.parametrize("data", [3, 2**40 + 3, 2**64 - 1, "b", ""])
def test_folds_on_from_traced_key(data):
    key = SITE.fold_in(scalar(7, "int32")).fold_in(data)
    assert number(key) == int(SITE.fold_in(7).fold_in(data))


def test_folds_array_into_traced_key():
    key = SITE.fold_in(scalar(7, "int32")).fold_in(scalar(8, "int64"))
    assert number(key) == int(SITE.fold_in(7).fold_in(8))


def test_is_traced_only_with_array():
    assert SITE.fold_in(scalar(7, "int32")).is_traced
    assert not SITE.fold_in(7).is_traced


@pytest.mark.parametrize("dtype", ["bool", "float32", "float64"])
def test_rejects_array_of_other_dtype(dtype):
    with pytest.raises(TypeError, match=rf"data must be an integer.*{dtype}"):
        SITE.fold_in(scalar(1, dtype))


@pytest.mark.parametrize("shape", [(1,), (2,), (1, 1)], ids=str)
def test_rejects_array_that_is_not_0_d(shape):
    data = scalar(np.ones(shape, "int32").tolist(), "int32")
    with pytest.raises(ValueError, match=r"data must be 0-d.*" + re.escape(str(shape))):
        SITE.fold_in(data)


def test_refuses_number_of_traced_key():
    key = SITE.fold_in(scalar(7, "int32"))
    with pytest.raises(TypeError, match=r"Key made of arrays.*words"):
        int(key)


def test_equals_itself_alone_if_traced():
    key, twin = (SITE.fold_in(scalar(7, "int32")) for _ in range(2))
    assert key == key
    assert hash(key) == hash(key)
    assert key not in (twin, SITE.fold_in(7))


def test_rejects_setting_attributes_of_traced_key():
    key = SITE.fold_in(scalar(7, "int32"))
    with pytest.raises(AttributeError, match="_lo"):
        key._lo = 1


# --- Words -------------------------------------------------------------------------------------


@given(WORD, WORD)
def test_joins_two_words(lo, hi):
    assert Key.from_words(lo, hi) == Key(hi << 32 | lo)


@given(NUMBER)
def test_splits_into_lower_and_upper_word(seed):
    assert Key.from_words(*Key(seed).words) == Key(seed)


@pytest.mark.parametrize("kind", ["arrays", "lo array", "hi array"])
@pytest.mark.parametrize(("lo", "hi"), [(1, 2), (0, 0), (2**32 - 1, 0), (5, 2**31)])
def test_accepts_arrays_as_words(kind, lo, hi):
    words = (
        lo if kind == "hi array" else scalar(lo, "int64"),
        hi if kind == "lo array" else scalar(hi, "int64"),
    )
    key = Key.from_words(*words)
    assert number(key) == hi << 32 | lo
    assert number(key.fold_in("b")) == int(Key(hi << 32 | lo).fold_in("b"))


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.uint64])
def test_accepts_numpy_integers_as_words(dtype):
    assert Key.from_words(dtype(1), dtype(2)) == Key.from_words(1, 2)


@pytest.mark.parametrize("word", [-1, 2**32])
@pytest.mark.parametrize("name", ["lo", "hi"])
def test_rejects_word_outside_32_bits(name, word):
    with pytest.raises(ValueError, match=rf"{name} must be .*got {word}"):
        Key.from_words(**{"lo": 0, "hi": 0, name: word})


@pytest.mark.parametrize("word", [True, 1.0, "1", None], ids=repr)
@pytest.mark.parametrize("name", ["lo", "hi"])
def test_rejects_non_integer_word(name, word):
    with pytest.raises(TypeError, match=rf"^{name} must be an integer"):
        Key.from_words(**{"lo": 0, "hi": 0, name: word})


def test_rejects_word_that_is_not_0_d():
    with pytest.raises(ValueError, match=r"hi must be 0-d"):
        Key.from_words(scalar(1, "int64"), scalar([1], "int64"))
