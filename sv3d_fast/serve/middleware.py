"""Around every request: a limit on its body, and the time until it is answered. Plain ASGI, so that streams stay so."""

import time

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics

METHODS = ("GET", "POST", "DELETE")


class BodyLimit:
    """413 for a body over `limit` bytes, whether or not its length was announced."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = announced.isdigit() and (len(announced) > 18 or int(announced) > self.limit)
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = {} if too_large else await receive()
            received += len(message.get("body", b""))
            if too_large or received > self.limit:
                # raised where the route reads the body, so that the application's own handler answers
                raise HTTPException(413, f"expected at most {self.limit} bytes", headers={"Connection": "close"})
            return message

        await self.app(scope, limited, send)


class Measured:
    """Observes seconds to the head of each answer, and forbids browsers to guess types."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                method = scope["method"] if scope["method"] in METHODS else "other"  # a label's values must stay few
                route = getattr(scope.get("route"), "path", "none")
                seconds = time.perf_counter() - began
                self.metrics.requests.labels(method, route, str(message["status"])).observe(seconds)
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        await self.app(scope, receive, observed)
