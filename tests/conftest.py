import pytest
import torch
import torch.distributed as dist

import common

pytest.register_assert_rewrite("worlds")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Two tests at once on two cores: more threads than cores make everything many times slower."""
    torch.set_num_threads(1)


@pytest.fixture
def ranks():
    """A process group of this process alone."""
    yield common.start_ranks("cpu")
    dist.destroy_process_group()
