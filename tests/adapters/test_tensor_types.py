"""Types of arrays that frameworks have beside dense ones: taken, or refused with a remedy."""

import dask.array as da
import numpy as np
import pytest
import tensorflow as tf
import torch

import unidrop
import unidrop.adapters.numpy as numpy_adapter
import unidrop.adapters.tensorflow as tensorflow_adapter
import unidrop.adapters.torch as torch_adapter
from unidrop import Key

KEY = Key(42)
MASKED = np.ma.array(np.full(6, 5.0), mask=[1, 0, 1, 0, 0, 0])


@pytest.mark.parametrize(
    "call",
    [
        lambda x: unidrop.dropout(x, 0.5, KEY),
        lambda x: numpy_adapter.dropout(x, key=KEY),
        lambda x: numpy_adapter.dropout(x, 0.0, key=KEY),
        lambda x: numpy_adapter.dropout_backward(x, key=KEY),
    ],
    ids=["core", "adapter", "p = 0", "backward"],
)
def test_refuses_masked_arrays(call):
    with pytest.raises(TypeError, match=r"(x|grad) must not be a masked array: apply"):
        call(MASKED)


def test_refuses_masked_dask_arrays():
    with pytest.raises(TypeError, match="x must not be a masked array"):
        unidrop.dropout(da.ma.masked_equal(da.ones(6, chunks=3), 0), 0.5, KEY)


@pytest.mark.parametrize(
    "x",
    [
        tf.ragged.constant([[1.0, 2, 3], [4.0]]),
        tf.sparse.from_dense([[1.0, 0], [0, 2]]),
    ],
    ids=["ragged", "sparse"],
)
def test_refuses_tensors_of_tensorflow_that_are_not_dense(x):
    for call in (
        lambda: unidrop.dropout(x, 0.5, KEY),
        lambda: tensorflow_adapter.dropout(x, 0.5, key=KEY),
    ):
        with pytest.raises(TypeError, match=r"x must be a dense tensor, got a .*Tensor: drop its"):
            call()


def test_drops_values_by_remedies_of_tensorflow():
    drop = tensorflow_adapter.dropout
    ragged = tf.ragged.constant([[1.0, 2, 3], [4.0]])
    dropped = tf.ragged.map_flat_values(drop, ragged, 0.5, key=KEY)
    assert np.array_equal(dropped.flat_values, drop(ragged.flat_values, 0.5, key=KEY))
    sparse = tf.sparse.from_dense([[1.0, 0], [0, 2]])
    dropped = sparse.with_values(drop(sparse.values, 0.5, key=KEY))
    assert np.array_equal(dropped.values, drop(sparse.values, 0.5, key=KEY))


@pytest.mark.parametrize(
    "x", [tf.Variable([1.0, 2, 3]), tf.IndexedSlices(tf.constant([[1.0], [2]]), [0, 1], [2, 1])]
)
def test_takes_other_tensors_of_tensorflow(x):
    expected = tensorflow_adapter.dropout(tf.convert_to_tensor(x), 0.5, key=KEY)
    assert np.array_equal(tensorflow_adapter.dropout(x, 0.5, key=KEY), expected)


NOT_DENSE = {
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged
    ),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)]),
    "COO": lambda: torch.eye(3).to_sparse(),
    "CSR": lambda: torch.eye(3).to_sparse_csr(),
    "MKL-DNN": lambda: torch.ones(3, 3).to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse|sparse).*:UserWarning")
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch_adapter.dropout(x, key=KEY),
        lambda x: torch_adapter.dropout(x, key=KEY, return_mask=True),
        lambda x: torch_adapter.Dropout(seed=KEY)(x),
        lambda x: torch_adapter.Dropout()(x),
    ],
    ids=["function", "mask", "layer", "unseeded"],
)
def test_refuses_tensors_of_torch_that_are_not_dense(kind, call):
    with pytest.raises(TypeError, match=r"input must be a dense tensor, got .*: drop its values"):
        call(NOT_DENSE[kind]())


def test_drops_values_by_remedies_of_torch():
    nested = NOT_DENSE["jagged"]()
    dropped = torch.nested.nested_tensor_from_jagged(
        torch_adapter.dropout(nested.values(), key=KEY), nested.offsets()
    )
    assert torch.equal(dropped.values(), torch_adapter.dropout(nested.values(), key=KEY))


class Tagged(torch.Tensor):
    """A subclass that PyTorch's functions keep."""


def test_keeps_subclass_of_torch():
    x = torch.ones(64).as_subclass(Tagged)
    for y in (torch_adapter.dropout(x, key=KEY), torch_adapter.Dropout(seed=KEY)(x)):
        assert type(y) is Tagged
    assert torch.equal(
        torch_adapter.dropout(x, key=KEY).as_subclass(torch.Tensor),
        torch_adapter.dropout(torch.ones(64), key=KEY),
    )


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_takes_other_types_of_numpy():
    expected = numpy_adapter.dropout(np.ones((2, 3)), key=KEY)
    for x in (np.matrix(np.ones((2, 3))), [[1.0] * 3] * 2, np.ones((2, 3)).view(np.recarray)):
        actual = numpy_adapter.dropout(x, key=KEY)
        assert type(actual) is np.ndarray
        assert np.array_equal(actual, expected)
    assert numpy_adapter.dropout(1.5, key=KEY).shape == ()


@pytest.mark.parametrize("shape", [(2, 65, 0, 16, 63, 31), (0,), (3, 0)])
def test_takes_empty_dask_arrays(shape):
    x = da.from_array(np.ones(shape), chunks=shape)
    for p in (0.0, 1.0):
        _, mask = unidrop.dropout(x, p, KEY, return_mask=True)
        assert mask.compute().shape == shape
    y, mask = unidrop.dropout(x, 0.5, KEY, return_mask=True)
    alone = unidrop.keep_mask(shape, 0.5, KEY, xp=da)
    assert y.compute().shape == mask.compute().shape == alone.compute().shape == shape
