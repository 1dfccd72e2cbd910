"""The API as a server of its own: uvicorn, locked down, which finishes what it has begun before it ends."""

from __future__ import annotations

import socket

import uvicorn

from diffusionfm.serve.api import Service, build_app

GRACE = 60  # seconds that requests under way are given when the server is told to stop
CONNECTIONS = 512


class Server(uvicorn.Server):
    """Serves until SIGINT or SIGTERM, then answers 503 to newcomers while the rest is drawn."""

    def __init__(self, service: Service):
        self.models = service.models
        options = uvicorn.Config(
            build_app(service),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # else anyone on this machine could claim any address
            lifespan="off",
            ws="none",
            workers=1,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=GRACE,
        )
        super().__init__(options)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.models.refuse()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. ValueError where that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}, port {port} ({error}): choose others") from error


def serve(service: Service, listener: socket.socket) -> None:
    """Answer on the socket until told to stop."""
    Server(service).run([listener])
