"""uvicorn, without its handling of signals: whoever runs a server decides what Ctrl-C means."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Generator
from typing import Any

import uvicorn
from starlette.types import ASGIApp


class Server(uvicorn.Server):
    """A uvicorn server that leaves SIGINT and SIGTERM to its owner. ``should_exit = True`` ends it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture nothing."""
        yield


def make_server(app: ASGIApp, *, drain_seconds: float, **address: Any) -> Server:
    """A server for ``app``; its own logs are silent below errors, we write our own."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
        timeout_keep_alive=75,
        ws="none",
        server_header=False,
        **address,
    )
    return Server(config)


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. Raises OSError, EADDRINUSE if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only on sockets that say they are TCP; without
    # it an answer whose head and body are written apart waits 40 ms for the client's delayed ACK.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        # At once: with SO_REUSEADDR a port that is bound but does not listen can be bound by another too.
        sock.listen(1024)
    except BaseException:
        sock.close()
        raise
    return sock
