"""Runs the pictures of a batch on a Ray cluster: actors that make orbits, one for each GPU, and actors beside them that
reconstruct.

A lane is a GPU with its actors, held together by a placement group: an orbit never leaves its machine, and no GPU ends
up with fits alone while a model waits for one. Ray Data gives pools of actors no such tie. What is lost is Ray's to
repair: it starts an actor that died anew and redoes its pictures, which take up what stands in their folders.
"""

import itertools
import logging
import os
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .batch_picture import Made, Maker, Outcome, failed, reconstruct
from .batch_source import Job
from .batch_workers import MAKING
from .settings import Settings

LOCAL = "local"
FITS = 0.5  # of a GPU, shared by the actors that reconstruct; the one that makes orbits has the rest
LANE_CPUS = 8  # at most: one for the actor that makes orbits, the rest for those that reconstruct
RETRIES = 2  # of a picture whose process died: it need not have been its own fault
READY = 60.0  # seconds for the cluster to grant what it has
STORE = 2**30  # bytes of the store of objects on a machine of its own: an orbit of 576² frames has 21 MB


class MakerActor(Maker):
    """A Maker in a process of Ray's, in the folder where the batch was called: paths mean the same there."""

    def __init__(self, directory: str):
        super().__init__()
        os.chdir(directory)

    def make(self, job: Job, folder: Path) -> Made | Outcome:
        """As Maker's."""
        with _or_end():
            return super().make(job, folder)


class FitterActor:
    """The second half of pictures in a process of Ray's."""

    def __init__(self, directory: str):
        os.chdir(directory)

    def reconstruct(self, made: Made | Outcome) -> Outcome:
        """`batch_picture.reconstruct`; what has ended already passes through."""
        if isinstance(made, Outcome):
            return made
        with _or_end():
            return reconstruct(made)


@dataclass
class Lane:
    """The handles of a GPU's actors; those that reconstruct take turns."""

    maker: Any
    fitters: "itertools.cycle[Any]"

    def carry(self, job: Job, folder: Path) -> Any:
        """Both halves of a picture, the second when Ray has the first: a reference to its Outcome."""
        return next(self.fitters).reconstruct.remote(self.maker.make.remote(job, folder))


def carrying_on_ray(jobs: Sequence[Job], folder: Path, workers: int, address: str) -> Generator[Outcome, None, None]:
    """Every picture through both halves on the cluster at `address`: yields how each ended, as they end.

    Every machine of the cluster has this package and sees the pictures, the model and `folder` under the same paths.
    Raises ValueError without Ray, for devices named by number, a cluster that can't be reached or has nothing free, and
    models that can't be opened.
    """
    folder = folder.resolve()
    gpus = _wants_gpus([job.settings for job in jobs])
    with connected(address) as ray:
        with open_lanes(ray, [job.settings for job in jobs], workers, gpus) as lanes:
            slots = lanes * (MAKING + workers)  # all lanes get their first picture before any gets its second
            yield from spread(ray, slots, jobs, lambda lane, job: lane.carry(job, folder))


def spread(
    ray: Any, slots: Sequence[Lane], jobs: Sequence[Job], submit: Callable[[Lane, Job], Any]
) -> Generator[Any, None, None]:
    """Keeps every slot busy with one job: yields the values of what `submit` refers to, as they come.

    A job that ends its process takes its neighbours along, and Ray gives up on all of them after some tries. Those run
    again at the end, one at a time; one that still ends its process is a failed Outcome.
    """
    lost = []
    for job, value, _ in _spread_once(ray, slots, jobs, submit):
        if isinstance(value, ray.exceptions.RayError):
            lost.append(job)
        else:
            yield value
    for job, value, started in _spread_once(ray, slots[:1], lost, submit):
        if isinstance(value, ray.exceptions.RayError):
            reason = f"the process that worked on it died {1 + RETRIES} times in a row ({type(value).__name__})"
            yield failed(job, RuntimeError(reason), started, [])
        else:
            yield value


def _spread_once(
    ray: Any, slots: Sequence[Lane], jobs: Sequence[Job], submit: Callable[[Lane, Job], Any]
) -> Generator[tuple[Job, Any, float], None, None]:
    """Yields each job, its value or why Ray gave it up, and when it was submitted."""
    free, todo = list(slots), list(reversed(jobs))
    running: dict[Any, tuple[Lane, Job, float]] = {}
    while todo or running:
        while todo and free:
            lane, job = free.pop(0), todo.pop()
            running[submit(lane, job)] = (lane, job, time.time())
        (done,), _ = ray.wait(list(running), num_returns=1)
        lane, job, started = running.pop(done)
        free.append(lane)
        try:
            value = ray.get(done)
        except ray.exceptions.RayError as error:
            value = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            if not isinstance(value, ray.exceptions.RayError):
                raise  # an error of our own
        yield job, value, started


@contextmanager
def open_lanes(ray: Any, settings: Sequence[Settings], workers: int, gpus: bool | None) -> Iterator[list[Lane]]:
    """A lane for each GPU of the cluster, or for every LANE_CPUS processors, with all models open; ends them.

    gpus: False leaves GPUs alone, True takes nothing else, None takes them where there are some.
    Raises ValueError where the cluster has none free, and for models that can't be opened.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    count, bundle = _bundles([n["Resources"] for n in ray.nodes() if n["Alive"]], workers, gpus)
    groups = [placement_group([bundle]) for _ in range(count)]
    try:
        waiting = {group.ready(): group for group in groups}
        granted, _ = ray.wait(list(waiting), num_returns=count, timeout=READY)
        if not granted:
            raise ValueError(f"ray: expected something free within {READY:.0f} s, all {count} x {bundle} are taken")
        lanes = [_lane(ray, waiting[ready], bundle, workers) for ready in granted]
        try:
            ray.get([lane.maker.open.remote(settings) for lane in lanes])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.ActorDiedError as error:
            raise ValueError(f"ray: an actor can't start: {' '.join(str(error).split())}") from None
        yield lanes
    finally:
        for group in groups:
            remove_placement_group(group)


def _lane(ray: Any, group: Any, bundle: dict[str, int], workers: int) -> Lane:
    """The actors of a placement group that holds one bundle."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    gpu = bundle.get("GPU", 0)
    options = {
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        "max_restarts": -1, "max_task_retries": RETRIES,
    }  # fmt: skip
    making = {"num_cpus": 1, "num_gpus": gpu * (1 - FITS), "max_concurrency": MAKING}
    fitting = {"num_cpus": (bundle["CPU"] - 1) // workers, "num_gpus": gpu * FITS / workers}
    maker = ray.remote(MakerActor).options(**options, **making).remote(os.getcwd())
    fitters = [ray.remote(FitterActor).options(**options, **fitting).remote(os.getcwd()) for _ in range(workers)]
    return Lane(maker, itertools.cycle(fitters))


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The package ray, connected: as it was found, or to the cluster at an address for as long as the block runs.

    LOCAL starts a cluster of this machine alone. Raises ValueError without the package, or a cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise ValueError('ray: the package is missing; expected: pip install "sv3d-fast[ray]"') from None
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = {}
    if address == LOCAL:
        gpus = torch.cuda.device_count()
        own = {"include_dashboard": False, "object_store_memory": STORE, "num_gpus": gpus}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"ray: no cluster at {address!r}: {error}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _wants_gpus(settings: Sequence[Settings]) -> bool | None:
    """What the pictures' devices say of GPUs; None where they leave it open."""
    devices = {one.device for one in settings}
    if len(devices) != 1 or not devices < {"auto", "cpu", "cuda"}:
        named = ", ".join(sorted(devices))
        raise ValueError(f"device: with Ray, which numbers GPUs, expected one of auto, cpu and cuda, got {named}")
    return {"auto": None, "cpu": False, "cuda": True}[devices.pop()]


def _bundles(machines: Sequence[dict[str, float]], workers: int, gpus: bool | None) -> tuple[int, dict[str, int]]:
    """How many lanes machines of these resources have, and what each takes. Raises ValueError for none."""
    with_gpus = [] if gpus is False else [m for m in machines if m.get("GPU", 0) >= 1]
    if gpus and not with_gpus:
        raise ValueError("device: expected GPUs in the Ray cluster, there are none")
    chosen = with_gpus or machines
    parts = [int(m["GPU"]) if with_gpus else max(1, int(m.get("CPU", 0)) // LANE_CPUS) for m in chosen]
    cpus = min([LANE_CPUS, *(int(m.get("CPU", 0)) // n for m, n in zip(chosen, parts, strict=True))])
    if cpus < 1 + workers:
        raise ValueError(
            f"ray: expected at least {1 + workers} processors for each part of the cluster, {workers} of them for "
            f"reconstruction, got {cpus}"
        )
    return sum(parts), {"CPU": cpus} | ({"GPU": 1} if with_gpus else {})


@contextmanager
def _or_end() -> Iterator[None]:
    """An accelerator that failed takes the process with it: Ray starts the next one clean, and redoes the picture."""
    try:
        yield
    except torch.AcceleratorError:
        traceback.print_exc()
        os._exit(1)
