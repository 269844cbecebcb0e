"""The main job: raw text to an answering endpoint. One stage after another, each saying what it does."""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hearth.config import Recipe
from hearth.demo import plan
from hearth.demo.asking import Question, ask_all
from hearth.demo.report import DemoReport
from hearth.demo.training import TrainingStage, model_directory, train, training_facts
from hearth.errors import GateError

if TYPE_CHECKING:
    from rich.console import Console

    from hearth.data import Dataset, Progress, TokenSplit
    from hearth.workspace import ModelVersion, Run, Workspace

ALIAS = "production"
STAGES = ("corpus", "pretrain", "teach", "measure", "register", "gate", "serve and ask")
# Scoring more held-out text than this would not change the second digit, and takes time.
MAX_SCORED_BYTES = 400_000


@dataclass
class Demo:
    """The state that the stages share.

    ``console`` writes to standard error; ``show_progress`` makes the bars for preparing data.
    """

    minutes: float
    workspace: Workspace
    console: Console
    show_progress: Callable[[], AbstractContextManager[Progress]]
    command: str = "hearth"
    report: DemoReport = field(init=False)
    text: Dataset = field(init=False)
    chat: Dataset = field(init=False)

    def __post_init__(self) -> None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.scale = plan.choose_scale(device)
        self.report = DemoReport(minutes=self.minutes, device=device)

    def run(self) -> DemoReport:
        """All stages; what they found."""
        with self.stage("corpus", "building a dataset from the Python standard library"):
            self.build_corpus()
        with self.stage("pretrain", f"training a {self.scale.size} model from random weights"):
            base_run = self.pretrain()
        with self.stage("teach", "teaching it to answer questions from signatures and docstrings"):
            chat_run = self.teach(base_run)
        with self.stage("measure", "bits per byte on held-out modules, beside xz -9 and an order-0 model"):
            self.measure(base_run, chat_run)
        with self.stage("register", "making it a version in the registry"):
            version = self.register(base_run, chat_run)
        with self.stage("gate", "checking that serving answers the same as training"):
            self.gate(version)
        with self.stage("serve and ask", "serving it and asking over HTTP with the openai client"):
            self.serve_and_ask(version)
        return self.report

    @contextlib.contextmanager
    def stage(self, name: str, doing: str) -> Iterator[None]:
        number = STAGES.index(name) + 1
        self.console.print(
            f"[bold]\\[{number}/{len(STAGES)}] {name}[/bold]: {doing}", highlight=False, soft_wrap=True
        )
        started = time.monotonic()
        yield
        self.report.seconds[name] = time.monotonic() - started
        self.say(f"done in {self.report.seconds[name]:.1f} s")

    def say(self, text: str) -> None:
        self.console.print(f"      {text}", highlight=False, markup=False, soft_wrap=True)

    def reused(self, what: str) -> None:
        self.report.reused.append(what)

    def build_corpus(self) -> None:
        self.text = self._prepare(plan.pretrain_recipe(self.scale, steps=2), "demo-text", "dataset")
        tokenizer = str(self.text.tokenizer_dir)
        chat_recipe = plan.chat_recipe(self.scale, steps=2, tokenizer=tokenizer)
        self.chat = self._prepare(chat_recipe, "demo-chat", "questions")
        train_split, held_out = self.text.split("train"), self.text.split("validation")
        num_bytes = train_split.num_bytes + held_out.num_bytes
        self.report.corpus = {
            "python": platform.python_version(),
            "path": str(self.text.path),
            "num_documents": train_split.num_documents + held_out.num_documents,
            "num_held_out": held_out.num_documents,
            "num_bytes": num_bytes,
            "num_tokens": train_split.num_tokens + held_out.num_tokens,
            "vocab_size": self.scale.vocab_size,
            "bytes_per_token": num_bytes / (train_split.num_tokens + held_out.num_tokens),
        }
        self.report.chat_corpus = {
            "path": str(self.chat.path),
            "num_documents": self.chat.split("train").num_documents,
            "num_held_out": self.chat.split("validation").num_documents,
        }

    def _prepare(self, recipe: Recipe, name: str, what: str) -> Dataset:
        from hearth.data import prepare_dataset

        directory = self.workspace.root / "datasets" / name
        with self.show_progress() as progress:
            dataset = prepare_dataset(recipe, directory, progress=progress)
        if dataset.reused:
            self.reused(what)
            self.say(f"reusing the {what} in {directory}: the sources are unchanged")
        return dataset

    def pretrain(self) -> Run:
        rows = self._num_rows(self.text.split("train"))
        stage = TrainingStage(
            name="pretrain",
            key=plan.reuse_key(
                "pretrain", minutes=self.minutes, scale=self.scale, dataset=self.text.fingerprint
            ),
            make_recipe=lambda steps: plan.pretrain_recipe(self.scale, steps=steps),
            seconds=60 * self.minutes * plan.PRETRAIN_SHARE,
            num_rows=rows,
            max_epochs=plan.MAX_PRETRAIN_EPOCHS,
        )
        return self._train(stage)

    def teach(self, base_run: Run) -> Run:
        base = str(model_directory(base_run))
        tokenizer = str(self.text.tokenizer_dir)
        stage = TrainingStage(
            name="chat",
            key=plan.reuse_key(
                "chat",
                minutes=self.minutes,
                scale=self.scale,
                dataset=self.chat.fingerprint,
                base=base_run.id,
            ),
            make_recipe=lambda steps: plan.chat_recipe(
                self.scale, steps=steps, base=base, tokenizer=tokenizer
            ),
            seconds=60 * self.minutes * (1 - plan.PRETRAIN_SHARE),
            num_rows=self._num_rows(self.chat.split("train")),
            max_epochs=plan.MAX_CHAT_EPOCHS,
        )
        return self._train(stage)

    def _num_rows(self, split: TokenSplit) -> int:
        return max(1, math.ceil(split.num_tokens / self.scale.sequence_length))

    def _train(self, stage: TrainingStage) -> Run:
        run, reused = train(stage, self.workspace, self.say)
        if reused:
            self.reused(f"{stage.name} run")
        self.report.training[stage.name] = training_facts(run)
        return run

    def measure(self, base_run: Run, chat_run: Run) -> None:
        from hearth.demo.measuring import score_chat, score_text

        base, chat = model_directory(base_run), model_directory(chat_run)
        self.report.compression = score_text(base, self.text.split("validation"), MAX_SCORED_BYTES)
        held_out = self.chat.split("validation")
        self.report.chat_loss = {
            "before": score_chat(base, held_out),
            "after": score_chat(chat, held_out),
        }

    def register(self, base_run: Run, chat_run: Run) -> ModelVersion:
        registry = self.workspace.registry
        base = registry.create_version(
            plan.BASE_NAME,
            model_directory(base_run),
            run_id=base_run.id,
            recipe=base_run.recipe,
            dataset_fingerprint=self.text.fingerprint,
            actor="hearth demo",
        )
        registry.attach_report(base.ref, "evaluation", self.report.compression)
        version = registry.create_version(
            plan.MODEL_NAME,
            model_directory(chat_run),
            run_id=chat_run.id,
            recipe=chat_run.recipe,
            dataset_fingerprint=self.chat.fingerprint,
            parent=base.ref,
            actor="hearth demo",
        )
        registry.attach_report(version.ref, "evaluation", {"chat_loss": self.report.chat_loss})
        from hearth.models import model_info

        self.report.version = {
            "name": version.name,
            "ref": version.ref,
            "base": base.ref,
            "alias": ALIAS,
            "path": str(version.path),
            "parameters": model_info(version.path).num_parameters,
            "runs": [chat_run.id, base_run.id],
            "workspace": str(self.workspace.root),
            "command": self.command,
        }
        self.say(f"{base.ref} (the pretrained model) and {version.ref}, made from it")
        return version

    def gate(self, version: ModelVersion) -> None:
        from hearth.evaluation import run_gate
        from hearth.models import model_info

        dtype = model_info(version.path).dtype
        made = [
            report for report in self.workspace.registry.reports(version.ref, "parity") if not report.imported
        ]
        # The newest report decides, for the registry and for the server, and only in the dtype it is of.
        if made and made[-1].passed and made[-1].report.get("dtype") == dtype:
            self.reused("parity report")
            self.say("reusing the parity report of this version: its weights are unchanged")
            self.report.parity = made[-1].report
        else:
            report = run_gate(version.ref, workspace=self.workspace)
            self.report.parity = report.to_dict()
            if not report.passed:
                self.console.print(report.render(), markup=False, highlight=False)
                raise GateError(
                    f"{version.ref} does not answer the same when served as it did in training",
                    fix=f"look at the report above; `hearth parity {version.ref}` runs it again",
                )
        self.workspace.registry.promote(version.ref, ALIAS, actor="hearth demo")
        self.say(f"passed; the alias {ALIAS} now points to {version.ref}")

    def serve_and_ask(self, version: ModelVersion) -> None:
        from hearth.serving import ServerProcess

        reference = f"{version.name}@{ALIAS}"
        started = time.monotonic()
        with ServerProcess.start(models=[reference], workspace_dir=self.workspace.root) as server:
            ready = time.monotonic() - started
            self.say(f"answering at {server.base_url}/v1 after {ready:.1f} s")
            self.report.answers = ask_all(server.base_url, reference, self.questions())
        answers = self.report.answers
        self.report.serving = {
            "ready_seconds": ready,
            "first_token_seconds": _median([answer.first_token_seconds for answer in answers]),
            "tokens_per_second": _median([answer.tokens_per_second for answer in answers]),
        }

    def questions(self) -> list[Question]:
        """Two questions from held-out modules and two that training has seen."""
        questions = []
        for name, held_out in (("train", False), ("validation", True)):
            split = self.chat.split(name)
            for index in _spread(split.num_documents, 2):
                messages = split.messages(index)
                questions.append(Question(messages[0]["content"], messages[-1]["content"], held_out))
        return questions


def _spread(count: int, wanted: int) -> list[int]:
    """``wanted`` indices spread over ``count`` documents, away from the ends."""
    return [int((number + 0.5) * count / wanted) for number in range(min(wanted, count))]


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def run_demo(workspace: Workspace, console: Console, **options: Any) -> DemoReport:
    """Run the whole demo in ``workspace``; see ``Demo`` for the options."""
    return Demo(workspace=workspace, console=console, **options).run()
