"""Questions and answers about the standard library, made from its signatures and docstrings.

Every question occurs once, and which phrasings an item gets is decided by a hash of its name, so the same
library gives the same conversations. A conversation belongs to the group of its module: held-out questions
come from held-out modules.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hearth.data.stdlib import Definition, Module, first_paragraph

GENERATOR_VERSION = 1  # raise it when the questions change: datasets made before are then rebuilt

MIN_ANSWER_CHARS = 15
MAX_ANSWER_CHARS = 400
PHRASINGS_PER_ITEM = 2
MAX_LISTED = 8

PHRASINGS: dict[str, tuple[str, ...]] = {
    "purpose": (
        "What does {name} do?",
        "What is {name} for?",
        "Explain {name}.",
        "Describe {name} in one paragraph.",
        "What is the purpose of {name}?",
    ),
    "signature": (
        "What is the signature of {name}?",
        "How do I call {name}?",
        "What arguments does {name} take?",
        "Show me the signature of {name}.",
    ),
    "module_of": (
        "Which module has {short}?",
        "Where is {short} defined?",
        "In which module do I find {short}?",
        "What do I import to use {short}?",
    ),
    "module_purpose": (
        "What is the module {name} for?",
        "What does the module {name} do?",
        "Describe the module {name}.",
        "Tell me about the module {name}.",
    ),
    "members": (
        "Which functions does the module {name} have?",
        "List functions of the module {name}.",
        "What can I call in the module {name}?",
    ),
    "methods": (
        "Which methods does {name} have?",
        "List methods of {name}.",
        "What can I do with a {name}?",
    ),
    "kind": (
        "Is {name} a function or a class?",
        "What kind of thing is {name}?",
    ),
}


@dataclass(frozen=True)
class Question:
    """One conversation: ``module`` is the group it is held out with."""

    id: str
    module: str
    question: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat messages."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]


def make_questions(modules: Iterable[Module]) -> list[Question]:
    """All questions about the public modules, in a fixed order, each question text once."""
    public = sorted((module for module in modules if module.is_public), key=lambda module: module.name)
    num_homes = Counter(
        definition.qualname
        for module in public
        for definition in module.definitions
        if definition.kind in ("function", "class")
    )
    questions: list[Question] = []
    asked: set[str] = set()
    for module in public:
        for kind, item, variables, answer in _items(module, num_homes):
            for phrasing in _choose(kind, item):
                text = PHRASINGS[kind][phrasing].format(**variables)
                if text not in asked:
                    asked.add(text)
                    questions.append(Question(f"{item}:{kind}:{phrasing}", module.name, text, answer))
    return questions


Item = tuple[str, str, dict[str, str], str]  # kind of question, item, what the phrasing names, answer


def _items(module: Module, num_homes: Counter[str]) -> Iterator[Item]:
    summary = _answer(module.docstring)
    if summary:
        yield "module_purpose", module.name, {"name": module.name}, summary
    functions = [item.qualname for item in module.definitions if item.kind == "function"]
    if functions:
        yield "members", module.name, {"name": module.name}, _listing(functions)
    methods: dict[str, list[str]] = {}
    for definition in module.definitions:
        yield from _definition_items(definition, num_homes)
        if definition.kind == "method":
            owner, _, name = definition.qualname.partition(".")
            methods.setdefault(owner, []).append(name)
    for owner, names in methods.items():
        full = f"{module.name}.{owner}"
        yield "methods", full, {"name": full}, _listing(names)


def _definition_items(definition: Definition, num_homes: Counter[str]) -> Iterator[Item]:
    name = definition.name
    summary = _answer(definition.docstring)
    if summary:
        yield "purpose", name, {"name": name}, summary
    if definition.signature and len(definition.signature) <= MAX_ANSWER_CHARS:
        yield "signature", name, {"name": name}, definition.signature
    if definition.kind not in ("function", "class"):
        return
    if num_homes[definition.qualname] == 1:
        answer = f"{definition.qualname} is in the module {definition.module}."
        yield "module_of", name, {"short": definition.qualname}, answer
    yield "kind", name, {"name": name}, f"{name} is a {definition.kind} in the module {definition.module}."


def _answer(docstring: str) -> str:
    """First paragraph, cut after a sentence when it is long; empty when it says too little."""
    text = first_paragraph(docstring)
    if len(text) > MAX_ANSWER_CHARS:
        end = text.rfind(". ", 0, MAX_ANSWER_CHARS)
        text = text[: end + 1] if end > 0 else ""
    says_something = len(text) >= MIN_ANSWER_CHARS and " " in text and (text[0].isalpha() or text[0] == "`")
    return text if says_something else ""


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_LISTED])
    more = len(names) - MAX_LISTED
    return f"{shown} and {more} more." if more > 0 else f"{shown}."


def _choose(kind: str, item: str) -> list[int]:
    """Which phrasings an item gets, in the order of a hash of (kind, item, phrasing)."""

    def key(phrasing: int) -> bytes:
        return hashlib.blake2b(f"{kind}/{item}/{phrasing}".encode(), digest_size=8).digest()

    return sorted(range(len(PHRASINGS[kind])), key=key)[:PHRASINGS_PER_ITEM]
