"""The standard library as a corpus: what is in it, what is not, and questions with true answers."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
from collections import Counter

import pytest

from hearth.data.stdlib import (
    Module,
    decode_source,
    docs_text,
    module_name,
    parse_module,
    stdlib_files,
    stdlib_root,
    topics_text,
)
from hearth.data.stdlib_chat import Question, make_questions


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    root = stdlib_root()
    found = {}
    for file in stdlib_files(root):
        module = parse_module(module_name(file.relative_to(root)), decode_source(file.read_bytes()))
        if module is not None:
            found[module.name] = module
    return found


@pytest.fixture(scope="module")
def questions(modules: dict[str, Module]) -> list[Question]:
    return make_questions(modules.values())


def test_the_corpus_is_library_code_without_tests_and_packages() -> None:
    root = stdlib_root()
    names = {module_name(file.relative_to(root)) for file in stdlib_files(root)}
    assert {"textwrap", "json", "json.decoder", "asyncio.events", "encodings.utf_8"} <= names
    for name in names:
        assert not {"test", "tests", "idle_test", "site-packages", "_bundled"} & set(name.split("."))
    assert "encodings.cp1252" not in names
    assert not any(name.startswith("_sysconfigdata") for name in names)
    assert 300 < len(names) < 1000


def test_signatures_are_those_of_the_running_library(modules: dict[str, Module]) -> None:
    signatures = {d.name: d.signature for d in modules["textwrap"].definitions}
    assert signatures["textwrap.wrap"] == "textwrap.wrap(text, width=70, **kwargs)"
    assert signatures["textwrap.TextWrapper.fill"] == "textwrap.TextWrapper.fill(text)"
    for name in ("wrap", "fill", "shorten", "dedent", "indent"):
        assert (
            signatures[f"textwrap.{name}"] == f"textwrap.{name}{inspect.signature(getattr(textwrap, name))}"
        )


def test_defaults_of_a_dropped_argument_go_with_it() -> None:
    source = "class A:\n    def f(self=1, x=2, /, y=3, *a, k: int = 4, **kw) -> int: ...\n"
    (klass, method) = parse_module("m", source).definitions  # type: ignore[union-attr]
    assert klass.signature is None
    assert method.signature == "m.A.f(x=2, /, y=3, *a, k=4, **kw)"
    ast.parse(f"def f({method.arguments}): ...")


def test_all_signatures_parse(modules: dict[str, Module]) -> None:
    for module in modules.values():
        for definition in module.definitions:
            if definition.arguments is not None:
                ast.parse(f"def f({definition.arguments}): ...")


def test_docs_hold_docstrings_as_prose(modules: dict[str, Module]) -> None:
    text = docs_text(modules["textwrap"])
    assert "textwrap.dedent(text)\n\nRemove any common leading whitespace" in text
    assert "def dedent" not in text


def test_topics_are_prose() -> None:
    text = topics_text("# generated\ntopics = {'b': 'Two\\n', 'a': 'One\\n'}\n")
    assert text == "One\n\n\nTwo\n"


def test_questions_are_unique_and_deterministic(
    questions: list[Question], modules: dict[str, Module]
) -> None:
    assert len(questions) > 10_000
    assert len({question.question for question in questions}) == len(questions)
    assert len({question.id for question in questions}) == len(questions)
    assert make_questions(reversed(list(modules.values()))) == questions
    phrasings = Counter(question.question.split(" ")[0] for question in questions)
    assert len(phrasings) > 8


def test_answers_are_true(questions: list[Question]) -> None:
    by_item: dict[tuple[str, str], str] = {}
    for question in questions:
        item, kind, _ = question.id.split(":")
        by_item[item, kind] = question.answer
    assert by_item["textwrap.wrap", "signature"] == "textwrap.wrap(text, width=70, **kwargs)"
    assert by_item["json.dumps", "purpose"] == "Serialize ``obj`` to a JSON formatted ``str``."
    assert by_item["textwrap.dedent", "module_of"] == "dedent is in the module textwrap."
    assert (
        by_item["textwrap.TextWrapper", "kind"] == "textwrap.TextWrapper is a class in the module textwrap."
    )
    assert by_item["textwrap", "members"] == "wrap, fill, shorten, dedent, indent."
    assert by_item["textwrap", "module_purpose"] == "Text wrapping and filling."


def test_where_is_it_is_asked_only_of_names_with_one_home(questions: list[Question]) -> None:
    asked = Counter(
        question.id.split(":")[0].rpartition(".")[2] for question in questions if ":module_of:" in question.id
    )
    assert max(asked.values()) <= 2  # the two phrasings of one item
    assert "dumps" not in asked  # json, pickle, marshal, plistlib …


def test_making_questions_imports_no_module() -> None:
    code = (
        "import sys; before = set(sys.modules); import hearth.data.stdlib_chat, hearth.data.stdlib as s;"
        "f = [p for p in s.stdlib_files() if p.name in ('antigravity.py', 'turtle.py', 'smtplib.py')];"
        "[s.parse_module(p.stem, p.read_text()) for p in f];"
        "print(len(f), {'antigravity', 'turtle', 'smtplib'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "3 set()"


def test_a_file_that_does_not_parse_is_no_module() -> None:
    assert parse_module("template", "def {name}(:") is None
