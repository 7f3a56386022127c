"""Random inputs of dropout, and the comparison of backends with the specification on them."""

import numpy as np
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unidrop.conformance.backend import missing_capability
from unidrop.conformance.compare import check_mask, check_output, numpy_dtype

__all__ = ["check_random_masks", "check_random_outputs"]

WIDTHS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}

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


def at_random(examples):
    """Return Hypothesis's settings for a number of examples."""
    return settings(
        max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


def check_random_masks(backend, mode, examples):
    """Compare the masks of a backend in a mode with masks from plain integers."""

    @at_random(examples)
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


def check_random_outputs(backend, mode, examples):
    """Compare the outputs of a backend in a mode with exact fractions, at each dtype."""

    @at_random(examples)
    @given(st.binary(min_size=192, max_size=192), seeds, st.floats(0, 1, exclude_min=True))
    def check(data, seed, p):
        keep = reference.keep_mask((24,), p, reference.fold_in(seed, 3))
        for dtype in WIDTHS.keys() & set(backend.dtypes(mode)):
            bits = np.frombuffer(data, f"uint{WIDTHS[dtype]}")[:24]
            x = bits.view(numpy_dtype(dtype))
            expected = reference.dropout_bits(bits.tolist(), dtype, keep, p)
            with np.errstate(all="ignore"):
                array = backend.from_numpy(x, backend.devices[0], mode)
                y = backend.to_numpy(backend.dropout(array, p, seed, 3, mode=mode))
            expected = np.array(expected, bits.dtype).view(x.dtype)
            check_output(y, expected, x, f"{dtype}, p = {p!r}, bits {bits.tolist()}")

    check()
