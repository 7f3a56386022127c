"""Every framework that runs at once, at random, against the specification in plain integers."""

import pytest
from random_inputs import check_random_masks, check_random_outputs

from unidrop.conformance import load_backends

pytestmark = pytest.mark.slow  # JAX and TensorFlow compile for each new shape

NAMES = ["flax", "jax", "keras", "tensorflow", "torch"]
# The matrix compares compiled modes with the golden vectors: each example would be a compilation.
MODES = [
    pytest.param(backend, mode, id=f"{backend.name}-{mode}")
    for backend in load_backends(NAMES)
    for mode in backend.modes
    if mode not in backend.compiled_modes
]


def examples(backend, many, few):
    return many if backend.name == "torch" else few


@pytest.mark.parametrize(("backend", "mode"), MODES)
def test_gives_masks_of_plain_integers(backend, mode):
    check_random_masks(backend, mode, examples(backend, 100, 15))


@pytest.mark.parametrize(("backend", "mode"), MODES)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_gives_outputs_of_exact_fractions(backend, mode):
    check_random_outputs(backend, mode, examples(backend, 50, 15))
