"""What tests of PyTorch share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Compute in one thread, because small arrays only wait for others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
