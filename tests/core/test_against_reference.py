"""Every backend that runs at once, at random, against the specification in plain integers."""

import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unidrop.conformance import BackendNotRun, load_backends
from unidrop.conformance.backend import missing_capability
from unidrop.conformance.compare import check_mask, check_output, numpy_dtype

BACKENDS = [backend for backend in load_backends() if not isinstance(backend, BackendNotRun)]
# Where each new shape is compiled, an example takes a tenth of a second and more.
EXAMPLES = {"numpy": 150, "torch": 100, "array-api-strict": 75}

seeds = st.integers(0, 2**64 - 1)
rates = st.one_of(
    st.floats(0, 1, exclude_min=True),
    st.sampled_from([0.1, 0.5, 0.9, 2**-32, 1 - 2**-32, 1.0]),
    st.integers(1, 2**32).map(lambda threshold: threshold / 2**32),
)
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@st.composite
def masks(draw):
    """Draw a shape, with broadcast axes and a window of a larger array now and then."""
    shape = draw(shapes)
    axes = tuple(i for i in range(len(shape)) if draw(st.booleans())) if draw(st.booleans()) else ()
    if not draw(st.booleans()):
        return shape, {"broadcast_axes": axes} if axes else {}
    beyond = st.integers(0, draw(st.sampled_from([3, 20, 2**16])))
    start = tuple(draw(beyond) for _ in shape)
    whole = tuple(s + n + draw(beyond) for s, n in zip(start, shape, strict=True))
    options = {"global_shape": whole, "start": start}
    return shape, options | ({"broadcast_axes": axes} if axes else {})


# A compiled mode compiles for each example: the matrix compares it with the golden vectors.
RUN_AT_ONCE = [
    (backend, mode)
    for backend in BACKENDS
    for mode in backend.modes
    if mode not in backend.compiled_modes
]
MODES = [pytest.param(backend, mode, id=f"{backend.name}-{mode}") for backend, mode in RUN_AT_ONCE]
DTYPES = [
    pytest.param(backend, mode, dtype, id=f"{backend.name}-{mode}-{dtype}")
    for backend, mode in RUN_AT_ONCE
    for dtype in ("float16", "bfloat16", "float32", "float64")
    if dtype in backend.dtypes(mode)
]


@pytest.mark.parametrize(("backend", "mode"), MODES)
def test_masks_are_those_of_the_plain_integers(backend, mode):
    @settings(
        max_examples=EXAMPLES.get(backend.name, 15),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(masks(), seeds, st.integers(0, min(backend.step_limit, 2**64) - 1), rates)
    def check(mask, seed, step, p):
        shape, options = mask
        if missing_capability(backend, "windows", mode):
            options = {k: v for k, v in options.items() if k == "broadcast_axes"}
        if missing_capability(backend, "broadcast_axes", mode):
            options.pop("broadcast_axes", None)
        key = reference.fold_in(seed, step)
        keep = np.array(reference.keep_mask(shape, p, key, **options), dtype=bool)
        axes = options.get("broadcast_axes", ())
        keep = keep.reshape(reference.mask_shape(shape, axes))
        ones = backend.from_numpy(np.ones(shape, np.float32), backend.devices[0], mode)
        y = backend.to_numpy(backend.dropout(ones, p, seed, step, mode=mode, **options))
        check_mask(y != 0, np.broadcast_to(keep, shape), f"{mask}, p = {p!r}")

    check()


@pytest.mark.parametrize(("backend", "mode", "dtype"), DTYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_outputs_are_those_of_exact_fractions(backend, mode, dtype):
    width = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}[dtype]
    unsigned = np.dtype(f"uint{width}")

    @settings(
        max_examples=EXAMPLES.get(backend.name, 30) // 2,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(
        st.lists(st.integers(0, 2**width - 1), min_size=24, max_size=24),
        seeds,
        st.floats(0, 1, exclude_min=True),
    )
    def check(bits, seed, p):
        x = np.array(bits, dtype=unsigned).view(numpy_dtype(dtype))
        keep = reference.keep_mask((24,), p, reference.fold_in(seed, 3))
        expected = np.array(reference.dropout_bits(bits, dtype, keep, p), dtype=unsigned)
        with np.errstate(all="ignore"):
            array = backend.from_numpy(x, backend.devices[0], mode)
            y = backend.to_numpy(backend.dropout(array, p, seed, 3, mode=mode))
        check_output(y, expected.view(x.dtype), x, f"p = {p!r}, bits {bits}")

    check()
