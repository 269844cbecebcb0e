"""The commands and programs of the README, run as they stand; only numbers of steps and the port change."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    """The fenced blocks of a language ("" for none); each fence is read once, as opening or closing."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in blocks if name == language]


def commands() -> list[list[str]]:
    """Every `hearth …` line of the plain code blocks, without its comment."""
    lines = [line for block in code_blocks("") for line in block.splitlines() if line.startswith("hearth ")]
    return [re.findall(r'"[^"]*"|\S+', line.split("  #")[0]) for line in lines]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def user(demo_report: tuple[Any, dict[str, Any]]) -> Any:
    """The shell of somebody who has run the demo, with the README's recipe and a folder of texts."""
    shell, _ = demo_report
    texts = shell.folder / "my_texts"
    texts.mkdir(exist_ok=True)
    for number in range(40):
        story = "".join(f"Day {day} of voyage {number}: the wind was fair.\n" for day in range(60))
        (texts / f"{number}.txt").write_text(story, encoding="utf-8")
    recipe = code_blocks("yaml")[0].split("\n", 1)[1].replace("steps: 500", "steps: 25").replace("5M", "1M")
    (shell.folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return shell


def test_the_two_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_commands_run(user: Any) -> None:
    ran = set()
    for command in commands():
        words = [word.strip('"').replace("train.steps=1000", "train.steps=30") for word in command[1:]]
        if words[0] in {"chat", "serve"}:
            continue  # they wait for a person; the tests below run them
        user.run(*words, timeout=600)
        ran.add(words[0])
    assert {"doctor", "models", "generate", "lineage", "config", "train", "eval", "parity"} <= ran


def test_chat_answers(user: Any) -> None:
    command = next(command for command in commands() if command[1] == "chat")
    result = subprocess.run(
        [sys.executable, "-m", "hearth", *command[1:]],
        input="What does os.getcwd do?\n",
        capture_output=True,
        text=True,
        timeout=300,
        env=user.environment,
        cwd=user.folder,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "\n" in result.stdout, "the answer, even an empty one, ends its line"


def test_the_openai_program_works_against_serve(user: Any) -> None:
    command = next(command for command in commands() if command[1] == "serve")
    port = str(free_port())
    arguments = [word.replace("8000", port) for word in command[1:]]
    server = subprocess.Popen(
        [sys.executable, "-m", "hearth", *arguments],
        env=user.environment,
        cwd=user.folder,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/readyz")
        # What a model trained for seconds says may be nothing; which version said it is always known.
        program = code_blocks("python")[0].replace("8000", port) + "print(answer.model)\n"
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr[-2000:]
        assert result.stdout.splitlines()[-1] == "stdlib-assistant@1"
    finally:
        server.terminate()
        assert server.wait(60) == 0


def wait_until_ready(url: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"{url} did not become ready")


def test_the_python_program_works(user: Any) -> None:
    program = code_blocks("python")[1]
    path = user.folder / "program.py"
    path.write_text(program, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=600,
        env=user.environment,
        cwd=user.folder,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "length" in result.stdout or "stop" in result.stdout
