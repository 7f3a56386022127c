"""Fixtures of the core's tests."""

import pytest
from standard_arrays import SPACES


@pytest.fixture(params=SPACES)
def space(request):
    """Return each namespace in turn, on the portable path."""
    found = SPACES[request.param]
    with found.in_use():
        yield found
