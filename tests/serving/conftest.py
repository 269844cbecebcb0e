"""Tiny real models, and one real server that the tests of a session share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hearth.serving import ServerProcess

TEMPLATE = (
    "{# answers: <think>…</think>…<tool_call>{…}</tool_call> #}"
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and loop.index0 > 0 %}"
    "{{ raise_exception('a late system message') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ call['function']['name'] + call['function']['arguments'] | tojson }}{% endfor %}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]


def make_tiny_model(directory: Path, *, chat: bool, context: int = 256, seed: int = 0) -> Path:
    """A random Llama of 2 layers with a byte-level tokenizer of 256 bytes and ChatML tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from hearth.models import save_model

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    if chat:
        tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), tokenizer, directory)
    return directory


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """Makes further tiny models."""
    return make_tiny_model


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can chat."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-chat", chat=True)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-base", chat=False, seed=1)


@pytest.fixture(scope="session")
def server(tiny_chat: Path) -> Iterator[ServerProcess]:
    """A model behind its gateway. Tests must leave it as they found it."""
    options = ("--num-threads", "1", "--max-num-seqs", "32", "--log-level", "warning")
    with ServerProcess.start([tiny_chat], options=options, timeout=120) as running:
        yield running
