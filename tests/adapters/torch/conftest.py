"""What tests of PyTorch share."""

import pytest
import torch
from torchvision_stand_in import import_torchvision


@pytest.fixture
def one_thread():
    """Compute in one thread, because small arrays only wait for others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def torchvision():
    """Let other packages import torchvision, whether or not it works here."""
    import_torchvision()
