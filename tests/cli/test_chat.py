"""`hearth chat` from a pipe: the model in this process, and behind a server."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hearth.cli.chat import Conversation, NoTemplateError, Settings, Thought, _answer
from hearth.serving import ServerProcess

_SPEC = importlib.util.spec_from_file_location(
    "serving_conftest", Path(__file__).parents[1] / "serving/conftest.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
_CONFTEST = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_CONFTEST)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("chat-models")
    return {
        "chat": _CONFTEST.make_tiny_model(folder / "chatty", chat=True),
        "base": _CONFTEST.make_tiny_model(folder / "mute", chat=False),
    }


def hearth_chat(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hearth", "chat", *arguments, "--max-tokens", "6", "--temperature", "0"],
        input=text, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def answers(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["text"] for line in done.stdout.splitlines()]


def test_turns_from_a_pipe_with_commands(models: dict[str, Path]) -> None:
    text = "hello\nagain\n/reset\nhello\n/system Be brief.\nhello\n/nonsense\n/exit\nnever read\n"
    done = hearth_chat(str(models["chat"]), "--json", text=text)
    first, second, third, fourth = answers(done)
    assert first == third  # the reset forgot the first turn
    assert second is not None
    assert fourth is not None
    assert "no command /nonsense" in done.stderr
    assert "system text set" in done.stderr


def test_a_model_without_a_template_continues_text_and_says_so(models: dict[str, Path]) -> None:
    done = hearth_chat(str(models["base"]), "--json", text="abc\n" + "x" * 400 + "\nnever read\n")
    assert "no chat template" in done.stderr
    (answer,) = map(json.loads, done.stdout.splitlines())
    assert answer["prompt"] == "abc"
    # The second line is longer than the context: in a pipe that ends it.
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_server_gives_the_same_answers(models: dict[str, Path]) -> None:
    local = {
        key: answers(hearth_chat(str(path), "--json", text="hello\nmore\n")) for key, path in models.items()
    }
    options = ("--num-threads", "1", "--log-level", "warning", "--api-key", "secret-key-1")
    with ServerProcess.start(list(models.values()), options=options, timeout=120) as server:
        common = ("--url", server.base_url, "--json", "--api-key", "secret-key-1")
        for key, name in (("chat", "chatty"), ("base", "mute")):
            done = hearth_chat(*common, "--model", name, text="hello\nmore\n")
            assert answers(done) == local[key]
            assert ("no chat template" in done.stderr) == (key == "base")
        # Without a length of its own, a continuation leaves room for the text in a context of 256.
        unlimited = subprocess.run(
            [sys.executable, "-m", "hearth", "chat", *common, "--model", "mute"],
            input="hello\n", capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert len(answers(unlimited)) == 1
        several = hearth_chat(*common, text="hello\n")
        assert several.returncode == 1
        assert "chatty, mute" in several.stderr
        no_key = hearth_chat("--url", server.base_url, "--model", "mute", text="hello\n")
        assert no_key.returncode == 1
        assert "API key" in no_key.stderr
    gone = hearth_chat("--url", server.base_url, text="hello\n")
    assert gone.returncode == 1
    assert "is the server running?" in gone.stderr


def test_wrong_input(models: dict[str, Path]) -> None:
    for arguments, says in (
        ((), "MODEL or --url"),
        ((str(models["base"]), "--url", "http://x"), "MODEL or --url"),
        (("./no/such/model",), "no/such/model"),
    ):
        done = hearth_chat(*arguments, text="hello\n")
        assert done.returncode == 2
        assert says in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("handler", "says"), [("strict", "not UTF-8"), ("surrogateescape", "valid Unicode")])
def test_what_is_no_text(models: dict[str, Path], handler: str, says: str) -> None:
    """How Python reads such bytes depends on the locale; neither way may end in a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "hearth", "chat", str(models["chat"])],
        input=b"\xff\xfe\n", capture_output=True, timeout=120,
        env={**os.environ, "PYTHONIOENCODING": f"utf-8:{handler}"},
    )  # fmt: skip
    assert done.returncode == 2
    assert says in done.stderr.decode()
    assert b"Traceback" not in done.stderr


class Scripted:
    """Answers with its number of turns so far."""

    name = "scripted"

    def __init__(self, chats: bool = True) -> None:
        self.chats = chats
        self.seen: list[list[dict[str, str]]] = []

    def chat(self, messages, settings):
        self.seen.append(messages)
        if not self.chats:
            raise NoTemplateError("scripted")
        yield from ("an", "swer")

    def complete(self, text, settings):
        yield f"{text}..."

    def close(self) -> None:
        pass


def test_history_keeps_what_was_said_and_a_stopped_answer() -> None:
    talker = Scripted()
    conversation = Conversation(talker, Settings(None, None, None), system="Be kind.")
    assert "".join(conversation.turn("one")) == "answer"
    stopped = conversation.turn("two")
    next(stopped)
    stopped.close()
    assert "".join(conversation.turn("three")) == "answer"
    assert [message["content"] for message in talker.seen[-1]] == [
        "Be kind.",
        "one",
        "answer",
        "two",
        "an",
        "three",
    ]
    conversation.reset(None)
    list(conversation.turn("four"))
    assert talker.seen[-1] == [{"role": "user", "content": "four"}]


def test_a_server_without_template_falls_back_once() -> None:
    talker = Scripted(chats=False)
    talker.chats = True  # as a server seems before the first turn

    def refuse(messages, settings):
        talker.chats = False
        raise NoTemplateError("scripted")
        yield

    talker.chat = refuse
    conversation = Conversation(talker, Settings(None, None, None))
    assert "".join(conversation.turn("one")) == "one..."
    assert "".join(conversation.turn("two")) == "two..."
    assert conversation.messages == []


class Thinking(Scripted):
    """Thinks before it answers, if it comes to that."""

    def __init__(self, *pieces: str) -> None:
        super().__init__()
        self.pieces = pieces

    def chat(self, messages, settings):
        self.seen.append(messages)
        yield from self.pieces


def test_reasoning_is_shown_beside_the_answer_and_not_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    talker = Thinking(Thought("so"), Thought(" it is"), "yes", " sir")
    conversation = Conversation(talker, Settings(None, None, None))
    _answer(conversation, "one", as_json=False)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("yes sir\n", "so it is\n")
    _answer(conversation, "two", as_json=True)
    whole = json.loads(capsys.readouterr().out)
    assert (whole["text"], whole["reasoning"]) == ("yes sir", "so it is")
    assert talker.seen[-1] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "yes sir"},
        {"role": "user", "content": "two"},
    ]


def test_an_answer_that_never_came_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(Thinking(Thought("hm")), Settings(None, None, None))
    _answer(conversation, "one", as_json=False)
    shown = capsys.readouterr()
    assert shown.out == "\n"
    assert "within its reasoning" in shown.err
    assert conversation.messages == []


@pytest.mark.slow
def test_a_local_model_thinks_as_one_behind_a_server_does(models: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "thinker"
    shutil.copytree(models["chat"], model)
    template = model / "chat_template.jinja"
    opening = "{{ '<|im_start|>assistant\n' }}"
    text = template.read_text()
    assert opening in text
    template.write_text(text.replace(opening, opening + "{{ '<think>\n' }}"))
    local = hearth_chat(str(model), "--json", text="hello\n")
    assert "within its reasoning" in local.stderr
    assert answers(local) == [""]
    options = ("--num-threads", "1", "--log-level", "warning")
    with ServerProcess.start([model], options=options, timeout=120) as server:
        remote = hearth_chat("--url", server.base_url, "--json", text="hello\n")
    thoughts = [json.loads(done.stdout)["reasoning"] for done in (local, remote)]
    assert thoughts[0] == thoughts[1] != ""


def test_settings_of_the_engine(models: dict[str, Path]) -> None:
    chat = str(models["chat"])
    done = hearth_chat(chat, "--json", "--weights", "int8", "--speculation", "ngram", text="hello\n")
    assert len(answers(done)) == 1
    for arguments, says in (
        ((chat, "--weights", "int3"), "int3"),
        (("--url", "http://127.0.0.1:1", "--kv-dtype", "int8"), "for the server to set"),
    ):
        done = hearth_chat(*arguments, text="hello\n")
        assert done.returncode == 2
        assert says in done.stderr
