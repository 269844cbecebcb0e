"""Sockets and servers of worker and gateway."""

from __future__ import annotations

import asyncio
import socket

import pytest

from hearth.serving.servers import bind, make_server


def test_a_taken_port_is_an_error_at_once() -> None:
    with bind("127.0.0.1", 0) as sock, pytest.raises(OSError, match="in use"):
        bind("127.0.0.1", sock.getsockname()[1])


async def test_answers_do_not_wait_for_delayed_acknowledgements() -> None:
    options: list[int] = []

    async def app(scope, receive, send) -> None:
        transport = next(iter(server.server_state.connections)).transport
        raw = transport.get_extra_info("socket")
        options.append(raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    with bind("127.0.0.1", 0) as sock:
        server = make_server(app, drain_seconds=1)
        serving = asyncio.create_task(server.serve([sock]))
        reader, writer = await asyncio.open_connection(*sock.getsockname())
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 204")
        writer.close()
        server.should_exit = True
        await serving
    assert options[0] != 0
