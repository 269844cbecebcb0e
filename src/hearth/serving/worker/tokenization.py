"""``POST /tokenize`` and ``/detokenize``, in vLLM's form."""

from __future__ import annotations

from typing import Any

from hearth.serving.decoding import decode, invalid
from hearth.serving.messages import chat_messages
from hearth.serving.protocol import DetokenizeRequest, TokenizeRequest
from hearth.serving.tool_use import tool_use
from hearth.serving.worker.adapters import Adapters
from hearth.serving.worker.prompts import PromptMaker


class Tokenization:
    """Tokens of texts and conversations, exactly as generation sees them."""

    def __init__(self, prompts: PromptMaker, adapters: Adapters, max_model_len: int) -> None:
        self._prompts = prompts
        self._adapters = adapters
        self._max_model_len = max_model_len

    async def tokenize(self, body: bytes) -> dict[str, Any]:
        """``{count, max_model_len, tokens, token_strs}``."""
        request = decode(body, TokenizeRequest)
        self._adapters.find(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise invalid("send either 'prompt' or 'messages'", "prompt")
        if request.prompt is not None:
            for name in ("tools", "add_generation_prompt", "chat_template_kwargs"):
                if getattr(request, name) is not None:
                    raise invalid(f"{name} goes with 'messages'", name)
            ids = await self._prompts.ids(
                request.prompt, add_special_tokens=request.add_special_tokens is not False
            )
        else:
            if request.add_special_tokens is not None:
                raise invalid("add_special_tokens goes with 'prompt'", "add_special_tokens")
            use = tool_use(request.tools, None, None)
            ids = await self._prompts.render(
                chat_messages(request.messages),
                tools=use.described if use else (),
                kwargs=request.chat_template_kwargs,
                add_generation_prompt=request.add_generation_prompt is not False,
            )
        strings = self._prompts.tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
        return {
            "count": len(ids), "max_model_len": self._max_model_len, "tokens": ids, "token_strs": strings,
        }  # fmt: skip

    async def detokenize(self, body: bytes) -> dict[str, Any]:
        """``{prompt}``."""
        request = decode(body, DetokenizeRequest)
        self._adapters.find(request.model)
        size = len(self._prompts.tokenizer)
        outside = [token_id for token_id in request.tokens if token_id >= size]
        if outside:
            raise invalid(f"tokens has id {outside[0]}, outside the vocabulary of {size}", "tokens")
        return {"prompt": self._prompts.text_of(request.tokens)}
