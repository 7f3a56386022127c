"""Dropout of Dask arrays is lazy, works chunk by chunk, and equals dropout of the whole."""

from types import SimpleNamespace

import dask
import dask.array as da
import numpy as np
import pytest
import reference

import unidrop
from unidrop import Key
from unidrop.plan import DropoutPlan

KEY = Key(42).fold_in("encoder/0").fold_in(7)
CHUNKS = {"one": (6, 50), "rows": (1, 50), "odd": ((1, 3, 2), (13, 29, 8))}
SHAPE = (6, 50)
X = np.linspace(-2, 2, 601)[1::2].reshape(SHAPE)


@pytest.fixture(params=CHUNKS.values(), ids=CHUNKS)
def x(request):
    return da.from_array(X, chunks=request.param)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"broadcast_axes": (0,)},
        {"broadcast_axes": (0, 1)},
        {"global_shape": (20, 2**33), "start": (3, 2**32 - 7)},
        {"global_shape": (20, 90), "start": (3, 5), "broadcast_axes": (1,)},
    ],
    ids=["whole", "shared", "one for all", "window", "shared window"],
)
def test_gives_outputs_and_masks_of_whole(x, options):
    y, mask = unidrop.dropout(x, 0.3, KEY, return_mask=True, **options)
    expected = reference.keep_mask(SHAPE, 0.3, int(KEY), **options)
    keep = np.reshape(expected, reference.mask_shape(SHAPE, options.get("broadcast_axes", ())))
    assert np.array_equal(mask.compute(), keep)
    assert np.array_equal(y.compute(), unidrop.dropout(X, 0.3, KEY, **options))
    assert y.chunks == x.chunks
    drawn = unidrop.keep_mask(SHAPE, 0.3, KEY, xp=da, **options)
    assert np.array_equal(drawn.compute(), keep)


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64", "complex128"])
def test_keeps_each_dtype(x, dtype):
    y = unidrop.dropout(x.astype(dtype), 0.3, KEY)
    assert y.dtype == dtype
    computed = y.compute()
    assert computed.dtype == dtype
    assert np.array_equal(computed, unidrop.dropout(X.astype(dtype), 0.3, KEY))


def test_computes_requested_chunks_alone():
    seen = []

    def noted(chunk, block_id=None):
        seen.append(block_id)
        return chunk

    x = da.from_array(X, chunks=(1, 50)).map_blocks(noted, dtype=X.dtype, meta=X)
    y = unidrop.dropout(x, 0.3, KEY)
    assert seen == []
    assert np.array_equal(y[2].compute(), unidrop.dropout(X, 0.3, KEY)[2])
    assert set(seen) == {(2, 0)}


def test_takes_path_of_chunk_library(monkeypatch):
    paths = []

    def noted(chunk, *args, **options):
        paths.append(unidrop.explain_path(chunk).name)
        return DropoutPlan.from_args(chunk, *args, **options)

    monkeypatch.setattr("unidrop.adapters.dask.DropoutPlan", SimpleNamespace(from_args=noted))
    y = unidrop.dropout(da.from_array(X, chunks=(3, 25)), 0.3, KEY)
    y.compute()
    assert paths == [unidrop.explain_path(X).name] * 4


@pytest.mark.parametrize(
    "scheduler",
    ["synchronous", "threads", pytest.param("processes", marks=pytest.mark.slow)],
)
def test_gives_same_bits_in_every_scheduler(scheduler):
    y = unidrop.dropout(da.from_array(X, chunks=(2, 20)), 0.3, KEY)
    with dask.config.set(scheduler=scheduler):
        assert np.array_equal(y.compute(), unidrop.dropout(X, 0.3, KEY))


def test_gives_windows_of_array_beyond_memory():
    x = da.ones((2**17, 2**18), chunks=(2**11, 2**12))
    part = slice(2**16 + 3, 2**16 + 5), slice(2**17 - 2, 2**17 + 9)
    y = unidrop.dropout(x, 0.3, KEY)[part].compute()
    keep = unidrop.keep_mask(
        (2, 11), 0.3, KEY, global_shape=x.shape, start=tuple(cut.start for cut in part)
    )
    assert np.array_equal(y != 0, keep)


def test_cuts_mask_beyond_memory_into_chunks():
    mask = unidrop.keep_mask((2**40,), 0.3, KEY, xp=da)
    assert max(mask.chunks[0]) < 2**30
    part = mask[2**39 + 5 : 2**39 + 16].compute()
    whole = {"global_shape": (2**40,), "start": (2**39 + 5,)}
    assert np.array_equal(part, unidrop.keep_mask((11,), 0.3, KEY, **whole))


def test_names_tasks_by_call_and_key():
    x = da.from_array(X, chunks=(2, 20), name="x")
    names = [unidrop.dropout(x, 0.3, key).name for key in (KEY, KEY, KEY.fold_in(1))]
    assert names[0] == names[1] != names[2]


def test_rejects_unknown_lengths():
    x = da.from_array(X, chunks=(2, 20))
    with pytest.raises((TypeError, ValueError), match="shape"):
        unidrop.dropout(x[x[:, 0] > 0], 0.3, KEY)
