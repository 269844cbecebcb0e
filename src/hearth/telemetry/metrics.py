"""Prometheus metrics of the engine and of the gateway, each in a registry of its own.

A registry per object, never the library's global one: a process may hold several (tests do), and a scrape
must show what this server did, nothing else. Gauges that live in the engine process are read at scrape time
from the last ``EngineSnapshot``; counters and histograms are pushed as things happen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hearth.telemetry import names

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# From a small model on a fast device to a large one on a slow CPU with a long prompt.
TTFT_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
    600.0,
)  # fmt: skip
INTER_TOKEN_BUCKETS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0,
)  # fmt: skip
DURATION_BUCKETS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0,
    1280.0,
)  # fmt: skip
TOKEN_BUCKETS = tuple(float(4**power) for power in range(11))  # 1 to about a million


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """State of the engine at one moment; what is not a gauge counts from the start of the engine."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    kv_waste: float = 0.0
    num_used_host_blocks: int = 0
    num_adapters: int = 0
    heartbeat_age: float = 0.0
    num_preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    num_blocks_swapped_out: int = 0
    num_blocks_swapped_in: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_steps: int = 0
    num_failed_steps: int = 0


# Metric, help, field of the snapshot.
_GAUGES = (
    (names.ENGINE_RUNNING, "Requests in the running batch.", "num_running"),
    (names.ENGINE_WAITING, "Requests waiting for a place in the batch.", "num_waiting"),
    (names.ENGINE_KV_USAGE, "Share of the KV cache in use, 0 to 1.", "kv_usage"),
    (names.ENGINE_KV_WASTE, "Share of the used KV slots that hold no token, 0 to 1.", "kv_waste"),
    (names.ENGINE_HOST_BLOCKS, "Host blocks that hold preempted requests.", "num_used_host_blocks"),
    (names.ENGINE_ADAPTERS, "LoRA adapters that requests may ask for.", "num_adapters"),
    (names.ENGINE_HEARTBEAT_AGE, "Seconds since the engine loop was last seen.", "heartbeat_age"),
)
_COUNTERS = (
    (names.ENGINE_PREEMPTIONS, "Requests put back to wait for KV blocks.", "num_preemptions"),
    (names.ENGINE_PREFIX_QUERIES, "Prompt tokens looked up in the prefix cache.", "prefix_query_tokens"),
    (names.ENGINE_PREFIX_HITS, "Prompt tokens that the prefix cache had.", "prefix_hit_tokens"),
    (names.ENGINE_SWAPPED_OUT, "KV blocks copied to host memory.", "num_blocks_swapped_out"),
    (names.ENGINE_SWAPPED_IN, "KV blocks copied back from host memory.", "num_blocks_swapped_in"),
    (names.ENGINE_DRAFTS, "Times that a sequence had drafts to verify.", "num_drafts"),
    (names.ENGINE_DRAFT_TOKENS, "Drafted tokens.", "num_draft_tokens"),
    (names.ENGINE_ACCEPTED_TOKENS, "Drafted tokens that were right.", "num_accepted_tokens"),
    (names.ENGINE_STEPS, "Steps of the engine.", "num_steps"),
    (names.ENGINE_FAILED_STEPS, "Steps that failed, whose requests ended with an error.", "num_failed_steps"),
)
# What an engine says of itself in the labels of its info; what it does not say is left empty.
_FACTS = (names.LABEL_DTYPE, names.LABEL_WEIGHTS, names.LABEL_KV_DTYPE, names.LABEL_ATTENTION)


class _SnapshotCollector(Collector):
    """Exposes the last snapshot; what it does not know yet it leaves out rather than report as zero."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.snapshot: EngineSnapshot | None = None

    def collect(self) -> Iterator[Metric]:
        """Yield the families of the snapshot."""
        if self.snapshot is None:
            return
        labels = [names.LABEL_MODEL]
        families: list[tuple[GaugeMetricFamily | CounterMetricFamily, str]] = [
            *((GaugeMetricFamily(name, text, labels=labels), field) for name, text, field in _GAUGES),
            *((CounterMetricFamily(name, text, labels=labels), field) for name, text, field in _COUNTERS),
        ]
        for family, field in families:
            family.add_metric([self._model], float(getattr(self.snapshot, field)))
            yield family


class EngineMetrics:
    """What a worker measures about its engine; every series has the label ``model``."""

    def __init__(self, model: str, version: str, facts: Mapping[str, Any] | None = None) -> None:
        """``facts`` is the engine's `model_info`, of which dtype, compression and attention are shown."""
        self.registry = CollectorRegistry(auto_describe=False)
        self._model = model
        self._snapshot = _SnapshotCollector(model)
        self.registry.register(self._snapshot)
        info = self._gauge(
            names.ENGINE_INFO, "1; the labels say what is served, and how.", (names.LABEL_VERSION, *_FACTS)
        )
        info.labels(model, version, *(str((facts or {}).get(name, "")) for name in _FACTS)).set(1)
        self._prompt_tokens = self._counter(names.ENGINE_PROMPT_TOKENS, "Prompt tokens of started requests.")
        self._cached_tokens = self._counter(
            names.ENGINE_CACHED_TOKENS, "Prompt tokens found in the prefix cache."
        )
        self._generation_tokens = self._counter(names.ENGINE_GENERATION_TOKENS, "Generated tokens.")
        self._embeddings = self._counter(names.ENGINE_EMBEDDINGS, "Texts that were embedded.")
        self._finished = self._counter(
            names.ENGINE_FINISHED, "Finished requests by reason.", (names.LABEL_REASON,)
        )
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(model, reason)
        self._ttft = self._histogram(
            names.ENGINE_TTFT, "From arrival at the worker to the first token.", TTFT_BUCKETS
        )
        self._inter_token = self._histogram(
            names.ENGINE_ITL, "Between two tokens of one answer.", INTER_TOKEN_BUCKETS
        )
        self._e2e = self._histogram(names.ENGINE_E2E, "From arrival to the last token.", DURATION_BUCKETS)
        self._request_prompt = self._histogram(
            names.ENGINE_REQUEST_PROMPT_TOKENS, "Prompt tokens of a request.", TOKEN_BUCKETS
        )
        self._request_generation = self._histogram(
            names.ENGINE_REQUEST_GENERATION_TOKENS, "Generated tokens of a request.", TOKEN_BUCKETS
        )

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        counter = Counter(name, text, (names.LABEL_MODEL, *labels), registry=self.registry)
        if not labels:
            counter.labels(self._model)  # a series that exists at zero can be rated from the first event
        return counter

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, text, (names.LABEL_MODEL, *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, (names.LABEL_MODEL,), buckets=buckets, registry=self.registry)
        histogram.labels(self._model)
        return histogram

    def observe_first_token(self, seconds: float, *, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """The first token of a request came ``seconds`` after its arrival."""
        self._ttft.labels(self._model).observe(seconds)
        self._prompt_tokens.labels(self._model).inc(num_prompt_tokens)
        self._cached_tokens.labels(self._model).inc(num_cached_tokens)
        self._request_prompt.labels(self._model).observe(num_prompt_tokens)

    def observe_tokens(self, num_tokens: int, seconds: float | None) -> None:
        """``num_tokens`` came, ``seconds`` after the tokens before them (None for the first ones)."""
        if num_tokens <= 0:
            return
        self._generation_tokens.labels(self._model).inc(num_tokens)
        if seconds is not None:
            self._inter_token.labels(self._model).observe(seconds / num_tokens)

    def observe_finished(self, reason: str, *, seconds: float, num_generated: int) -> None:
        """A request ended: stop, length, abort or error."""
        self._finished.labels(self._model, reason).inc()
        self._e2e.labels(self._model).observe(seconds)
        self._request_generation.labels(self._model).observe(num_generated)

    def observe_embedding(self, *, num_prompt_tokens: int) -> None:
        """A text was embedded."""
        self._embeddings.labels(self._model).inc()
        self._prompt_tokens.labels(self._model).inc(num_prompt_tokens)

    def update(self, snapshot: EngineSnapshot) -> None:
        """Replace the snapshot that the next scrape shows."""
        self._snapshot.snapshot = snapshot

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self.registry)


class GatewayMetrics:
    """What the gateway measures about requests, whatever engine answers them."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        registry = self.registry
        self.requests = Counter(
            names.GATEWAY_REQUESTS,
            "Answered requests by route, model and HTTP status (499: the client went away).",
            (names.LABEL_ROUTE, names.LABEL_MODEL, names.LABEL_STATUS),
            registry=registry,
        )
        self.in_flight = Gauge(
            names.GATEWAY_IN_FLIGHT, "Requests at a worker now.", (names.LABEL_MODEL,), registry=registry
        )
        self.duration = Histogram(
            names.GATEWAY_DURATION,
            "From the arrival of a request to the last byte of its answer.",
            (names.LABEL_ROUTE, names.LABEL_MODEL),
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self.upstream_errors = Counter(
            names.GATEWAY_UPSTREAM_ERRORS,
            "Requests that a worker failed to answer, by what happened.",
            (names.LABEL_MODEL, names.LABEL_REASON),
            registry=registry,
        )
        self.rejected = Counter(
            names.GATEWAY_REJECTED,
            "Requests turned away before they reached a worker.",
            (names.LABEL_MODEL, names.LABEL_REASON),
            registry=registry,
        )
        self.worker_up = Gauge(
            names.GATEWAY_WORKER_UP,
            "1 while the worker of the model is ready.",
            (names.LABEL_MODEL,),
            registry=registry,
        )
        self.restarts = Counter(
            names.GATEWAY_WORKER_RESTARTS,
            "Restarts of the model's worker.",
            (names.LABEL_MODEL,),
            registry=registry,
        )
        Gauge(
            names.GATEWAY_INFO, "1; the label says the version.", (names.LABEL_VERSION,), registry=registry
        ).labels(version).set(1)

    def register_model(self, model: str) -> None:
        """Create the series of ``model`` at zero."""
        self.in_flight.labels(model).set(0)
        self.worker_up.labels(model).set(0)
        self.restarts.labels(model)

    def observe_request(self, route: str, model: str, status: int, seconds: float) -> None:
        """A request ended with ``status``; unknown models share the label value ``-``."""
        self.requests.labels(route, model or "-", str(status)).inc()
        self.duration.labels(route, model or "-").observe(seconds)

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self.registry)


def merge_expositions(texts: Iterable[bytes]) -> bytes:
    """Join text expositions into one: samples of one family stand together under one HELP and TYPE.

    The format forbids a family that appears twice. The series must differ in their labels (workers differ in
    ``model``); the first HELP and TYPE of a family win.
    """
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family = ""
        for line in text.decode("utf-8").splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                samples.setdefault(family, [])
                kept = headers.setdefault(family, [])
                if not any(old[:6] == line[:6] for old in kept):
                    kept.append(line)
            elif line and not line.startswith("#"):
                samples.setdefault(family, []).append(line)
    lines = [line for family in samples for line in (*headers.get(family, ()), *samples[family])]
    return ("\n".join(lines) + "\n").encode("utf-8") if lines else b""
