"""The Python standard library of the running interpreter as a corpus: text that every machine has.

Each module gives two documents: ``module``, its source, and ``module:docs``, its signatures and docstrings as
prose. Nothing is imported; sources are only parsed. Left out: installed packages, test suites, generated
encodings and tables.
"""

from __future__ import annotations

import ast
import inspect
import io
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hearth.errors import DataError

LICENSE = "PSF-2.0"

_LEFT_OUT_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "_bundled", "lib-dynload"}
)
_LEFT_OUT_FILES = frozenset({"html/entities.py", "msilib/schema.py", "msilib/sequence.py", "msilib/text.py"})
_KEPT_ENCODINGS = frozenset({"__init__", "aliases", "idna", "punycode", "utf_8", "utf_8_sig", "utf_16"})

# Pure Python twins of C modules and platform modules, under the names that people import.
_PUBLIC_NAMES = {
    "posixpath": "os.path",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_pydatetime": "datetime",
    "_collections_abc": "collections.abc",
}
_NOT_FOR_QUESTIONS = frozenset(
    {"idlelib", "lib2to3", "turtledemo", "pydoc_data", "distutils", "ntpath", "encodings"}
)


def stdlib_root() -> Path:
    """Folder of the standard library. Raises DataError where the interpreter has no source files."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "textwrap.py").is_file():
        raise DataError(
            f"this Python has no standard library sources at {root}",
            fix="use a Python with its .py files, or give another source of text",
        )
    return root


def stdlib_files(root: Path | None = None) -> list[Path]:
    """Source files of the corpus, sorted."""
    root = root or stdlib_root()
    files = [file for file in root.rglob("*.py") if _belongs(file.relative_to(root))]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _belongs(relative: Path) -> bool:
    parts = relative.parts
    if _LEFT_OUT_FOLDERS & set(parts[:-1]) or any(part.startswith("config-") for part in parts[:-1]):
        return False
    if relative.as_posix() in _LEFT_OUT_FILES or relative.stem.startswith("_sysconfigdata"):
        return False
    return parts[0] != "encodings" or relative.stem in _KEPT_ENCODINGS


def module_name(relative: Path) -> str:
    """Dotted name of a module from its path below the root."""
    parts = list(relative.with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def decode_source(data: bytes) -> str:
    """Text of a source file in the encoding that it declares. Raises UnicodeDecodeError or SyntaxError."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return io.TextIOWrapper(io.BytesIO(data), encoding, newline=None).read()


@dataclass(frozen=True)
class Definition:
    """A public function, class or method: names, signature and docstring as written in the source."""

    kind: str  # function, class, method or property
    module: str
    qualname: str
    arguments: str | None
    docstring: str

    @property
    def name(self) -> str:
        """Full dotted name."""
        return f"{self.module}.{self.qualname}"

    @property
    def signature(self) -> str | None:
        """``textwrap.wrap(text, width=70, **kwargs)``; None for a property or a class without init."""
        return None if self.arguments is None else f"{self.name}({self.arguments})"

    @cached_property
    def summary(self) -> str:
        """First paragraph of the docstring on one line."""
        return first_paragraph(self.docstring)


@dataclass(frozen=True)
class Module:
    """What a module says about itself."""

    name: str
    docstring: str
    definitions: tuple[Definition, ...]

    @property
    def is_public(self) -> bool:
        """Whether people import it by this name."""
        parts = self.name.split(".")
        return parts[0] not in _NOT_FOR_QUESTIONS and not any(part.startswith("_") for part in parts)


def first_paragraph(docstring: str) -> str:
    """First paragraph of a docstring, on one line."""
    return " ".join(docstring.strip().split("\n\n", 1)[0].split())


def parse_module(name: str, source: str) -> Module | None:
    """Signatures and docstrings of a module; None when this Python cannot parse it (a template, say)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources hold invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    public = _PUBLIC_NAMES.get(name, name)
    return Module(public, _docstring(tree), tuple(_definitions(tree, public)))


def _docstring(node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    raw = ast.get_docstring(node, clean=False)
    return inspect.cleandoc(raw).strip() if raw else ""


def _definitions(tree: ast.Module, module: str) -> Iterator[Definition]:
    seen: set[str] = set()
    for node in _statements(tree.body):
        if node.name.startswith("_") or node.name in seen:
            continue
        seen.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = {
                child.name: child
                for child in reversed(node.body)
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            }
            init = methods.get("__init__")
            arguments = _arguments(init, drop_first=True) if init else None
            yield Definition("class", module, node.name, arguments, _docstring(node))
            for name, child in reversed(methods.items()):
                if not name.startswith("_"):
                    is_property = _is_property(child)
                    yield Definition(
                        "property" if is_property else "method",
                        module,
                        f"{node.name}.{name}",
                        None if is_property else _arguments(child, drop_first=not _is_static(child)),
                        _docstring(child),
                    )
        else:
            yield Definition("function", module, node.name, _arguments(node), _docstring(node))


def _statements(
    body: list[ast.stmt],
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Definitions at the top level, also those inside if and try."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _is_static(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(isinstance(item, ast.Name) and item.id == "staticmethod" for item in node.decorator_list)


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {ast.unparse(item).rpartition(".")[2] for item in node.decorator_list}
    return bool(names & {"property", "cached_property", "setter", "getter", "deleter", "abstractproperty"})


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef, *, drop_first: bool = False) -> str:
    arguments = node.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None
    for extra in (arguments.vararg, arguments.kwarg):
        if extra is not None:
            extra.annotation = None
    if drop_first:
        if arguments.posonlyargs:
            arguments.posonlyargs.pop(0)
        elif arguments.args:
            arguments.args.pop(0)
        # A default of the removed argument goes with it.
        surplus = len(arguments.defaults) - len(arguments.posonlyargs) - len(arguments.args)
        del arguments.defaults[: max(0, surplus)]
    return ast.unparse(arguments)


def docs_text(module: Module) -> str:
    """The docstrings of a module as one page of prose; empty when there are none."""
    parts = [f"{module.name}\n\n{module.docstring}"] if module.docstring else []
    for definition in module.definitions:
        if definition.docstring:
            parts.append(f"{definition.signature or definition.name}\n\n{definition.docstring}")
    return "\n\n\n".join(parts) + "\n" if parts else ""


def topics_text(source: str) -> str:
    """The language reference as held by ``pydoc_data.topics``: its string values, in order of topic."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return "\n\n\n".join(str(topics[name]).strip() for name in sorted(topics)) + "\n"
    return ""


def python_version() -> str:
    """Version of the interpreter whose library is the corpus."""
    return ".".join(map(str, sys.version_info[:3]))
