"""Shared fixtures: GPU tests are deselected, never skipped in silence, where there is no GPU."""

import shutil
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

# a failed assertion there shows its values, as in a test
pytest.register_assert_rewrite("command_line", "small_run", "small_weights")


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


@pytest.fixture(scope="module")
def quick_fit():
    """Splats and previews of the least quality, for tests of what stands around them."""
    import small_run  # here and below: most files need no pipeline, and it takes seconds to import

    with small_run.quick_fit():
        yield


@pytest.fixture
def quick_batch(quick_fit, monkeypatch):
    """Quick fits in a batch too, whose second halves are worked on in this process: they are known here alone."""
    import small_run

    monkeypatch.setattr("sv3d_fast.batch_workers.Fitter", small_run.FitterHere)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A finished run at its smallest: photo, folder, result and events. Never written to; `copied_run` copies it."""
    import small_run

    return small_run.make_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """The photo and a copy of the finished run's folder."""
    photo, folder, *_ = finished_run
    shutil.copy2(photo, tmp_path / photo.name)
    shutil.copytree(folder, tmp_path / "out")
    return tmp_path / photo.name, tmp_path / "out"


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]
