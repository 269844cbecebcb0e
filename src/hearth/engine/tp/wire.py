"""Messages between rank 0 and another rank, over a socket pair: frames as in `hearth.engine.wire`."""

from __future__ import annotations

import socket
import struct

import msgspec

from hearth.engine.params import SamplingParams
from hearth.engine.plan import Plan, PlanRow
from hearth.engine.request import Request
from hearth.engine.wire import WireError

_LENGTH = struct.Struct("<I")


class Loaded(msgspec.Struct, tag="loaded"):
    """The weights are there. From rank 0: everybody's are; meet in the process group."""


class Failed(msgspec.Struct, tag="failed"):
    error: WireError


class Ready(msgspec.Struct, tag="ready"):
    """The model was examined and its cache made. From rank 0, with the number of slots for swapped blocks."""

    num_host_blocks: int = 0


class Step(msgspec.Struct, tag="step", array_like=True):
    """A plan: for each row start, token ids, block ids and the number of logits; and the swaps."""

    rows: list[tuple[int, tuple[int, ...], tuple[int, ...], int]]
    swap_out: tuple[tuple[int, int], ...] = ()
    swap_in: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, plan: Plan) -> Step:
        rows = [(row.start, row.token_ids, row.block_ids, row.num_logits) for row in plan.rows]
        return cls(rows, plan.swap_out, plan.swap_in)

    def plan(self) -> Plan:
        rows = tuple(
            PlanRow(_NOBODY, start, len(token_ids), token_ids, block_ids, num_logits, num_logits > 0)
            for start, token_ids, block_ids, num_logits in self.rows
        )
        return Plan(rows, (), self.swap_out, self.swap_in)


Message = Loaded | Failed | Ready
_NOBODY = Request("another rank's", 0, [0], SamplingParams(), 1)
_encoder = msgspec.msgpack.Encoder()
_message: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_step: msgspec.msgpack.Decoder[Step] = msgspec.msgpack.Decoder(Step)


def send(connection: socket.socket, message: Message | Step) -> None:
    body = _encoder.encode(message)
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket) -> bytes:
    """The body of the next frame; raises `ConnectionError` if the other side is gone."""
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    return _read(connection, length)


def decode(body: bytes) -> Message:
    return _message.decode(body)


def decode_step(body: bytes) -> Step:
    return _step.decode(body)


def _read(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(length - len(parts))
        if not part:
            raise ConnectionResetError("the other rank is gone")
        parts += part
    return bytes(parts)
