"""The path of an array: its choice, its explanation, and forcing it."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from threading import Barrier

import numpy as np
import pytest
from fused_arrays import DTYPES, KEY, assert_bits, fused, portable, values

import unidrop
import unidrop.adapters.numpy
from unidrop import Key
from unidrop.fused.kernels import WORK_ITEM_SIZE

# --- Arrays that kernels do not accept ------------------------------------------------------------


def unaligned(x):
    return np.frombuffer(b"0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape)


def field(x):
    """Return a field of records whose size is not a multiple of the field's size."""
    records = np.zeros(x.shape, [("x", x.dtype), ("rest", "u1")])
    records["x"] = x
    return records["x"]


REFUSED = {
    "swapped bytes": (lambda x: x.astype(x.dtype.newbyteorder()), "byte order"),
    "unaligned": (unaligned, "aligned"),
    "a field": (field, "aligned"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_takes_portable_path_with_reason_and_same_bits(kind):
    make, reason = REFUSED[kind]
    plain = values((37, 11))
    x = make(plain)
    path = unidrop.explain_path(x)
    assert path.name == "portable"
    assert reason in path.reason
    y = unidrop.dropout(x, 0.4, KEY)
    assert y.dtype == x.dtype
    assert_bits(np.asarray(y).astype("float32"), portable(plain, 0.4))
    with unidrop.force_path("fused"), pytest.raises(RuntimeError, match=reason):
        unidrop.dropout(x, 0.4, KEY)


def test_accepts_memory_map_and_leaves_its_file(tmp_path):
    x = values((999,))
    (tmp_path / "x").write_bytes(x.tobytes())
    for mode in ("r", "r+", "c"):
        mapped = np.memmap(tmp_path / "x", "float32", mode)
        y = fused(mapped, 0.4)
        assert_bits(np.asarray(y), portable(x, 0.4))
    assert (tmp_path / "x").read_bytes() == x.tobytes()


def test_writes_mapped_out_to_its_file(tmp_path):
    x = values((999,))
    out = np.memmap(tmp_path / "y", "float32", "w+", shape=x.shape)
    unidrop.adapters.numpy.dropout(x, 0.4, key=KEY, out=out)
    out.flush()
    assert (tmp_path / "y").read_bytes() == portable(x, 0.4).tobytes()


# --- explain_path and force_path ------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_explains_that_plain_arrays_are_fused_and_their_dtype(name):
    path = unidrop.explain_path(values((9,), name))
    assert path.name == "fused"
    assert name in path.reason
    assert str(path) == f"fused: {path.reason}"


@pytest.mark.parametrize(("number", "text"), [(1, "1 thread"), (3, "3 threads")])
def test_explains_number_of_threads(number, text):
    before = unidrop.get_num_threads()
    unidrop.set_num_threads(number)
    try:
        assert unidrop.explain_path(values((9,))).reason.endswith(f" up to {text}")
    finally:
        unidrop.set_num_threads(before)


@pytest.mark.parametrize("x", [[1.0], 3.0, None, "text"], ids=repr)
def test_rejects_non_array_in_explain_path(x):
    with pytest.raises(TypeError, match="x must be an array"):
        unidrop.explain_path(x)


@pytest.mark.parametrize("dtype", ["int64", "bool", "longdouble"])
def test_rejects_dtype_without_dropout_in_explain_path(dtype):
    with pytest.raises(TypeError, match="x must be of a floating-point dtype"):
        unidrop.explain_path(np.ones(3, dtype))


@pytest.mark.parametrize("path", ["", "Fused", "both", None, 1], ids=repr)
def test_rejects_unknown_path(path):
    context = unidrop.force_path(path)
    with pytest.raises(ValueError, match="path must be one of fused, portable, got"):
        context.__enter__()
    assert unidrop.explain_path(np.ones(3)).name == "fused"


def test_restores_path_after_block():
    x = np.ones(3)
    with unidrop.force_path("portable"):
        with suppress(ZeroDivisionError), unidrop.force_path("fused"):
            assert unidrop.explain_path(x).name == "fused"
            raise ZeroDivisionError
        assert unidrop.explain_path(x).name == "portable"
        with unidrop.force_path("fused"):
            assert unidrop.explain_path(x).name == "fused"
        assert unidrop.explain_path(x).reason == "unidrop.force_path forces it"
    assert unidrop.explain_path(x).name == "fused"


def test_decorates_functions_with_force_path():
    @unidrop.force_path("portable")
    def name():
        return unidrop.explain_path(np.ones(3)).name

    assert [name(), name()] == ["portable", "portable"]
    assert unidrop.explain_path(np.ones(3)).name == "fused"


def test_forces_path_in_its_own_thread_alone():
    both = Barrier(2)

    def name(path):
        with unidrop.force_path(path) if path else nullcontext():
            both.wait(timeout=60)
            found = unidrop.explain_path(np.ones(3)).name
            both.wait(timeout=60)
        return found

    with ThreadPoolExecutor(2) as pool, unidrop.force_path("portable"):
        assert list(pool.map(name, ["portable", None])) == ["portable", "fused"]


def test_gives_same_bits_from_many_threads():
    arrays = [values((3 * WORK_ITEM_SIZE + i,)) for i in range(8)]
    expected = [portable(x, 0.4, Key(i)) for i, x in enumerate(arrays)]
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(lambda i: fused(arrays[i], 0.4, Key(i)), range(8)))
    for y, wanted in zip(actual, expected, strict=True):
        assert_bits(y, wanted)
