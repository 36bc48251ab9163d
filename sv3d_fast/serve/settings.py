"""What a server is told at its start; free of heavy imports, since the command line shows these defaults."""

import re
from dataclasses import dataclass
from pathlib import Path

from sv3d_fast.settings import AUTO, EMBEDDED


@dataclass(frozen=True)
class ServeSettings:
    """Settings of `serve`. Raises ValueError, naming the setting, for a bad one.

    data_dir: jobs and their files; one server at a time. model, preview_model (TripoSR; None refuses mode preview) and
    matting_model: as of `run` and `preview`. devices: one worker process for each; "auto" is every GPU, or the CPU.
    dtype: of SV3D's network, as of `run`.
    queue_size: jobs that may wait. deadline: seconds that a job may run. drain: seconds that running jobs get at
    SIGTERM. max_attempts: starts of a job whose worker dies. max_body: bytes of a request. max_pixels: of a picture.
    keep_hours: after which finished jobs and their files go. api_key_file: lines of SHA-256 hashes, None lets everyone
    in. cors_origins: origins whose pages may call. instance: what job ids begin with, for a balancer to route by.
    """

    data_dir: Path = Path("serve-data")
    host: str = "127.0.0.1"
    port: int = 8000
    model: str = EMBEDDED
    preview_model: str | None = None
    matting_model: Path | None = None
    devices: tuple[str, ...] = (AUTO,)
    dtype: str = AUTO
    queue_size: int = 64
    deadline: float = 900.0
    drain: float = 60.0
    max_attempts: int = 3
    max_body: int = 32_000_000
    max_pixels: int = 25_000_000
    keep_hours: float = 24.0
    api_key_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    instance: str = ""

    def __post_init__(self):
        for name, low, high in (
            ("port", 1, 65_535),
            ("queue_size", 1, 100_000),
            ("deadline", 0.01, 7 * 86_400),
            ("drain", 0, 86_400),
            ("max_attempts", 1, 100),
            ("max_body", 1_000, 1_000_000_000),
            ("max_pixels", 64, 100_000_000),
            ("keep_hours", 0.01, 1e6),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {low:g} to {high:g}, got {value}")
        if not self.devices or (AUTO in self.devices and len(self.devices) > 1):
            raise ValueError(
                f"devices: expected auto alone, or cpu, cuda, cuda:N, got {' '.join(self.devices) or 'none'}"
            )
        if not re.fullmatch(r"[a-z0-9]{0,16}", self.instance):
            raise ValueError(f"instance: expected up to 16 of a-z and 0-9, got {self.instance!r}")

    @property
    def database(self) -> Path:
        """Of the jobs."""
        return self.data_dir / "jobs.sqlite"

    @property
    def jobs_dir(self) -> Path:
        """A folder in it for every job: result.png, its picture, and result/ with what it wrote."""
        return self.data_dir / "jobs"
