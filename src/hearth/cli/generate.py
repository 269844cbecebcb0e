"""`hearth generate MODEL PROMPT`: complete one prompt, shown as it grows."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from hearth.cli.engine_options import engine_options, take_engine_options
from hearth.cli.output import note, print_json
from hearth.errors import InputError

if TYPE_CHECKING:
    from hearth.engine import Engine, SamplingParams


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--max-tokens", type=int, default=128, show_default=True, help="Tokens to generate at most.")
@click.option("--temperature", type=float, default=0.7, show_default=True, help="0 is greedy.")
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, help="Keep the likeliest tokens of this mass."
)
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep this many tokens; 0 is off.")
@click.option(
    "--min-p", type=float, default=0.0, show_default=True, help="Drop tokens below this share of the best."
)
@click.option("--seed", type=int, help="Makes the answer reproducible.")
@click.option("--stop", multiple=True, help="End at this text; may be given several times.")
@click.option("--n", type=int, default=1, show_default=True, help="How many completions.")
@engine_options
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message, through the chat template.")
@click.option("--system", help="With --chat: the system message.")
@click.option("--json", "as_json", is_flag=True, help="Print the completions as JSON at the end.")
def generate(
    model: str,
    prompt: str,
    chat: bool,
    system: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Complete PROMPT with MODEL and print the text as it is generated.

    MODEL is a registered name (name, name@3, name@alias), a directory in Hugging Face format, or hf:org/name.
    PROMPT - reads the prompt from standard input.
    """
    from hearth.engine.params import SamplingParams

    engine_settings = take_engine_options(options)
    params = SamplingParams(**options)  # a wrong value fails before torch is imported
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")
    text = _read_prompt() if prompt == "-" else prompt
    from hearth.engine import Engine

    with Engine.load(model, **engine_settings) as engine:
        token_ids = chat_token_ids(engine, text, system) if chat else engine.encode(text)
        if as_json:
            _print_completions(engine, token_ids, text, params)
        else:
            _stream(engine, token_ids, params)


def _read_prompt() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on standard input is not UTF-8: {error}") from None


def chat_token_ids(engine: Engine, text: str, system: str | None) -> list[int]:
    """The ids of a conversation with one user message, ready for the assistant's turn."""
    from hearth.models import encode_chat

    if not getattr(engine.tokenizer, "chat_template", None):
        raise InputError("the model has no chat template", fix="leave out --chat")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return encode_chat(engine.tokenizer, messages)


def _print_completions(engine: Engine, token_ids: list[int], text: str, params: SamplingParams) -> None:
    completions = engine.generate([token_ids], params)
    print_json(
        {
            "prompt": text,
            "num_prompt_tokens": len(token_ids),
            "completions": [
                {
                    "index": completion.index,
                    "text": completion.text,
                    "token_ids": completion.token_ids,
                    "finish_reason": completion.finish_reason,
                }
                for completion in completions
            ],
        }
    )


def _stream(engine: Engine, token_ids: list[int], params: SamplingParams) -> None:
    """One completion is written as it grows; several would mix, so they come one after the other."""
    if params.n > 1:
        for completion in engine.generate([token_ids], params):
            click.echo(f"--- {completion.index} ({completion.finish_reason})", err=True)
            click.echo(completion.text)
        return
    reason, num_tokens = "", 0
    for output in engine.stream(token_ids, params):
        click.echo(output.text, nl=False)
        sys.stdout.flush()
        num_tokens += len(output.token_ids)
        reason = output.finish_reason or reason
    click.echo()
    if reason == "length":
        note(f"stopped after {num_tokens} tokens; --max-tokens allows more")
