"""What a request may say: the OpenAI fields that we know, our extensions, and what is refused.

Nothing is ignored in silence. A field is one of: used; of no effect on the answer (``user``, ``metadata`` …);
known to OpenAI but not supported here, refused unless it holds its neutral value; unknown, refused by name.
Extensions beyond OpenAI: ``top_k``, ``min_p``, ``min_tokens``, ``ignore_eos``, ``stop_token_ids``,
``repetition_penalty``, and vLLM's ``guided_*``, ``structured_outputs``, ``prompt_logprobs``, ``priority``,
``cache_salt``, ``skip_special_tokens``, ``chat_template_kwargs``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from hearth.serving.constraints import Constrained
from hearth.serving.decoding import NOT_JSON, decode, explain, not_json
from hearth.serving.http import HttpError
from hearth.serving.messages import ChatMessage
from hearth.serving.tool_use import Tool, ToolChoice

MAX_CHOICES = 128

Temperature = Annotated[float, Meta(ge=0.0, le=2.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
NumLogprobs = Annotated[int, Meta(ge=0, le=20)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream carries besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; of no effect on the answer


class Sampling(Constrained, kw_only=True):
    """Fields that every generation request may carry. ``None`` is the same as absent."""

    model: str | None = None
    max_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    n: Choices | None = None
    stream: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = None
    # Extensions.
    top_k: NonNegative | None = None
    min_p: Share | None = None
    min_tokens: NonNegative | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[NonNegative] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0)] | None = None
    priority: int | None = None
    cache_salt: str | None = None
    skip_special_tokens: bool | None = None


class _OpenAIFields(Sampling, kw_only=True):
    stream_options: StreamOptions | None = None
    prompt_logprobs: NumLogprobs | None = None
    # Of no effect on the answer.
    user: Any = None
    metadata: Any = None
    # Refused unless neutral; see _NEUTRAL.
    service_tier: Any = None
    store: Any = None


class CompletionRequest(_OpenAIFields, kw_only=True):
    """``POST /v1/completions``."""

    prompt: Any | UnsetType = UNSET
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
    best_of: Choices | None = None
    suffix: Any = None


class ChatRequest(_OpenAIFields, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] | UnsetType = UNSET
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Of no effect on the answer.
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # Refused unless neutral.
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class GenerateRequest(Sampling, kw_only=True):
    """``POST /generate``: one prompt, one answer."""

    prompt: str | list[NonNegative] | UnsetType = UNSET


class PlainChatRequest(Sampling, kw_only=True):
    """``POST /chat``: ``messages``, or ``message`` with an optional ``system`` text and ``history``."""

    messages: list[ChatMessage] | None = None
    message: str | None = None
    system: str | None = None
    history: list[ChatMessage] | None = None


class EmbeddingRequest(msgspec.Struct, forbid_unknown_fields=True):
    """``POST /v1/embeddings``."""

    input: Any | UnsetType = UNSET
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    priority: int | None = None
    user: Any = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """``POST /tokenize``: vLLM's, for a ``prompt`` or for ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """``POST /detokenize``: vLLM's."""

    tokens: list[NonNegative]
    model: str | None = None


class LoadAdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    """``POST /v1/load_lora_adapter``: vLLM's; ``model`` says of which model, where there are several."""

    lora_name: str
    lora_path: str
    model: str | None = None


class UnloadAdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    """``POST /v1/unload_lora_adapter``."""

    lora_name: str
    model: str | None = None


# The values of an unsupported field that ask for nothing. None is always neutral.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}

Parsed = TypeVar("Parsed", bound=Sampling)


def parse(body: bytes, kind: type[Parsed]) -> Parsed:
    """Decode a generation request strictly; HttpError 400 names the field, the value and what is allowed."""
    request = decode(body, kind)
    for name, neutral in _NEUTRAL.items():
        value = getattr(request, name, None)
        if value is not None and value not in neutral:
            raise HttpError(400, f"{name} is not supported yet", param=name, code="unsupported_parameter")
    return request


class Routing(msgspec.Struct):
    """What the gateway reads of a request; whatever else is wrong with it, the worker says."""

    model: str | None = None
    stream: bool | None = None
    n: Any = None
    best_of: Any = None
    prompt: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")

    @property
    def num_sequences(self) -> int:
        """Sequences that the request asks for: prompts x choices."""
        choices = max((value for value in (self.n, self.best_of) if type(value) is int), default=1)
        return min(max(choices, 1), MAX_CHOICES) * max(_num_texts(self.prompt), _num_texts(self.input))


_routing_decoder = msgspec.json.Decoder(Routing)
_items_decoder = msgspec.json.Decoder(list[msgspec.Raw])


def routing_fields(body: bytes) -> Routing:
    """The fields by which a request is routed. HttpError 400 if it is no object."""
    try:
        return _routing_decoder.decode(body)
    except msgspec.ValidationError as error:
        raise explain(str(error), body, Sampling) from None
    except NOT_JSON as error:
        raise not_json(error) from None


def _num_texts(raw: msgspec.Raw) -> int:
    """How many prompts a prompt is: a list of numbers is one."""
    start = bytes(raw)[:1]
    if start != b"[":
        return 1
    items = _items_decoder.decode(raw)
    return len(items) if items and bytes(items[0])[:1] in (b'"', b"[") else 1
