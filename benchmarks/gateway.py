"""What the gateway adds: the same worker asked directly and through the gateway, in turns.

    python benchmarks/gateway.py [--requests 300] [--rounds 5]

A tiny random model answers one token (the time of HTTP, not of arithmetic), then streams of 64 tokens. Claim:
the gateway adds a few milliseconds a request, and forwarding a stream costs little of its rate.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import psutil
from common import hardware, write_result

from hearth.serving import ServerProcess

MODEL = "tiny"
ONE_TOKEN = {"prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0}
STREAM = {"prompt": [1, 2, 3], "max_tokens": 64, "temperature": 0, "stream": True, "ignore_eos": True}


def make_model(directory: Path) -> Path:
    """A random Llama of 2 layers and 64 channels over bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from hearth.models import save_model

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), tokenizer, directory)
    return directory


def socket_of(worker: int) -> str:
    """The Unix socket of a worker, from its command line."""
    command = psutil.Process(worker).cmdline()
    return command[command.index("--uds") + 1]


async def ask(session: aiohttp.ClientSession, url: str) -> float:
    """Seconds of one answer of one token."""
    started = time.perf_counter()
    async with session.post(url, json=ONE_TOKEN) as response:
        await response.read()
        assert response.status == 200, await response.text()
    return time.perf_counter() - started


async def stream(session: aiohttp.ClientSession, url: str) -> float:
    """Tokens a second of one stream."""
    started = time.perf_counter()
    async with session.post(url, json=STREAM) as response:
        body = await response.read()
        assert body.endswith(b"data: [DONE]\n\n")
    return STREAM["max_tokens"] / (time.perf_counter() - started)


async def spread(work: Callable[[], Awaitable[float]], total: int, concurrency: int) -> list[float]:
    """Run ``work`` ``total`` times, ``concurrency`` at once."""
    results: list[float] = []
    left = total

    async def runner() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            results.append(await work())

    await asyncio.gather(*(runner() for _ in range(concurrency)))
    return results


def quantile(values: list[float], share: float) -> float:
    """The value below which ``share`` of them lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def measure(server: ServerProcess, requests: int, rounds: int) -> list[dict[str, object]]:
    """Alternate between the two ways; one row a measurement."""
    rows: list[dict[str, object]] = []
    connector = aiohttp.UnixConnector(socket_of(next(pid for pid in server.pids.values() if pid)), limit=0)
    async with (
        aiohttp.ClientSession("http://worker", connector=connector) as direct,
        aiohttp.ClientSession(server.base_url, connector=aiohttp.TCPConnector(limit=0)) as gateway,
    ):
        ways = {"direct": direct, "gateway": gateway}
        for concurrency in (1, 16):
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            wall: dict[str, float] = dict.fromkeys(ways, 0.0)
            for round_ in range(rounds + 1):  # the first one warms up
                for way, session in ways.items():
                    started = time.perf_counter()
                    took = await spread(lambda s=session: ask(s, "/v1/completions"), requests, concurrency)
                    if round_:
                        seconds[way] += took
                        wall[way] += time.perf_counter() - started
            row: dict[str, object] = {"what": "one token", "concurrency": concurrency}
            for way, values in seconds.items():
                row[f"{way}_p50_ms"] = 1000 * statistics.median(values)
                row[f"{way}_p95_ms"] = 1000 * quantile(values, 0.95)
                row[f"{way}_p99_ms"] = 1000 * quantile(values, 0.99)
                row[f"{way}_requests_per_second"] = len(values) / wall[way]
            rows.append(row)
        for concurrency in (1, 16):
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for round_ in range(rounds + 1):
                for way, session in ways.items():
                    took = await spread(
                        lambda s=session: stream(s, "/v1/completions"), concurrency, concurrency
                    )
                    if round_:
                        rates[way].append(sum(took))
            row = {"what": "streams of 64 tokens", "concurrency": concurrency}
            row |= {f"{way}_tokens_per_second": statistics.median(values) for way, values in rates.items()}
            rows.append(row)
    return rows


def render(rows: list[dict[str, object]]) -> str:
    """Markdown."""
    lines = [
        "| requests of one token | direct p50 / p95 | gateway p50 / p95 | added p50 / p95 | requests/s |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["what"] == "one token":
            cells = [
                float(str(row[f"{way}_{q}_ms"])) for way in ("direct", "gateway") for q in ("p50", "p95")
            ]
            lines.append(
                f"| {row['concurrency']} at once | {cells[0]:.2f} / {cells[1]:.2f} ms | "
                f"{cells[2]:.2f} / {cells[3]:.2f} ms | "
                f"{cells[2] - cells[0]:.2f} / {cells[3] - cells[1]:.2f} ms | "
                f"{row['direct_requests_per_second']:.0f}, {row['gateway_requests_per_second']:.0f} |"
            )
    lines += ["", "| streams of 64 tokens | direct | gateway | ratio |", "|---|---|---|---|"]
    for row in rows:
        if row["what"] != "one token":
            direct, gateway = (float(str(row[f"{way}_tokens_per_second"])) for way in ("direct", "gateway"))
            shown = [f"{direct:.0f} tok/s", f"{gateway:.0f} tok/s", f"{gateway / direct:.2f} x"]
            lines.append(f"| {row['concurrency']} at once | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, write benchmarks/results/gateway.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300, help="requests of one round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    machine = hardware()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / MODEL)
        serve = ("--num-threads", "1", "--log-level", "warning")
        with ServerProcess.start([model], options=serve) as server:
            rows = asyncio.run(measure(server, options.requests, options.rounds))
    print(render(rows))
    print(write_result("gateway", rows, settings=vars(options), machine=machine))


if __name__ == "__main__":
    main()
