"""A batch on Ray: how a cluster is parted, and, on a cluster of this machine, processes that are killed."""

import itertools
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import small_run
from small_run import SMALL, blob

from sv3d_fast import batch_ray
from sv3d_fast.batch import RESULTS, batching, read_results
from sv3d_fast.batch_picture import DONE, FAILED
from sv3d_fast.batch_ray import LANE_CPUS, RETRIES, Lane, carrying_on_ray, spread
from sv3d_fast.batch_source import Job
from sv3d_fast.cli import main
from sv3d_fast.events import Progress, finish
from sv3d_fast.pipeline import running
from sv3d_fast.settings import Settings

SETTINGS = Settings(**SMALL, device="cpu")


@pytest.mark.parametrize(
    ("machines", "workers", "gpus", "expected"),
    [
        ([{"CPU": 16, "GPU": 1}], 1, None, (1, {"CPU": 8, "GPU": 1})),
        ([{"CPU": 64, "GPU": 4}, {"CPU": 12, "GPU": 2}, {"CPU": 4}], 2, True, (6, {"CPU": 6, "GPU": 1})),
        ([{"CPU": 64, "GPU": 4}], 1, False, (8, {"CPU": 8})),
        ([{"CPU": 2}], 1, None, (1, {"CPU": 2})),
        ([{"CPU": 17}, {"CPU": 5}], 4, None, (3, {"CPU": 5})),
    ],
)
def test_lanes_of_a_cluster(machines, workers, gpus, expected):
    assert batch_ray._bundles(machines, workers, gpus) == expected


@pytest.mark.parametrize(
    ("machines", "workers", "gpus", "message"),
    [
        ([{"CPU": 64}], 1, True, "device: expected GPUs in the Ray cluster"),
        ([{"CPU": 8, "GPU": 4}], 2, None, "expected at least 3 processors for each part of the cluster, 2 of them"),
        ([{"CPU": 1}], 1, None, "got 1"),
    ],
)
def test_clusters_that_are_too_small(machines, workers, gpus, message):
    with pytest.raises(ValueError, match=message):
        batch_ray._bundles(machines, workers, gpus)


def test_devices_by_number_and_several_devices_are_refused(tmp_path):
    for devices in (["cuda:1"], ["cpu", "cuda"]):
        jobs = [Job(Path("a.png"), "a", Settings(device=device)) for device in devices]
        with pytest.raises(ValueError, match=f"expected one of auto, cpu and cuda, got {', '.join(devices)}"):
            next(carrying_on_ray(jobs, tmp_path, 1, "local"))


def test_without_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    picture = blob(tmp_path / "a.png")
    assert main(["batch", str(picture.parent), "-o", str(tmp_path / "out"), "--ray", "--device", "cpu"]) == 2
    assert 'pip install "sv3d-fast[ray]"' in capsys.readouterr().err


@contextmanager
def cluster(**environment):
    """A cluster of this machine with a runtime environment (Ray's term): yields the package ray, connected."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")  # else tests beside this one come first
        ray.init(
            "local", num_cpus=LANE_CPUS, include_dashboard=False, object_store_memory=100 * 2**20,
            log_to_driver=False, logging_level="error", runtime_env=environment,
        )  # fmt: skip
        try:
            yield ray
        finally:
            ray.shutdown()


def make_killer():
    """An actor's class that travels whole: a process of Ray's doesn't know this module."""

    class Killer:
        def carry(self, job):
            if job.name == "bad":
                os.kill(os.getpid(), signal.SIGKILL)
            if job.name == "wrong":
                raise ZeroDivisionError("by zero")
            return job.name

    return Killer


@pytest.mark.slow
def test_a_job_that_ends_every_process_fails_and_the_others_are_redone():
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": RETRIES}
    jobs = [Job(Path(f"{name}.png"), name, SETTINGS) for name in ("one", "bad", "two", "three")]
    wrong = [Job(Path("x"), "wrong", SETTINGS)]
    with cluster() as ray:
        lanes = [Lane(ray.remote(make_killer()).options(**options).remote(), itertools.cycle([]))] * 2
        values = list(spread(ray, lanes, jobs, lambda lane, job: lane.maker.carry.remote(job)))
        with pytest.raises(ZeroDivisionError):
            list(spread(ray, lanes, wrong, lambda lane, job: lane.maker.carry.remote(job)))
    (bad,) = [value for value in values if not isinstance(value, str)]
    assert sorted(value for value in values if isinstance(value, str)) == ["one", "three", "two"]
    assert (bad.row["name"], bad.row["state"]) == ("bad", FAILED)
    assert f"died {RETRIES + 1} times in a row" in bad.row["reason"]


def make_quick():
    """Makes the fits of a process those of `quick_fit`; travels whole, with their configuration."""

    def fit_quickly(config=small_run.FIT):
        from sv3d_fast.scene.fit import FitConfig

        FitConfig.of = classmethod(lambda cls, device, size: config)

    return fit_quickly


def processes(title: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(title.encode()):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_killed_actors_are_replaced_and_the_files_are_those_of_one_device(one_thread, quick_fit, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        blob(photos / f"{number}.png", (60 * number + 40, 160, 60, 255))
    (photos / "broken.png").write_bytes(b"no picture")
    killed = []
    with cluster(worker_process_setup_hook=make_quick()):
        for event in batching(photos, tmp_path / "ray", SETTINGS, ray="local"):
            if isinstance(event, Progress) and event.done == 1:
                for title in ("ray::FitterActor", "ray::MakerActor"):
                    killed += processes(title)[:1]
                for process in killed:
                    os.kill(process, signal.SIGKILL)
    assert len(killed) == 2
    rows = read_results(tmp_path / "ray" / RESULTS)
    assert {name: row["state"] for name, row in rows.items()} == dict.fromkeys("01", DONE) | {"broken": FAILED}
    assert len((tmp_path / "ray" / RESULTS).read_text().splitlines()) == 3
    before = (tmp_path / "ray" / RESULTS).read_bytes()
    assert finish(batching(photos, tmp_path / "ray", SETTINGS, ray="local")).failed == 1
    assert (tmp_path / "ray" / RESULTS).read_bytes() == before

    finish(running(photos / "0.png", tmp_path / "here", SETTINGS))
    for name in ("images/0003.png", "splats.ply", "mesh.glb"):
        assert (tmp_path / "ray" / "0" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
