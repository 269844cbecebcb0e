"""The arithmetic of the engine benchmark: rates, bytes, operations, percentiles, the scaled trace. Pure."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What a Qwen3-shaped model with tied embeddings costs to run; ``config`` as in its config.json."""

    config: Mapping[str, Any]

    @property
    def layer_weights(self) -> int:
        """Weights of all the layers' linears."""
        c = self.config
        attention = c["num_attention_heads"] * c["head_dim"]
        kv = c["num_key_value_heads"] * c["head_dim"]
        one = c["hidden_size"] * (2 * attention + 2 * kv + 3 * c["intermediate_size"])
        return int(c["num_hidden_layers"] * one)

    @property
    def head_weights(self) -> int:
        return int(self.config["vocab_size"] * self.config["hidden_size"])

    @property
    def kv_bytes_per_token(self) -> int:
        """In 16 bits: keys and values of all layers."""
        c = self.config
        return int(4 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"])

    def decode_bytes(self, weight_bytes: float, batch: int, length: int, num_tokens: int) -> float:
        """Bytes that a decode step reads at least: the weights once, and every sequence's keys and values.

        A sequence counts with its mean length while ``num_tokens`` are generated after ``length``.
        """
        return weight_bytes + batch * (length + num_tokens / 2) * self.kv_bytes_per_token

    def prefill_operations(self, batch: int, length: int) -> float:
        """2 operations a weight and token in the layers; two products of length x length / 2 in the causal
        attention; and the head for the last token of each prompt only."""
        c = self.config
        linears = 2 * self.layer_weights * batch * length
        attention = 2 * c["num_hidden_layers"] * c["num_attention_heads"] * c["head_dim"] * batch * length**2
        return linears + attention + 2 * self.head_weights * batch


def decode_rate(answer: Mapping[str, float]) -> float:
    """Tokens a second after every sequence has its first one."""
    return (answer["tokens"] - answer["tokens_by_first"]) / (answer["total"] - answer["first"])


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True)
class Arrival:
    """One request of a trace: seconds after the first, and sizes in tokens."""

    at: float
    num_prompt_tokens: int
    num_output_tokens: int


def scaled_trace(
    lines: Iterable[str], *, rate: float, seconds: float, max_prompt: int, max_output: int
) -> list[Arrival]:
    """The beginning of a trace (``TIMESTAMP,ContextTokens,GeneratedTokens``), at ``rate`` requests a second.

    Times are stretched by one factor, so bursts stay bursts; lengths are capped, not scaled, so the mixture
    of short and long stays.
    """
    rows = [
        (datetime.fromisoformat(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for row in csv.DictReader(lines)
    ]
    wanted = rows[: max(2, round(rate * seconds))]
    duration = (wanted[-1][0] - wanted[0][0]).total_seconds()
    stretch = (len(wanted) - 1) / rate / duration
    return [
        Arrival(
            (time - wanted[0][0]).total_seconds() * stretch,
            max(1, min(prompt, max_prompt)),
            max(1, min(output, max_output)),
        )
        for time, prompt, output in wanted
    ]
