"""The engine beside its peers: vLLM's CPU build, llama.cpp and transformers, on the same weights and machine.

    python benchmarks/peers/install.py             # once: an environment for each peer; minutes
    python benchmarks/engine.py                    # everything, with the 474M-parameter model, random weights
    python benchmarks/engine.py --only decode --peers llamacpp --rounds 1
    python benchmarks/engine.py --quick            # a tiny model and no peers, a smoke test

Every competitor is a process in its own environment. They are measured in turns, on random prompts that
nobody saw before, greedily, and whoever is not at work is stopped. Prefill is the time to the first token of
all, decode counts the tokens after that. ROWS are of machine, decode, prefill, prefix, start, memory, replay,
scheduling.
A peer that is not installed has no figures; a line says how to install it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, hardware, names_of, ratio_table, summary, write_result
from inference import replay as replays
from inference.competitor import Spec
from inference.figures import Shape, scaled_trace
from inference.models import MAX_MODEL_LEN, SHAPES, Prompts, gguf_path, model_path, with_tokenizer
from inference.rows import Load, Report, prefix, progress, running, scheduling, start, throughput
from peers.install import PEERS, is_installed

PEER_NAMES = ("vllm", "llamacpp", "transformers")
ROWS = ("machine", "decode", "prefill", "prefix", "start", "memory", "replay", "scheduling")
POOL_BYTES = 1 << 30  # keys and values, for us and for vLLM alike
TRACE = Path(__file__).resolve().parents[2] / "shared/data/azure_llm_trace/AzureLLMInferenceTrace_conv.csv"
GGUF = {"auto": "bf16", "int8": "q8_0", "int4": "q4_0"}
LABELS = {"auto": "bf16", "int8": "int8", "int4": "int4"}


class Benchmark:
    """One run: what was asked for, and what was found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.quick: bool = arguments.quick
        self.rounds: int = 1 if self.quick else arguments.rounds
        self.only: list[str] = arguments.only
        self.peers: list[str] = [] if self.quick else arguments.peers
        self.machine = hardware()
        self.threads: int = arguments.threads or self.machine["num_cores"]
        shape = "tiny" if self.quick else "474M"
        self.settings = {
            "shape": shape,
            "threads": self.threads,
            "rounds": self.rounds,
            "seed": arguments.seed,
        }
        self.shape = Shape(SHAPES[shape])
        self.model = model_path(shape, RESULTS / "models")
        self.model_with_tokenizer = with_tokenizer(self.model)
        self.prompts = Prompts(SHAPES[shape]["vocab_size"], arguments.seed)
        self.trace_rate, self.trace_seconds = arguments.trace_rate, arguments.trace_seconds
        self.report = Report()

    # -- who ---------------------------------------------------------------------------------------------
    def hearth(self, weights: str = "auto", **more: Any) -> Spec:
        load = {
            "model": str(self.model_with_tokenizer), "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 64,
            "kv_cache_memory": POOL_BYTES, "num_threads": self.threads, "weights": weights, **more,
        }  # fmt: skip
        return Spec("hearth", "hearth", load)

    def vllm_environment(self) -> dict[str, str]:
        """All cores for its threads (it would keep one back), and the OpenMP library of its manual."""
        library = PEERS / "vllm" / ".venv" / "lib" / "libiomp5.so"
        cores = sorted(os.sched_getaffinity(0))[: self.threads]
        return {
            "VLLM_CPU_KVCACHE_SPACE": str(POOL_BYTES >> 30),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **({"LD_PRELOAD": str(library)} if library.exists() else {}),
        }

    def competitors(self, weights: str) -> list[Spec]:
        """Us and the peers that have these weights."""
        specs = [self.hearth(weights)]
        if "vllm" in self.peers and weights == "auto":
            load = {"model": str(self.model), "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 64}
            specs.append(Spec("vllm", "vllm", load, self.vllm_environment()))
        if "llamacpp" in self.peers:
            model = str(gguf_path(self.model, GGUF[weights]))
            specs.append(Spec("llama.cpp", "llamacpp", {"model": model, "num_threads": self.threads}))
        if "transformers" in self.peers and weights == "auto":
            load = {"model": str(self.model), "num_threads": self.threads}
            specs.append(Spec("transformers", "transformers", load))
            specs.append(Spec("generate_batch", "transformers", {**load, "continuous": True}))
        return specs

    # -- what --------------------------------------------------------------------------------------------
    def run(self) -> None:
        if "machine" in self.only:
            self.measure_machine()
        if "scheduling" in self.only:
            times = scheduling(16 if self.quick else 256, 20 if self.quick else 200)
            for value in times:
                self.report.add("ms", f"scheduling, {16 if self.quick else 256} requests", "hearth", value)
        if {"decode", "prefill", "prefix", "memory"} & set(self.only):
            for weights in ("auto", "int8", "int4"):
                if weights == "auto" or "decode" in self.only:
                    self.measure_group(weights)
        if "start" in self.only:
            specs = [s for s in self.competitors("auto") if s.name != "generate_batch"]
            start([*specs, self.hearth(own_process=True)], self.report, self.rounds)
        if "replay" in self.only and not self.quick:
            self.measure_replay()

    def measure_machine(self) -> None:
        from inference.machine import matmul_rate, memory_bandwidth

        weights = 2 * (self.shape.layer_weights + self.shape.head_weights)
        self.report.facts["machine"] = {
            "memory": memory_bandwidth(max(weights, 1 << 24), self.threads),
            "matmul": matmul_rate(self.threads, scale=16 if self.quick else 1),
        }

    def measure_group(self, weights: str) -> None:
        """All that competitors with the same weights are measured by while they live."""
        length, num_tokens = (16, 8) if self.quick else (128, 64)
        fill = self.prompts(2 if self.quick else 4, 64 if self.quick else 2000)
        batches = (1, 16, 32) if weights == "auto" else (1, 16)
        with running(self.competitors(weights), self.report, label=LABELS[weights], fill=fill) as alive:
            for batch in batches if "decode" in self.only else ():
                some = [c for c in alive if batch <= 16 or c.spec.peer != "transformers"]
                label = f"decode {LABELS[weights]}, batch {batch}"
                load = Load(batch, length, num_tokens)
                throughput(
                    some, load, self.prompts, self.report, label=label, decode=True, rounds=self.rounds
                )
            if "prefill" in self.only and weights == "auto":
                some = [c for c in alive if c.spec.name != "generate_batch"]
                for batch, tokens in ((1, 16 * length), (16, length)):
                    label = f"prefill bf16, {batch} x {tokens}"
                    load = Load(batch, tokens, 1)
                    throughput(
                        some, load, self.prompts, self.report, label=label, decode=False, rounds=self.rounds
                    )
            if "prefix" in self.only and weights == "auto":
                some = [c for c in alive if c.spec.peer in ("hearth", "vllm")]
                prefix(some, self.prompts, self.report, 96 if self.quick else 1500, self.rounds)
            for competitor in alive if "memory" in self.only else ():
                for what, value in competitor.memory().items():
                    label = (
                        f"{LABELS[weights]}, {'peak resident' if what == 'peak' else 'anonymous at the end'}"
                    )
                    self.report.add("MB", label, competitor.spec.name, value / 1e6)

    def measure_replay(self) -> None:
        if not TRACE.exists():
            self.report.note("replay is skipped: no trace of arrivals in ../shared/data/azure_llm_trace")
            return
        with TRACE.open(newline="") as file:
            arrivals = scaled_trace(
                file, rate=self.trace_rate, seconds=self.trace_seconds, max_prompt=1024, max_output=64
            )
        texts = [self.prompts(1, arrival.num_prompt_tokens)[0] for arrival in arrivals]
        self.report.facts["trace"] = {
            "requests": len(arrivals), "requests a second": self.trace_rate, "prompts capped at": 1024,
            "outputs capped at": 64, "prompt tokens": sum(map(len, texts)),
        }  # fmt: skip
        for name in ("hearth", *(peer for peer in self.peers if peer == "vllm")):
            if name == "vllm" and not is_installed("vllm"):
                continue
            progress(f"replay of {len(arrivals)} requests against {name}")
            port = replays.free_port()
            command = replays.command_of(name, self.model_with_tokenizer, port, MAX_MODEL_LEN, 64)
            environment = self.vllm_environment() if name == "vllm" else {}
            if name == "hearth":
                command += ["--kv-cache-memory", str(POOL_BYTES), "--num-threads", str(self.threads)]
            try:
                with replays.serving(command, port, environment, 300) as url:
                    times = asyncio.run(replays.replay(url, arrivals, texts))
            except RuntimeError as error:
                self.report.note(f"{name}: {error}")
                continue
            if times.failed:
                self.report.note(f"{name}: {len(times.failed)} requests failed, first: {times.failed[0]}")
            for label, value in times.figures().items():
                self.report.add("ms of the trace", label, name, value)

    # -- results -----------------------------------------------------------------------------------------
    def beside_the_limits(self) -> list[str]:
        """What part of the measured bandwidth and matmul rate each bf16 figure of ours is."""
        machine = self.report.facts.get("machine")
        if machine is None:
            return []
        lines = [
            f"memory reads {machine['memory']['GB/s']:.1f} GB/s ({machine['memory']['by']}), "
            f"bf16 products {machine['matmul']['GFLOP/s']:.0f} GFLOP/s ({machine['matmul']['by']})"
        ]
        weight_bytes = 2 * (self.shape.layer_weights + self.shape.head_weights)
        length, num_tokens = (16, 8) if self.quick else (128, 64)
        for label, row in self.report.rows.get("tok/s", {}).items():
            rate = statistics.median(row["hearth"]) if row.get("hearth") else None
            if rate is None or "bf16" not in label:
                continue
            if label.startswith("decode"):
                batch = int(label.rsplit(" ", 1)[1])
                gigabytes = (
                    self.shape.decode_bytes(weight_bytes, batch, length, num_tokens) * rate / batch / 1e9
                )
                part = gigabytes / machine["memory"]["GB/s"]
                lines.append(f"{label}: {gigabytes:.1f} GB/s, {part:.0%} of the measured bandwidth")
            else:
                batch, tokens = (int(word) for word in label.split(", ")[1].split(" x "))
                flops = self.shape.prefill_operations(batch, tokens) / (batch * tokens) * rate / 1e9
                part = flops / machine["matmul"]["GFLOP/s"]
                lines.append(f"{label}: {flops:.0f} GFLOP/s, {part:.0%} of the measured matmul rate")
        return lines

    def tables(self) -> str:
        for rows in self.report.rows.values():
            for name in self.report.absent:
                next(iter(rows.values())).setdefault(name, [])  # a column without figures
        parts = [
            ratio_table(rows, ours="hearth", unit=unit, higher_is_better=unit == "tok/s")
            for unit, rows in self.report.rows.items()
        ]
        return "\n\n".join([*parts, *self.beside_the_limits(), *self.report.notes])

    def results(self) -> dict[str, Any]:
        rows = {
            unit: {label: {name: summary(v) for name, v in row.items() if v} for label, row in rows.items()}
            for unit, rows in self.report.rows.items()
        }
        return {**rows, "facts": self.report.facts, "notes": self.report.notes}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, no peers")
    parser.add_argument(
        "--only", type=names_of(ROWS), default=list(ROWS), metavar="ROWS", help="comma-separated"
    )
    parser.add_argument(
        "--peers", type=names_of(PEER_NAMES), default=list(PEER_NAMES), help="none, or comma-separated names"
    )
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds after one that warms up")
    parser.add_argument("--threads", type=int, help="default: every core that the process may use")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    parser.add_argument("--trace-rate", type=float, default=0.5, help="requests a second of the replay")
    parser.add_argument("--trace-seconds", type=float, default=100.0)
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    # A plain end would leave servers and runners behind, stopped ones for ever.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    benchmark = Benchmark(arguments)
    benchmark.run()
    stored = write_result(
        "engine-quick" if benchmark.quick else "engine",
        benchmark.results(),
        settings=benchmark.settings,
        machine=benchmark.machine,
    )
    if arguments.json:
        print(json.dumps(benchmark.results()))
        return
    print(f"\n{benchmark.machine['cpu']}, {benchmark.threads} threads, {benchmark.settings['shape']}\n")
    print(benchmark.tables())
    print(f"\nwritten to {os.path.relpath(stored)}")


if __name__ == "__main__":
    main()
