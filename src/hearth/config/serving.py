"""Settings of `hearth serve`, loaded in the same layers as a recipe; see ``load_settings``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from hearth.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

Port = Annotated[int, Field(ge=0, le=65535)]


class ServedModel(Section):
    """One model of a server, and how its engine runs. What is not given, the engine decides."""

    model: str = Field(description="name, name@3, name@production, a directory or hf:org/name.")
    name: str | None = Field(None, description="Its name in the API; default: that of the reference.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the weights; auto takes that of the model."
    )
    device: str | None = Field(None, description="Where it runs: auto, cpu, cuda:0 and so on.")
    max_model_len: PositiveInt | None = Field(None, description="Longest prompt and answer, in tokens.")
    max_num_seqs: PositiveInt | None = Field(None, description="Requests that are computed at once.")
    max_num_batched_tokens: PositiveInt | None = Field(None, description="Tokens in one engine step.")
    kv_cache_memory: PositiveInt | None = Field(None, description="Bytes for the key-value cache.")
    weights: Literal["auto", "int8", "int4"] = Field(
        "auto", description="Compress the weights at load; auto leaves them as stored."
    )
    kv_dtype: Literal["auto", "int8", "fp8"] = Field(
        "auto", description="Compress the key-value cache: int8 on a CPU, fp8 on a GPU."
    )
    swap_memory: NonNegativeInt | None = Field(
        None, description="Bytes of memory to which preempted requests may be copied."
    )
    speculation: str | None = Field(
        None, description="Draft tokens: ngram (from the text so far), or a small model with the same tokens."
    )
    num_draft_tokens: PositiveInt | None = Field(None, description="Tokens drafted at most in a step.")
    tensor_parallel: PositiveInt | None = Field(None, description="Processes that share each layer.")
    max_adapters: PositiveInt | None = Field(None, description="LoRA adapters loaded at once.")
    prefix_cache: bool | None = Field(None, description="Reuse the key-value cache of equal beginnings.")
    num_threads: PositiveInt | None = Field(None, description="CPU threads of its engine.")
    seed: int | None = Field(None, description="Randomness of requests that give no seed.")
    adapters: dict[str, str] = Field(
        {}, description="LoRA adapters to load: a name for requests, and a directory."
    )
    tool_parser: str = Field(
        "auto", description="Format of its tool calls: auto (by its chat template), none or a name."
    )
    reasoning_parser: str = Field("auto", description="Format of its reasoning, likewise.")

    @field_validator("name")
    @classmethod
    def _can_be_said(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or len(name) > 128 or not name.isprintable()):
            raise ValueError("a name has 1 to 128 printable characters")
        return name


class ServeConfig(Section):
    """A whole server. Environment variables: ``HEARTH_SERVE__PORT`` and so on."""

    environment_section: ClassVar[str] = "serve"

    models: tuple[ServedModel, ...] = Field((), description="The models to serve.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 means all of them.")
    port: Port = Field(8000, description="Port to listen on; 0 takes a free one.")
    require_api_keys: bool = Field(
        False, description="Refuse requests without a valid key of the workspace (`hearth keys create`)."
    )
    api_keys: tuple[SecretStr, ...] = Field(
        (), description="Further keys that are accepted; giving any turns require_api_keys on."
    )
    admin_key: SecretStr | None = Field(
        None,
        description="Key of the operator, who may load and unload models and adapters of the running server. "
        "Without one, only a server on 127.0.0.1 that requires no keys lets them be changed.",
    )
    max_models: PositiveInt | None = Field(None, description="Models that may be loaded at once.")
    idle_unload_seconds: NonNegativeFloat = Field(
        0.0,
        description="A model without requests for so long gives its memory back; its next request loads it "
        "again, and waits. 0: never.",
    )
    allow_ungated: bool = Field(
        False,
        description="Serve versions of the registry that have not passed the parity gate, with a warning.",
    )
    max_queue: NonNegativeInt = Field(
        256, description="Requests that may wait for an engine; more are answered 429. 0: no waiting."
    )
    max_body_bytes: PositiveInt = Field(16 << 20, description="Largest request body; more is answered 413.")
    request_timeout: PositiveFloat = Field(600.0, description="Seconds until a request is given up.")
    startup_timeout: PositiveFloat = Field(600.0, description="Seconds a worker may take to load its model.")
    drain_timeout: PositiveFloat = Field(
        30.0, description="Seconds that running requests get when the server stops, or their model leaves."
    )
    health_interval: PositiveFloat = Field(1.0, description="Seconds between two checks of a worker.")
    health_timeout: PositiveFloat = Field(
        15.0, description="A worker whose HTTP server is silent for so many seconds is replaced."
    )
    engine_hang_timeout: PositiveFloat = Field(
        120.0, description="A worker whose engine shows no sign of life for so many seconds is replaced."
    )
    restart_backoff: PositiveFloat = Field(
        0.5, description="Seconds before the first restart of a worker; doubles with each quick failure."
    )
    restart_limit: PositiveInt = Field(
        5, description="Quick failures in a row after which a worker is given up."
    )
    log_format: Literal["auto", "json", "plain"] = Field(
        "auto", description="How logs look on standard error; auto: plain on a terminal, else JSON lines."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="What is logged on standard error."
    )
    cors_origins: tuple[str, ...] = Field((), description="Origins that browsers may call from.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [served.name or served.model for served in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two models are called {twice[0]!r}; give one of them another name")
        if any(len(key.get_secret_value().strip()) < 8 for key in self.api_keys):
            raise ValueError("api_keys holds a key of fewer than 8 characters")
        if self.admin_key is not None and len(self.admin_key.get_secret_value().strip()) < 8:
            raise ValueError("admin_key has fewer than 8 characters")
        if self.admin_key is not None and self.admin_key in self.api_keys:
            raise ValueError("admin_key is one of api_keys: then everyone would be the operator")
        if self.max_models is not None and len(self.models) > self.max_models:
            raise ValueError(f"there are {len(self.models)} models, and max_models is {self.max_models}")
        return self
