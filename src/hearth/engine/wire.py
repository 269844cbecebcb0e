"""Messages between an application and its engine process: MessagePack frames over a socket pair.

A frame is a 4-byte little-endian length and that many bytes. A closed socket is the message that the other
side is gone.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from hearth import errors
from hearth.engine.outputs import EngineStats, RequestOutput
from hearth.engine.params import SamplingParams
from hearth.errors import EngineError, HearthError, RequestError

_LENGTH = struct.Struct("<I")


class AddRequest(msgspec.Struct, tag="add"):
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams


class AddEmbedding(msgspec.Struct, tag="embed"):
    request_id: str
    prompt_token_ids: list[int]
    pooling: str | None
    normalize: bool


class LoadAdapter(msgspec.Struct, tag="load-adapter"):
    ticket: int
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, tag="unload-adapter"):
    ticket: int
    name: str


class AbortRequest(msgspec.Struct, tag="abort"):
    request_id: str


class AskStats(msgspec.Struct, tag="ask-stats"):
    ticket: int


class Shutdown(msgspec.Struct, tag="shutdown"):
    drain: bool


class WireError(msgspec.Struct, omit_defaults=True):
    """A Hearth error on its way to the other process."""

    kind: str
    message: str
    fix: str | None = None
    param: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> WireError:
        if not isinstance(error, HearthError):
            return cls("EngineError", f"{type(error).__name__}: {error}")
        return cls(type(error).__name__, error.message, error.fix, getattr(error, "param", None))

    def error(self) -> HearthError:
        kind: type[HearthError] = getattr(errors, self.kind, EngineError)
        if issubclass(kind, RequestError):
            return kind(self.message, fix=self.fix, param=self.param)
        return kind(self.message, fix=self.fix)


class Ready(msgspec.Struct, tag="ready"):
    model_info: dict[str, Any]
    stats: EngineStats


class LoadFailed(msgspec.Struct, tag="load-failed"):
    error: WireError


class Outputs(msgspec.Struct, tag="outputs"):
    outputs: list[RequestOutput]


class Refused(msgspec.Struct, tag="refused"):
    request_id: str
    error: WireError


class Heartbeat(msgspec.Struct, tag="heartbeat"):
    """Sent by the engine loop itself, so that a stuck loop goes silent."""

    num_steps: int


class StatsReply(msgspec.Struct, tag="stats"):
    ticket: int
    stats: EngineStats


class AdaptersReply(msgspec.Struct, tag="adapters"):
    """The answer to `LoadAdapter` and `UnloadAdapter`: all loaded names, or why it was not done."""

    ticket: int
    names: list[str]
    error: WireError | None = None


class Closed(msgspec.Struct, tag="closed"):
    """The engine has drained and leaves on purpose."""


Command = AddRequest | AddEmbedding | AbortRequest | LoadAdapter | UnloadAdapter | AskStats | Shutdown
Event = Ready | LoadFailed | Outputs | Refused | Heartbeat | StatsReply | AdaptersReply | Closed

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(message: Command | Event) -> bytes:
    """A whole frame."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def decode_command(body: bytes) -> Command:
    return _command_decoder.decode(body)


def decode_event(body: bytes) -> Event:
    return _event_decoder.decode(body)


def frame_length(header: bytes) -> int:
    """The number of bytes that follow a header of `HEADER_SIZE` bytes."""
    length: int = _LENGTH.unpack(header)[0]
    return length


HEADER_SIZE = _LENGTH.size
