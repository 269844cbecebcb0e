"""The names of all metrics and their labels: the only module that holds them.

Dashboards, alerts and the monitoring room refer to these constants, so a rename is one edit, seen by a test.
Prometheus names carry the prefix ``hearth_`` and base units (seconds, bytes, ratios from 0 to 1); counters
end in ``_total`` when exposed. OpenTelemetry's GenAI names (``OTEL_PREFIX``) are still changing; whatever
exports them keeps them here too, and a test finds them anywhere else.
"""

from __future__ import annotations

from typing import Final

# Labels. Values come from a closed set that the operator controls; never a user's text or identity.
LABEL_MODEL: Final = "model"
LABEL_ROUTE: Final = "route"
LABEL_STATUS: Final = "status"
LABEL_REASON: Final = "reason"
LABEL_VERSION: Final = "version"
LABEL_DTYPE: Final = "dtype"
LABEL_WEIGHTS: Final = "weights"
LABEL_KV_DTYPE: Final = "kv_dtype"
LABEL_ATTENTION: Final = "attention"

# Engine gauges.
ENGINE_RUNNING: Final = "hearth_engine_requests_running"
ENGINE_WAITING: Final = "hearth_engine_requests_waiting"
ENGINE_KV_USAGE: Final = "hearth_engine_kv_cache_usage_ratio"
ENGINE_KV_WASTE: Final = "hearth_engine_kv_cache_waste_ratio"
ENGINE_HOST_BLOCKS: Final = "hearth_engine_host_blocks_used"
ENGINE_ADAPTERS: Final = "hearth_engine_adapters_loaded"
ENGINE_HEARTBEAT_AGE: Final = "hearth_engine_heartbeat_age_seconds"
ENGINE_INFO: Final = "hearth_engine_info"

# Engine counters.
ENGINE_PROMPT_TOKENS: Final = "hearth_engine_prompt_tokens"
ENGINE_CACHED_TOKENS: Final = "hearth_engine_prompt_tokens_cached"
ENGINE_GENERATION_TOKENS: Final = "hearth_engine_generation_tokens"
ENGINE_FINISHED: Final = "hearth_engine_requests_finished"
ENGINE_PREEMPTIONS: Final = "hearth_engine_preemptions"
ENGINE_PREFIX_QUERIES: Final = "hearth_engine_prefix_cache_query_tokens"
ENGINE_PREFIX_HITS: Final = "hearth_engine_prefix_cache_hit_tokens"
ENGINE_SWAPPED_OUT: Final = "hearth_engine_blocks_swapped_out"
ENGINE_SWAPPED_IN: Final = "hearth_engine_blocks_swapped_in"
ENGINE_DRAFTS: Final = "hearth_engine_drafts"
ENGINE_DRAFT_TOKENS: Final = "hearth_engine_draft_tokens"
ENGINE_ACCEPTED_TOKENS: Final = "hearth_engine_draft_tokens_accepted"
ENGINE_STEPS: Final = "hearth_engine_steps"
ENGINE_FAILED_STEPS: Final = "hearth_engine_steps_failed"
ENGINE_EMBEDDINGS: Final = "hearth_engine_embeddings"

# Engine histograms.
ENGINE_TTFT: Final = "hearth_engine_time_to_first_token_seconds"
ENGINE_ITL: Final = "hearth_engine_inter_token_latency_seconds"
ENGINE_E2E: Final = "hearth_engine_request_duration_seconds"
ENGINE_REQUEST_PROMPT_TOKENS: Final = "hearth_engine_request_prompt_tokens"
ENGINE_REQUEST_GENERATION_TOKENS: Final = "hearth_engine_request_generation_tokens"

# Gateway.
GATEWAY_REQUESTS: Final = "hearth_gateway_requests"
GATEWAY_IN_FLIGHT: Final = "hearth_gateway_requests_in_flight"
GATEWAY_DURATION: Final = "hearth_gateway_request_duration_seconds"
GATEWAY_UPSTREAM_ERRORS: Final = "hearth_gateway_upstream_errors"
GATEWAY_REJECTED: Final = "hearth_gateway_requests_rejected"
GATEWAY_WORKER_UP: Final = "hearth_gateway_worker_up"
GATEWAY_WORKER_RESTARTS: Final = "hearth_gateway_worker_restarts"
GATEWAY_INFO: Final = "hearth_gateway_info"

PREFIX: Final = "hearth_"
OTEL_PREFIX: Final = "gen_ai."


def metric_names() -> tuple[str, ...]:
    """Every Prometheus metric name (families, without the ``_total`` of counters), sorted."""
    return tuple(
        sorted(
            value
            for key, value in globals().items()
            if key.isupper() and isinstance(value, str) and value.startswith(PREFIX) and value != PREFIX
        )
    )
