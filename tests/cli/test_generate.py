"""`hearth generate`, run as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[bot]{% endif %}"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", chat_template=TEMPLATE
    ).save_pretrained(path)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def hearth(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hearth", "generate", *map(str, arguments)],
        input=stdin, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


def test_json_and_standard_input(model_dir: Path) -> None:
    result = hearth(model_dir, "-", "--json", "--max-tokens", "5", "--seed", "1", "--n", "2", stdin="Hé")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["prompt"] == "Hé"
    assert answer["num_prompt_tokens"] == 3
    assert [c["index"] for c in answer["completions"]] == [0, 1]


def test_text_is_streamed_and_chat_uses_the_template(model_dir: Path) -> None:
    result = hearth(model_dir, "Hi", "--chat", "--json", "--max-tokens", "3", "--temperature", "0")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["num_prompt_tokens"] == len("[user]Hi[bot]")
    plain = hearth(model_dir, "Hi", "--max-tokens", "3", "--temperature", "0")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.endswith("\n")


def test_settings_of_the_engine_reach_it(model_dir: Path) -> None:
    common = (
        model_dir,
        "abcabcabc",
        "--json",
        "--temperature",
        "0",
        "--max-tokens",
        "8",
        "--dtype",
        "bfloat16",
    )
    plain, drafted = hearth(*common), hearth(*common, "--speculation", "ngram", "--num-threads", "1")
    assert plain.returncode == drafted.returncode == 0, drafted.stderr
    assert json.loads(plain.stdout) == json.loads(drafted.stdout)
    compressed = hearth(*common, "--weights", "int8", "--kv-dtype", "int8", "--device", "cpu")
    assert compressed.returncode == 0, compressed.stderr
    assert len(json.loads(compressed.stdout)["completions"][0]["token_ids"]) == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-tokens", "0"], "max_tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--system", "x"], "--chat"),
        (["--dtype", "int3"], "int3"),
        (["--weights", "int3"], "int3"),
        (["--kv-dtype", "fp4"], "fp4"),
        (["--num-threads", "0"], "num_threads"),
        (["--speculation", "no/such/model"], "no/such/model"),
    ],
)
def test_wrong_options_exit_2(model_dir: Path, arguments: list[str], words: str) -> None:
    result = hearth(model_dir, "Hi", *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_what_the_template_refuses_exits_2(model_dir: Path, tmp_path: Path) -> None:
    refusing = shutil.copytree(model_dir, tmp_path / "refusing")
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system texts') }}{% endif %}"
    (refusing / "chat_template.jinja").write_text(refusal + TEMPLATE)
    result = hearth(refusing, "Hi", "--chat", "--system", "Be brief.")
    assert result.returncode == 2
    assert "no system texts" in result.stderr
    assert "Traceback" not in result.stderr


def test_wrong_input_exits_2(model_dir: Path, tmp_path: Path) -> None:
    long = hearth(model_dir, "x" * 100)
    assert long.returncode == 2
    assert "100 tokens" in long.stderr
    assert "64" in long.stderr
    missing = hearth(tmp_path / "nothing", "Hi")
    assert missing.returncode == 2
    assert "nothing" in missing.stderr
