"""Answering over HTTP: the worker (one engine, one server), the gateway before it, and their supervision.

Contract: `hearth serve` and ``ServerProcess`` are the two ways in. The gateway process loads no torch. A
failure anywhere becomes an error of OpenAI's shape, at once; nothing hangs and nothing pretends to be whole.
"""

from hearth.serving.process import ServerProcess

__all__ = ["ServerProcess"]
