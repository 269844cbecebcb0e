"""Every causal language model of transformers, made tiny, through the engine: what runs, and why not.

    python tests/engine/census.py                   # fails unless docs/models.md says what the code says
    python tests/engine/census.py --write           # rewrites docs/models.md
    python tests/engine/census.py llama gemma3n     # these only, with what differs in full

A tiny model keeps a family's own defaults; only what makes it big is shrunk (tiny_models.py). One that the
engine accepts must give transformers' own greedy tokens.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import logging
import multiprocessing
import os
import random
import signal
import sys
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tiny_models import VOCAB, NotTinyError, make_tiny
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
NUM_TOKENS = 32


def make_prompts(lengths: tuple[int, ...] = (1, 5, 23, 40, 2)) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(3, VOCAB - 20) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def generate(model: PreTrainedModel, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """transformers' own greedy tokens, one prompt at a time."""
    result = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False,
            pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        result.append(output[0, len(prompt) :].tolist())
    return result


@dataclass
class Finding:
    """What the census found for one family."""

    family: str
    architecture: str
    verdict: str  # "runs", "refused", "not tried" or "WRONG"
    reason: str = ""
    detail: str = ""


def examine(family: str, num_tokens: int = NUM_TOKENS) -> Finding:
    """Build, load, generate, compare."""
    from hearth.engine import Engine, SamplingParams
    from hearth.errors import UnsupportedModelError

    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    try:
        model = make_tiny(family)
    except NotTinyError as error:
        return Finding(family, architecture, "not tried", _line(error), traceback.format_exc())
    prompts = make_prompts()
    try:
        engine = Engine.from_model(copy.deepcopy(model), max_num_batched_tokens=64, max_num_seqs=8)
    except UnsupportedModelError as error:
        return Finding(family, architecture, "refused", error.message.split(": ", 1)[-1])
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was found
        return Finding(
            family, architecture, "WRONG", f"loading raised {_line(error)}", traceback.format_exc()
        )
    try:
        with engine:
            params = SamplingParams(max_tokens=num_tokens, temperature=0)
            got = [c.token_ids for c in engine.generate(prompts, params)]
        expected = generate(model, prompts, num_tokens)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was found
        return Finding(family, architecture, "WRONG", f"raised {_line(error)}", traceback.format_exc())
    if got != expected:
        return Finding(family, architecture, "WRONG", "other tokens than transformers", f"{got}\n{expected}")
    if len({tuple(tokens[:8]) for tokens in expected}) < 3:
        return Finding(family, architecture, "WRONG", "the model says the same to everything", str(expected))
    return Finding(family, architecture, "runs")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 160 else text[:160] + " …"


def _worker(family: str) -> Finding:
    def stop(*_: object) -> None:
        raise TimeoutError("took more than two minutes of processor time")

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 120)
    try:
        return examine(family)
    except TimeoutError as error:
        return Finding(family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family], "WRONG", str(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def census(families: list[str], jobs: int) -> list[Finding]:
    """Findings in the order of the families' names; each is also logged as it comes."""
    findings = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_worker, family) for family in families]):
            finding = future.result()
            findings.append(finding)
            sys.stderr.write(f"{finding.family}: {finding.verdict} {finding.reason}\n")
    return sorted(findings, key=lambda finding: finding.family)


HEAD = """\
# Models that the engine runs

The engine lists no models: it examines each at load ([why](decisions/0021-examined-not-listed.md)). This page
is what it found for tiny random models of all {total} families that transformers {version} has for causal
language modelling. `python tests/engine/census.py --write` wrote it, and a test compares it with what the
code says.

- **runs** ({runs}): in float32, {tokens} greedy tokens of five prompts of 1 to 40 tokens, in one batch, equal
  those of transformers' own `generate`, token for token.
- **refused** ({refused}): the engine says so at load, with this reason.
- **not tried** ({not_tried}): the census could not build a small model; the engine would still examine it.

A family runs here with its config's default features and text alone. Another checkpoint of it may use others
(another rotary scaling, ALiBi in Falcon), and is examined anew. Vocabulary and context are limited by the
model; images and sound are not taken.

| family | class | engine | reason |
|---|---|---|---|
"""


def table(findings: list[Finding]) -> str:
    """docs/models.md."""
    counts = Counter(finding.verdict for finding in findings)
    head = HEAD.format(
        total=len(findings),
        version=transformers.__version__,
        tokens=NUM_TOKENS,
        runs=counts["runs"],
        refused=counts["refused"],
        not_tried=counts["not tried"],
    )
    rows = [
        f"| {f.family} | {f.architecture} | {f.verdict} | {f.reason.replace('|', '/')} |\n" for f in findings
    ]
    return head + "".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="only these, with details; default: all")
    parser.add_argument("--write", action="store_true", help="rewrite docs/models.md")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    findings = census(arguments.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), arguments.jobs)
    wrong = [finding for finding in findings if finding.verdict == "WRONG"]
    for finding in findings if arguments.families else wrong:
        sys.stdout.write(f"{finding.family}: {finding.verdict} {finding.reason}\n{finding.detail}\n")
    if not arguments.families and not wrong:
        if arguments.write:
            PAGE.write_text(table(findings))
        elif PAGE.read_text() != table(findings):
            differences = difflib.unified_diff(
                PAGE.read_text().splitlines(), table(findings).splitlines(), lineterm="", n=0
            )
            sys.stdout.write("docs/models.md says otherwise:\n" + "\n".join(differences) + "\n")
            return 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
