"""`hearth serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hearth.cli.output import note

if TYPE_CHECKING:
    from hearth.serving.run import Ready


@click.command()
@click.argument("models", nargs=-1, metavar="[NAME=]MODEL...")
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="A YAML file with all settings."
)
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port; 0 takes a free one.  [default: 8000]")
@click.option(
    "--api-key", "api_keys", multiple=True,
    help="A key that clients must send; repeatable. $HEARTH_SERVE__API_KEYS shows in no process list.",
)  # fmt: skip
@click.option("--require-api-keys", is_flag=True, default=None, help="Ask for a key of the workspace.")
@click.option("--max-models", type=int, help="Models that may be loaded at once.")
@click.option(
    "--idle-unload-seconds", type=float,
    help="Seconds after which a model that nobody asks gives its memory back.  [default: never]",
)  # fmt: skip
@click.option(
    "--allow-ungated", is_flag=True, default=None, help="Serve versions without a passed parity gate."
)
@click.option("--dtype", help="auto, float32, bfloat16 or float16.")
@click.option("--device", help="auto, cpu, cuda:0 ...")
@click.option("--weights", help="auto (as stored), int8 or int4.")
@click.option("--kv-dtype", help="auto, int8 (CPU) or fp8 (GPU).")
@click.option("--speculation", help="ngram, or a draft model with the same tokens.")
@click.option("--tensor-parallel", type=int, help="Processes that share each layer.")
@click.option("--swap-memory", type=int, help="Bytes to which preempted requests may be copied.")
@click.option("--max-model-len", type=int, help="Longest prompt and answer together, in tokens.")
@click.option("--max-num-seqs", type=int, help="Sequences that run at once.")
@click.option("--max-num-batched-tokens", type=int, help="Tokens in one step of the engine.")
@click.option("--kv-cache-memory", type=int, help="Bytes of the KV cache.")
@click.option("--num-threads", type=int, help="CPU threads of each engine.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=PATH", help="A LoRA adapter; repeatable.")
@click.option("--tool-parser", help="Format of tool calls: auto (by the chat template), none or a name.")
@click.option("--reasoning-parser", help="Format of reasoning, likewise.")
@click.option("--max-queue", type=int, help="Requests that may wait for a model; more get 429.")
@click.option("--request-timeout", type=float, help="Longest time of one request, in seconds.")
@click.option("--drain-timeout", type=float, help="Seconds that open requests get after Ctrl-C.")
@click.option("--health-timeout", type=float, help="Seconds of silence after which a worker is replaced.")
@click.option("--log-format", help="auto, json or plain.")
@click.option("--log-level", help="debug, info, warning or error.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON on stdout when ready.")
def serve(models: tuple[str, ...], config_path: Path | None, as_json: bool, **options: Any) -> None:
    """Serve MODELs over an OpenAI-compatible endpoint.

    MODEL is name, name@version, name@alias, a directory in Hugging Face format or hf:org/name. A version
    is served if its files are whole and it has passed the parity gate (`hearth parity`). Ctrl-C lets open
    requests finish, a second Ctrl-C does not.

    `hearth models load|reload|unload` change what it serves while it runs; $HEARTH_SERVE__ADMIN_KEY is the
    operator's key for that, and for loading adapters. Further settings: `hearth config schema --for serve`.
    """
    from hearth.config import ServeConfig, load_settings
    from hearth.serving.run import serve as run_server
    from hearth.telemetry import logs

    config = load_settings(ServeConfig, config_path, _overrides(models, options, config_path)).settings
    if not config.models:
        raise click.UsageError(f"{config_path}: models is empty; name a MODEL")
    logs.configure(config.log_format, level=config.log_level, static={"process": "gateway"})
    run_server(config, on_ready=_print_json if as_json else _print_ready, note=note)


def _overrides(models: tuple[str, ...], options: dict[str, Any], config_path: Path | None) -> list[str]:
    """The command line as ``key=value`` settings; engine options apply to every model named on it."""
    engine_keys = (
        *("dtype", "device", "max_model_len", "max_num_seqs", "kv_cache_memory", "num_threads"),
        *("weights", "kv_dtype", "speculation", "tensor_parallel", "swap_memory"),
        "max_num_batched_tokens",
        *("tool_parser", "reasoning_parser"),
    )
    engine = {key: options.pop(key) for key in engine_keys}
    engine["adapters"] = _adapters(options.pop("adapters"))
    engine = {key: value for key, value in engine.items() if value is not None}
    options["api_keys"] = options["api_keys"] or None
    if models:
        options["models"] = [{**_split_name(text), **engine} for text in models]
    elif config_path is None:
        raise click.UsageError("name a MODEL, or give --config FILE")
    elif engine:
        raise click.UsageError(
            f"{', '.join(engine)}: the models come from --config, so set this there, at each model"
        )
    return [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]


def _adapters(given: tuple[str, ...]) -> dict[str, str] | None:
    pairs = [text.partition("=") for text in given]
    for text, (name, _, path) in zip(given, pairs, strict=True):
        if not name or not path:
            raise click.UsageError(f"--adapter {text!r}: give NAME=PATH")
    return {name: path for name, _, path in pairs} or None


def _split_name(text: str) -> dict[str, Any]:
    """``NAME=MODEL`` or ``MODEL``."""
    name, equals, model = text.partition("=")
    return {"model": model, "name": name} if equals and name and model else {"model": text}


def _print_json(ready: Ready) -> None:
    click.echo(
        json.dumps(
            {"url": ready.url, "models": ready.models, "timeline": dict(ready.timeline)}, ensure_ascii=False
        )
    )


def _print_ready(ready: Ready) -> None:
    total = sum(seconds for _, seconds in ready.timeline)
    steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in ready.timeline)
    note(f"started in {total:.1f} s: {steps}")
    for model in ready.models:
        note(f"serving {model['version']} as {model['name']!r}, context {model['max_model_len']} tokens")
        for what, name in (("reasoning", model["reasoning_parser"]), ("tool", model["tool_parser"])):
            if name is not None:
                note(f"  {what} format: {name} (--{what}-parser changes it)")
        if model["adapters"]:
            note(f"  with the adapters {', '.join(model['adapters'])}")
    first = ready.models[0]
    key = " -H 'Authorization: Bearer YOUR_KEY'" if ready.keys_required else ""
    if first["chat"]:
        path, body = "/v1/chat/completions", '"messages": [{"role": "user", "content": "Hello"}]'
    else:
        path, body = "/v1/completions", '"prompt": "Once upon a time"'
    note(f"\n  {ready.url}/v1    (OpenAI-compatible; Ctrl-C stops)\n")
    note(
        f"  curl {ready.url}{path}{key} -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{first["name"]}", {body}, "max_tokens": 32}}\'\n'
    )
