"""What the demo found, as data, and as the one page that it prints at the end."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.markup import escape

WIDTH = 80  # of the page; only paths may be longer
LONGER_MINUTES = 30


@dataclass
class Answer:
    """One question put to the served model over HTTP."""

    question: str
    expected: str
    text: str
    held_out: bool
    first_token_seconds: float
    tokens_per_second: float


@dataclass
class DemoReport:
    """Everything the summary says; ``to_dict`` is the demo's JSON."""

    minutes: float
    device: str
    corpus: dict[str, Any] = field(default_factory=dict)
    chat_corpus: dict[str, Any] = field(default_factory=dict)
    training: dict[str, dict[str, Any]] = field(default_factory=dict)
    compression: dict[str, Any] = field(default_factory=dict)
    chat_loss: dict[str, float] = field(default_factory=dict)
    version: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    serving: dict[str, Any] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total_seconds": self.total_seconds}


def render(report: DemoReport) -> str:
    """The summary page, in rich's markup, 80 columns wide."""
    lines = [_rule(f"hearth demo: {_clock(report.total_seconds)}, nothing left this machine")]
    for title, body in (
        ("What was made", _made(report)),
        ("How good it is", _quality(report)),
        ("What it answers", _answers(report)),
        ("How fast", _speed(report)),
        ("Where it lives", _places(report)),
        ("What to type next", _next(report)),
    ):
        lines += ["", f"[bold]{title}[/bold]", *(f"  {line}" for line in body)]
    return "\n".join(lines)


def _rule(text: str) -> str:
    return f"[bold]━━ {escape(text)} {'━' * max(0, WIDTH - 4 - len(text))}[/bold]"


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def _made(report: DemoReport) -> list[str]:
    corpus, chat, version = report.corpus, report.chat_corpus, report.version
    pretrain, teach = report.training["pretrain"], report.training["chat"]
    return [
        f"corpus     {corpus['num_documents']:,} documents, {corpus['num_bytes'] / 1e6:.1f} MB, "
        f"{corpus['num_held_out']:,} of them held out, by module:",
        f"           source and docstrings of the library of Python {corpus['python']}",
        f"tokenizer  byte-level BPE of {corpus['vocab_size']:,} tokens, {corpus['bytes_per_token']:.2f} "
        "bytes a token",
        f"model      {version['parameters'] / 1e6:.1f} M parameters, from random weights, on "
        f"{pretrain['num_tokens'] / 1e6:.2f} M tokens",
        f"           ({pretrain['epochs']:.1f} passes), then taught to answer on "
        f"{chat['num_documents']:,} questions",
        f"           ({teach['epochs']:.1f} passes), {chat['num_held_out']:,} more held out",
        f"version    {version['ref']}, alias {version['alias']}",
    ]


def _quality(report: DemoReport) -> list[str]:
    held_out = report.compression
    model, xz = held_out["model_bits_per_byte"], held_out["xz_bits_per_byte"]
    verdict = (
        f"better than xz by {100 * (1 - model / xz):.0f} %"
        if model < xz
        else f"behind xz by {100 * (model / xz - 1):.0f} %; more minutes help"
    )
    parity = report.parity
    same = sum(prompt["first_difference"] is None for prompt in parity["prompts"])
    ties = sum(prompt["num_ties"] for prompt in parity["prompts"])
    loss = report.chat_loss
    return [
        f"bits per byte on {held_out['num_bytes'] / 1e3:,.0f} kB of held-out modules (smaller is better)",
        f"    this model      {model:.3f}   {verdict}",
        f"    xz -9           {xz:.3f}",
        f"    order-0 model   {held_out['order0_bits_per_byte']:.3f}",
        "    (neither the model's weights nor the xz program is counted)",
        f"answers to held-out questions: {loss['before']:.2f} nats a token before teaching, "
        f"{loss['after']:.2f} after",
        f"parity gate {'passed' if parity['passed'] else 'FAILED'}: serving gives the tokens of training on "
        f"{same} of {len(parity['prompts'])} prompts",
        *([f"    (rounding decided {ties} near ties between two tokens)"] if ties else []),
    ]


def _answers(report: DemoReport) -> list[str]:
    lines = []
    for answer in report.answers:
        kind = "held-out module" if answer.held_out else "training set"
        lines += [
            f"[bold]Q[/bold] {escape(_one_line(answer.question, 56))}  [dim]({kind})[/dim]",
            f"[bold]A[/bold] {escape(_one_line(answer.text)) or '[dim](nothing)[/dim]'}",
            f"[dim]  docs: {escape(_one_line(answer.expected, 70))}[/dim]",
        ]
    parameters = report.version["parameters"] / 1e6
    lines += [
        f"[dim]A model of {parameters:.1f} M parameters learns the form of an answer before the facts,[/dim]",
        "[dim]and in minutes little more than the form.[/dim]",
    ]
    return lines


def _one_line(text: str, width: int = 76) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def _speed(report: DemoReport) -> list[str]:
    lines = []
    for name, label in (("pretrain", "pretraining"), ("chat", "teaching")):
        stage = report.training[name]
        speed = f"{stage['steps']} steps"  # a run that was interrupted at its end measured no more
        if stage["tokens_per_second"] is not None:
            speed = f"{stage['tokens_per_second']:,.0f} tokens/s, MFU {100 * stage['mfu']:.0f} %, {speed}"
        lines.append(f"{label:12} {speed}")
    serving = report.serving
    lines.append(
        f"{'serving':12} first token after {1000 * serving['first_token_seconds']:.0f} ms, then "
        f"{serving['tokens_per_second']:,.0f} tokens/s for one request"
    )
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in report.seconds.items())
    remarks = [f"seconds by stage: {stages}"]
    if report.reused:
        remarks.append(f"reused from an earlier demo: {', '.join(report.reused)}")
    for remark in remarks:
        wrapped = textwrap.wrap(remark, WIDTH - 2, subsequent_indent="    ")
        lines += [f"[dim]{escape(line)}[/dim]" for line in wrapped]
    return lines


def _places(report: DemoReport) -> list[str]:
    return [
        f"workspace  {escape(report.version['workspace'])}",
        f"model      {escape(report.version['path'])}",
        "           (a Hugging Face directory)",
        f"runs       {escape(', '.join(report.version['runs']))}",
    ]


def _next(report: DemoReport) -> list[str]:
    reference = f"{report.version['name']}@{report.version['alias']}"
    hearth = escape(report.version["command"])
    longer = [f"{hearth} demo --minutes {LONGER_MINUTES}"] if report.minutes < LONGER_MINUTES else []
    return [
        f"{hearth} chat {reference}",
        f"{hearth} serve {reference} --port 8000",
        f"{hearth} lineage {reference}",
        f"{hearth} runs show {report.version['runs'][0]}",
        *longer,
    ]
