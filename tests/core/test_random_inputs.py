"""NumPy and array-api-strict at random against the specification in plain integers."""

import pytest
from random_inputs import check_random_masks, check_random_outputs

from unidrop.conformance import load_backends

MODES = [
    pytest.param(backend, mode, id=f"{backend.name}-{mode}")
    for backend in load_backends(["numpy", "array-api-strict"])
    for mode in backend.modes
]


@pytest.mark.parametrize(("backend", "mode"), MODES)
def test_gives_masks_of_plain_integers(backend, mode):
    check_random_masks(backend, mode, examples=100)


@pytest.mark.parametrize(("backend", "mode"), MODES)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_gives_outputs_of_exact_fractions(backend, mode):
    check_random_outputs(backend, mode, examples=50)
