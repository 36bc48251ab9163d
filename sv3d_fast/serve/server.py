"""Runs the application under uvicorn, alone on its data folder, and drains it on SIGTERM."""

import fcntl
import logging
import threading

import uvicorn

from .app import Service, create_app
from .settings import ServeSettings

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """The first signal drains: no new jobs, running ones end or go back to the queue. The second ends at once."""

    service: Service

    def handle_exit(self, sig, frame) -> None:
        if self.service.supervisor.draining.is_set():
            super().handle_exit(sig, frame)
            return
        threading.Thread(target=self._drain, name="drain").start()

    def _drain(self) -> None:
        log.info("draining")
        self.service.supervisor.drain(self.service.settings.drain)
        self.service.closing = self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.service.refusal is not None


def serve(settings: ServeSettings) -> None:
    """Serves until it is told to end. Raises ValueError for settings that can't work, OSError for a port in use."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # what clients send wrong is told to them
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with open(settings.data_dir / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"data_dir: another server uses {settings.data_dir}") from error
        app = create_app(settings)
        server = _Server(
            uvicorn.Config(
                app, settings.host, settings.port, log_config=None, access_log=False, timeout_graceful_shutdown=5
            )
        )
        server.service = app.state.service
        server.run()
        if server.service.refusal is not None:
            raise ValueError(server.service.refusal)
