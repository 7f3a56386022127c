"""Test that mutations of the product are exact to the bit."""

from fractions import Fraction

import numpy as np
import pytest
import reference

from unidrop.conformance.compare import numpy_dtype
from unidrop.conformance.diagnosis.mutations import scale


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("p", [0.1, 1 / 3, 0.4])
def test_rounds_float64_product_once_in_scale(dtype, p):
    fmt, factor = reference.FORMATS[dtype], np.float32(1 / (1 - p))
    magnitudes = range(fmt.infinity + 1)
    x = np.array(magnitudes, dtype=np.uint16).view(numpy_dtype(dtype))
    exact = Fraction(float(factor))
    once = [fmt.encode(fmt.decode(m) * exact) for m in magnitudes[:-1]] + [fmt.infinity]
    for sign in (1, -1):
        with np.errstate(over="ignore"):
            actual = scale(sign * x, np.float64, float(factor)) * sign
        assert actual.view(np.uint16).tolist() == once
