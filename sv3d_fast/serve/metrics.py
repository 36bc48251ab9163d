"""What Prometheus reads: counted as it happens, or taken from the store when it is asked for."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .jobs import QUEUED, JobStore
from .worker import Finished

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
ANSWERS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """One registry per application, so that two in a process don't mix."""

    def __init__(self, store: JobStore, workers_ready: Callable[[], int]):
        self.registry = CollectorRegistry()
        self.registry.register(_State(store, workers_ready))
        known: dict[str, Any] = {"registry": self.registry}
        self.restarts = Counter("sv3d_worker_restarts", "Worker processes that had to be replaced", **known)
        self.requests = Histogram(
            "sv3d_request_seconds",
            "Until the head of an answer",
            ["method", "route", "status"],
            buckets=ANSWERS,
            **known,
        )
        self._waited = Histogram(
            "sv3d_job_wait_seconds", "From acceptance to a worker", ["mode"], buckets=SECONDS, **known
        )
        self._ran = Histogram("sv3d_job_seconds", "On a worker", ["mode"], buckets=SECONDS, **known)
        self._stages = Histogram("sv3d_stage_seconds", "Of a finished stage", ["stage"], buckets=SECONDS, **known)
        self._memory = Gauge("sv3d_gpu_memory_bytes", "After the latest job", ["device", "kind"], **known)

    def observe(self, finished: Finished, device: str) -> None:
        """Counts a job that is off its worker."""
        self._waited.labels(finished.mode).observe(finished.waited)
        self._ran.labels(finished.mode).observe(finished.seconds)
        for stage, seconds in finished.stages.items():
            self._stages.labels(stage).observe(seconds)
        for kind, value in finished.memory.items():
            self._memory.labels(device, kind).set(value)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _State(Collector):
    def __init__(self, store: JobStore, workers_ready: Callable[[], int]):
        self.store, self.workers_ready = store, workers_ready

    def collect(self) -> Iterator[GaugeMetricFamily]:
        counts = self.store.counts()
        yield GaugeMetricFamily("sv3d_queue_depth", "Jobs that wait", value=counts[QUEUED])
        yield GaugeMetricFamily("sv3d_workers_ready", "Workers that are warm", value=self.workers_ready())
        jobs = GaugeMetricFamily("sv3d_jobs", "Jobs that are kept, by state", labels=["state"])
        for state, count in counts.items():
            jobs.add_metric([state], count)
        yield jobs
