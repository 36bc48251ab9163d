"""Shared fixtures: GPU tests are deselected, never skipped in silence, where there is no GPU."""

from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Path:
    """The folder of golden cases: outputs of the official implementations."""
    return GOLDEN


@pytest.fixture(scope="module")
def one_thread():
    """Tiny networks are slower on two threads than on one, and much slower where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]
