"""Prometheus metrics: what is pushed is what a scrape shows, and merged expositions stay valid."""

from __future__ import annotations

from dataclasses import fields

from prometheus_client.parser import text_string_to_metric_families

from hearth.telemetry import names
from hearth.telemetry.metrics import EngineMetrics, EngineSnapshot, GatewayMetrics, merge_expositions


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_engine_metrics_show_what_was_observed() -> None:
    metrics = EngineMetrics("tiny", "tiny@1")
    metrics.observe_first_token(0.25, num_prompt_tokens=7, num_cached_tokens=4)
    metrics.observe_tokens(1, None)
    metrics.observe_tokens(2, 0.5)
    metrics.observe_tokens(0, 0.5)
    metrics.observe_finished("stop", seconds=0.75, num_generated=3)
    metrics.update(
        EngineSnapshot(num_running=2, num_waiting=1, kv_usage=0.5, num_preemptions=3, heartbeat_age=0.1)
    )
    seen = samples(metrics.render())
    label = (("model", "tiny"),)
    assert seen[names.ENGINE_PROMPT_TOKENS + "_total", label] == 7
    assert seen[names.ENGINE_CACHED_TOKENS + "_total", label] == 4
    assert seen[names.ENGINE_GENERATION_TOKENS + "_total", label] == 3
    assert seen[names.ENGINE_TTFT + "_sum", label] == 0.25
    assert seen[names.ENGINE_ITL + "_sum", label] == 0.25
    assert seen[names.ENGINE_ITL + "_count", label] == 1
    assert seen[names.ENGINE_E2E + "_count", label] == 1
    assert seen[names.ENGINE_FINISHED + "_total", (("model", "tiny"), ("reason", "stop"))] == 1
    assert seen[names.ENGINE_FINISHED + "_total", (("model", "tiny"), ("reason", "error"))] == 0
    assert seen[names.ENGINE_RUNNING, label] == 2
    assert seen[names.ENGINE_KV_USAGE, label] == 0.5
    assert seen[names.ENGINE_PREEMPTIONS + "_total", label] == 3


def test_every_field_of_a_snapshot_is_shown_under_a_name_of_its_own() -> None:
    metrics = EngineMetrics("tiny", "tiny@1")
    before = samples(metrics.render())
    values = {field.name: number for number, field in enumerate(fields(EngineSnapshot), start=1)}
    metrics.update(EngineSnapshot(**values))
    after = samples(metrics.render())
    label = (("model", "tiny"),)
    new = {name: value for (name, labels), value in after.items() if (name, labels) not in before}
    assert sorted(new.values()) == sorted(values.values())
    for name, field in (
        (names.ENGINE_KV_WASTE, "kv_waste"),
        (names.ENGINE_HOST_BLOCKS, "num_used_host_blocks"),
        (names.ENGINE_ADAPTERS, "num_adapters"),
        (names.ENGINE_PREFIX_QUERIES + "_total", "prefix_query_tokens"),
        (names.ENGINE_PREFIX_HITS + "_total", "prefix_hit_tokens"),
        (names.ENGINE_SWAPPED_OUT + "_total", "num_blocks_swapped_out"),
        (names.ENGINE_SWAPPED_IN + "_total", "num_blocks_swapped_in"),
        (names.ENGINE_DRAFTS + "_total", "num_drafts"),
        (names.ENGINE_DRAFT_TOKENS + "_total", "num_draft_tokens"),
        (names.ENGINE_ACCEPTED_TOKENS + "_total", "num_accepted_tokens"),
        (names.ENGINE_STEPS + "_total", "num_steps"),
        (names.ENGINE_FAILED_STEPS + "_total", "num_failed_steps"),
    ):
        assert after[name, label] == values[field], name


def test_the_info_says_how_the_model_is_served() -> None:
    facts = {"dtype": "bfloat16", "weights": "int8", "kv_dtype": "auto", "attention": "native", "layers": 2}
    (labels,) = (
        dict(labels)
        for (name, labels) in samples(EngineMetrics("tiny", "tiny@1", facts).render())
        if name == names.ENGINE_INFO
    )
    facts.pop("layers")
    assert labels == {"model": "tiny", "version": "tiny@1", **facts}


def test_embedded_texts_count_apart_from_requests_that_generate() -> None:
    metrics = EngineMetrics("tiny", "tiny@1")
    metrics.observe_embedding(num_prompt_tokens=5)
    metrics.observe_embedding(num_prompt_tokens=2)
    seen, label = samples(metrics.render()), (("model", "tiny"),)
    assert seen[names.ENGINE_EMBEDDINGS + "_total", label] == 2
    assert seen[names.ENGINE_PROMPT_TOKENS + "_total", label] == 7
    assert seen[names.ENGINE_TTFT + "_count", label] == 0


def test_gauges_of_an_engine_not_seen_yet_are_absent() -> None:
    assert names.ENGINE_RUNNING not in EngineMetrics("tiny", "tiny@1").render().decode()


def test_ttft_buckets_tell_slow_processors_apart() -> None:
    metrics = EngineMetrics("tiny", "tiny@1")
    metrics.observe_first_token(90.0, num_prompt_tokens=1, num_cached_tokens=0)
    seen = samples(metrics.render())
    bucket = names.ENGINE_TTFT + "_bucket"
    assert seen[bucket, (("le", "60.0"), ("model", "tiny"))] == 0
    assert seen[bucket, (("le", "120.0"), ("model", "tiny"))] == 1


def test_merged_expositions_hold_each_family_once() -> None:
    first, second = EngineMetrics("a", "a@1"), EngineMetrics("b", "b@2")
    for metrics, count in ((first, 3), (second, 5)):
        metrics.observe_tokens(count, 0.1)
        metrics.update(EngineSnapshot(num_running=count))
    gateway = GatewayMetrics("0.0")
    gateway.register_model("a")
    gateway.observe_request("/v1/completions", "a", 200, 0.1)
    merged = merge_expositions([gateway.render(), first.render(), second.render()])
    lines = merged.decode().splitlines()
    types = [line.split(" ")[2] for line in lines if line.startswith("# TYPE ")]
    assert len(types) == len(set(types))
    seen = samples(merged)
    assert seen[names.ENGINE_GENERATION_TOKENS + "_total", (("model", "a"),)] == 3
    assert seen[names.ENGINE_GENERATION_TOKENS + "_total", (("model", "b"),)] == 5
    assert seen[names.ENGINE_RUNNING, (("model", "b"),)] == 5
    expected = samples(gateway.render()) | samples(first.render()) | samples(second.render())
    assert seen == expected


def test_merging_nothing_gives_nothing() -> None:
    assert merge_expositions([]) == b""
    assert merge_expositions([b""]) == b""


def test_an_unknown_model_does_not_become_a_label_value() -> None:
    gateway = GatewayMetrics("0.0")
    gateway.observe_request("/v1/completions", "", 404, 0.1)
    key = (("model", "-"), ("route", "/v1/completions"), ("status", "404"))
    assert samples(gateway.render())[names.GATEWAY_REQUESTS + "_total", key] == 1
