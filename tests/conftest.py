import pytest
import torch


@pytest.fixture
def one_thread():
    """Networks this small lose more by threads that wait for each other than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
