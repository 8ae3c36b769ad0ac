import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Two tests at once on two cores: more threads than cores make everything many times slower."""
    torch.set_num_threads(1)
