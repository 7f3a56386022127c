"""Types of arrays that frameworks have beside dense ones: taken, or refused with a remedy."""

from pathlib import Path

import dask.array as da
import jax
import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
import torch
from flax import nnx
from jax import numpy as jnp
from jax.experimental import sparse
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import unidrop
import unidrop.adapters.flax as flax_adapter
import unidrop.adapters.jax as jax_adapter
import unidrop.adapters.keras as keras_adapter
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
        lambda x: numpy_adapter.dropout(da.from_array(x), key=KEY),
        lambda x: tensorflow_adapter.dropout(da.from_array(x), 0.5, key=KEY),
        lambda x: numpy_adapter.dropout_backward(np.ones(6), mask=x > 5),
    ],
    ids=["core", "adapter", "p = 0", "backward", "Dask to NumPy", "Dask to TensorFlow", "mask"],
)
def test_refuses_masked_arrays(call):
    with pytest.raises(TypeError, match=r"(x|grad|mask) must not be a masked array: apply"):
        call(MASKED)


@pytest.mark.parametrize(
    "out", [np.ma.array(np.ones(6)), np.matrix(np.ones(6))], ids=["masked", "matrix"]
)
def test_refuses_other_arrays_as_out(out):
    before = out.copy()
    with pytest.raises(TypeError, match=r"out must (not be a masked|be a plain) array"):
        numpy_adapter.dropout(np.ones(out.shape), key=KEY, out=out)
    assert np.array_equal(out, before)


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
        with pytest.raises(
            TypeError, match=r"x must be a dense tensor, got a .*Tensor: apply dropout to its"
        ):
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
    with pytest.raises(
        TypeError, match=r"input must be a dense tensor, got .*: apply dropout to its values"
    ):
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


@pytest.mark.parametrize("shape", [(2, 65, 0, 16, 63, 31), (0,), (3, 0)])
def test_takes_empty_dask_arrays(shape):
    x = da.from_array(np.ones(shape), chunks=shape)
    for p in (0.0, 1.0):
        _, mask = unidrop.dropout(x, p, KEY, return_mask=True)
        assert mask.compute().shape == shape
    y, mask = unidrop.dropout(x, 0.5, KEY, return_mask=True)
    alone = unidrop.keep_mask(shape, 0.5, KEY, xp=da)
    assert y.compute().shape == mask.compute().shape == alone.compute().shape == shape


# --- The tables of docs/modes.md ------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "modes.md"

X = np.arange(1, 13, dtype=np.float32).reshape(3, 4)

NAMES = {
    "Array": "dask.array.Array",
    "ArrayImpl": "jax.Array",
    "EagerTensor": "tf.Tensor",
    "ndarray": "numpy.ndarray",
    "Tensor": "torch.Tensor",
}


def call_core(x):
    return unidrop.dropout(x, 0.5, KEY)


def call_keras(x):
    return keras_adapter.Dropout(0.5, seed=KEY)(x, training=True)


def call_flax(x):
    return flax_adapter.Dropout(0.5, seed=KEY)(x)


def call_torch(x):
    return torch_adapter.dropout(x, 0.5, key=KEY)


def call_torch_layer(x):
    return torch_adapter.Dropout(0.5, seed=KEY)(x)


def call_tensorflow(x):
    return tensorflow_adapter.dropout(x, 0.5, key=KEY)


def call_jax(x):
    return jax_adapter.dropout(x, 0.5, KEY)


LAYERS = (call_keras, call_flax, call_torch_layer)


class Traced:
    """An array for the call inside `jax.jit`."""

    def __init__(self, x):
        self.x = x


def run(call, x):
    if isinstance(x, Traced):
        return jax.jit(call)(x.x)
    if isinstance(x, FakeTensor):
        with x.fake_mode:
            return call(x)
    return call(x)


def describe(call, x, dense):
    """Call dropout, compare its bits with the dense output, and return a cell of a table."""
    try:
        y = run(call, x)
    except TypeError as error:
        return "`TypeError`" if " must " in str(error) else str(error)
    except ValueError:
        return "`ValueError`"
    name = NAMES.get(type(y).__name__, type(y).__name__)
    if isinstance(y, keras.KerasTensor | FakeTensor) or getattr(y, "is_meta", False):
        assert tuple(y.shape) == dense.shape
        return f"`{name}` on meta" if getattr(y, "is_meta", False) else f"`{name}`"
    name = f"`{name}`"
    if isinstance(y, torch.Tensor):
        name = "the subclass" if type(y) is Tagged else name
        y = y.detach().as_subclass(torch.Tensor).numpy()
    y = np.asarray(y)
    key = KEY.fold_in(0) if call in LAYERS else KEY
    expected = unidrop.dropout(np.asarray(dense).astype(y.dtype), 0.5, key)
    assert y.shape == expected.shape
    assert y.tobytes() == expected.tobytes()
    return name if y.dtype.name == dense.dtype.name else f"{name} of {y.dtype.name}"


def pandas(kind):
    return getattr(pytest.importorskip("pandas"), kind)


def data_array(x):
    return pytest.importorskip("xarray").DataArray(x)


class Marked(np.ndarray):
    """A subclass of NumPy arrays."""


COMPLEX = X.astype(np.complex64) * (1 - 2j)
COMPLEX128 = COMPLEX.astype(np.complex128)

# From a kind to functions that return an array, and the dense array of its values.
OBJECTS = {
    "number": [lambda: (1.5, np.array(1.5))],
    "list": [lambda: (X.tolist(), X.astype(np.float64))],
    "NumPy scalar, 0-d array": [
        lambda: (np.float32(1.5), np.array(1.5, np.float32)),
        lambda: (np.array(1.5, np.float32),) * 2,
    ],
    "complex64": [lambda: (COMPLEX, COMPLEX)],
    "complex128": [lambda: (COMPLEX128, COMPLEX128)],
    "other byte order": [lambda: (X.astype(">f4"), X)],
    "float8 of `ml_dtypes`": [lambda: (X.astype(ml_dtypes.float8_e4m3fn), X)],
    "integers, bools, strings": [
        lambda: (X.astype(np.int64), X),
        lambda: (X > 3, X),
        lambda: (X.astype(str), X),
    ],
    "objects, structured arrays": [
        lambda: (X.astype(object), X),
        lambda: (np.zeros(3, [("a", "f4"), ("b", "f4")]), X),
    ],
    "`numpy.matrix`, other subclasses": [
        lambda: (np.matrix(X), X),
        lambda: (X.view(np.recarray), X),
        lambda: (X.view(Marked), X),
    ],
    "masked array": [lambda: (np.ma.array(X, mask=X > 6), X)],
    "pandas, xarray": [
        lambda: (pandas("DataFrame")(X), X),
        lambda: (pandas("Series")(X[0]), X[0]),
        lambda: (data_array(X), X),
    ],
}
COLUMNS = [
    [call_core],
    [lambda x: numpy_adapter.dropout(x, key=KEY)],
    [call_torch, call_torch_layer],
    [call_tensorflow],
    [call_keras],
    [call_jax, call_flax],
]

T = torch.from_numpy(X.copy())


def make_dtensor():
    from torch import distributed
    from torch.distributed.tensor import DeviceMesh, DTensor

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return DTensor.from_local(T, DeviceMesh("cpu", [0]))
    finally:
        distributed.destroy_process_group()


F = tf.constant(X)
J = jnp.asarray(X)

TENSORS = {
    (call_core, call_torch, call_torch_layer): {
        "`torch.nn.Parameter`": [lambda: (torch.nn.Parameter(T.clone()), X)],
        "subclass with `__torch_function__`": [lambda: (T.as_subclass(Tagged), X)],
        "PyTorch, complex, conjugated or negated": [
            lambda: (torch.from_numpy(COMPLEX128), COMPLEX128),
            lambda: (torch.from_numpy(COMPLEX), COMPLEX),
            lambda: (torch.from_numpy(COMPLEX).conj(), COMPLEX.conj()),
            lambda: (torch._neg_view(torch.from_numpy(COMPLEX)), -COMPLEX),
        ],
        'PyTorch, on `"meta"`': [lambda: (T.to("meta"), X)],
        "`FakeTensor` in its mode": [lambda: (FakeTensorMode().from_tensor(T), X)],
        "PyTorch, float8, complex32": [
            lambda: (T.to(torch.float8_e4m3fn), X),
            lambda: (T.to(torch.complex32), X),
        ],
        "PyTorch, quantized": [lambda: (torch.quantize_per_tensor(T, 0.1, 0, torch.qint8), X)],
        "PyTorch, nested, sparse or MKL-DNN": [
            lambda make=make: (make(), X) for make in NOT_DENSE.values()
        ],
        "`MaskedTensor`": [lambda: (torch.masked.masked_tensor(T, T > 3), X)],
        "`DTensor`": [lambda: (make_dtensor(), X)],
    },
    (call_core, call_tensorflow, call_keras): {
        "`tf.Variable`, `keras.Variable`": [
            lambda: (tf.Variable(F), X),
            lambda: (keras.Variable(X), X),
        ],
        "`tf.IndexedSlices`": [lambda: (tf.IndexedSlices(F, tf.range(3), tf.constant([3, 4])), X)],
        "`tf.experimental.numpy`": [lambda: (tf.experimental.numpy.asarray(X), X)],
        "TensorFlow, complex": [
            lambda: (tf.constant(COMPLEX), COMPLEX),
            lambda: (tf.constant(COMPLEX128), COMPLEX128),
        ],
        "TensorFlow, integers, strings": [
            lambda: (tf.constant([1]), X),
            lambda: (tf.constant(["a"]), X),
        ],
        "TensorFlow, float8": [lambda: (tf.cast(F, tf.dtypes.experimental.float8_e4m3fn), X)],
        "TensorFlow, quantized": [
            lambda: (tf.quantization.quantize(F, 0.0, 20.0, tf.qint8).output, X),
        ],
        "`tf.RaggedTensor`, `tf.SparseTensor`": [
            lambda: (tf.ragged.constant([[1.0], [2.0, 3.0]]), X),
            lambda: (tf.sparse.from_dense(F), X),
        ],
        "`keras.KerasTensor`": [lambda: (keras.KerasTensor((3, 4)), X)],
    },
    (call_core, call_jax, call_flax): {
        "JAX, tracer": [lambda: (Traced(J), X)],
        "JAX, complex64": [lambda: (jnp.asarray(COMPLEX), COMPLEX)],
        "`flax.nnx.Param`": [lambda: (nnx.Param(J), X)],
        "JAX, float8": [lambda: (J.astype(jnp.float8_e4m3fn), X)],
        "JAX, typed key of `jax.random`": [lambda: (jax.random.key(0), X)],
        "`BCOO`, `jax.Ref`, `jax.ShapeDtypeStruct`": [
            lambda: (sparse.BCOO((J[0], jnp.arange(4)[:, None]), shape=(4,)), X),
            lambda: (jax.new_ref(J), X),
            lambda: (jax.ShapeDtypeStruct((3, 4), np.float32), X),
        ],
    },
    (call_core,): {
        "Dask, an axis of length 0": [lambda: (da.ones((3, 0), chunks=2), np.ones((3, 0)))],
        "Dask, complex": [
            lambda: (da.from_array(COMPLEX, chunks=2), COMPLEX),
            lambda: (da.from_array(COMPLEX128, chunks=2), COMPLEX128),
        ],
        "Dask, chunks of unknown lengths": [lambda: ((x := da.from_array(X))[x[:, 0] > 0], X)],
        "Dask, chunks of masked arrays or matrices": [
            lambda: (da.ma.masked_equal(da.from_array(X), 3), X),
            lambda: (da.from_array(np.matrix(X), asarray=False), X),
        ],
    },
}
ROWS = {kind: (calls, makers) for calls, kinds in TENSORS.items() for kind, makers in kinds.items()}


def describe_kind(calls, makers):
    """Return the cell of several calls and arrays, which must do the same."""
    cells = {describe(call, *make()) for make in makers for call in calls}
    assert len(cells) == 1, cells
    return cells.pop()


def rows_of_page(first):
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition(f"| {first} |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", OBJECTS)
def test_treats_object_as_page_says(kind):
    actual = [describe_kind(calls, OBJECTS[kind]) for calls in COLUMNS]
    assert actual == rows_of_page("array or object")[kind]


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of prototypes and deprecated tensors
@pytest.mark.parametrize("kind", ROWS)
def test_treats_tensor_as_page_says(kind):
    calls, makers = ROWS[kind]
    actual = [describe_kind([call], makers) for call in calls]
    assert actual + ["-"] * (3 - len(calls)) == rows_of_page("tensor")[kind]


def test_names_every_type_on_page():
    assert list(rows_of_page("array or object")) == list(OBJECTS)
    assert list(rows_of_page("tensor")) == list(ROWS)


@pytest.mark.skipif(not hasattr(torch.Tensor, "refine_names"), reason="PyTorch 2.13 has no names")
def test_refuses_named_tensor():
    with pytest.raises(TypeError, match="input must not have names: pass input"):
        call_torch(torch.ones(2, names=("N",)))


def test_names_remedy_for_dtensor():
    message = r"input must not be a DTensor: apply dropout to input.to_local\(\), with the"
    layer = torch_adapter.Dropout(seed=KEY)
    x = make_dtensor()
    for call in (layer, torch.compile(layer, backend="eager")):
        with pytest.raises(TypeError, match=message):
            call(x)
    assert layer.calls == 0


def test_names_conversion_of_table():
    frame = pandas("DataFrame")(X)
    for call in (call_core, numpy_adapter.dropout, call_tensorflow, call_jax):
        with pytest.raises(TypeError, match=r"DataFrame: pass x.to_numpy\(\)$"):
            call(frame)


def test_names_remedy_for_unknown_chunks():
    x = da.from_array(X, chunks=2)
    x = x[x[:, 0] > 0]
    with pytest.raises(
        TypeError, match=r"x must have chunks of known lengths, .* call x.compute_c"
    ):
        call_core(x)
    x.compute_chunk_sizes()
    assert np.array_equal(call_core(x).compute(), call_core(X))
