"""The shape of the house: layers, sizes, light imports, public names."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hearth

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src" / "hearth").rglob("*.py"))
MAX_LINES = 600
MAX_FUNCTION_LINES = 60
# One loop nest over constants that numba or Triton compile in: cut into functions it would say less and run
# slower. A third of Triton's are its parameters.
LONGER_FUNCTIONS = {
    "attention/numba_kernels.py": {"make_kernel": 100, "kernel": 85},
    "attention/triton_kernels.py": {"attend_kernel": 120},
}


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root / "src"), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)


def test_a_deliberate_violation_of_the_layers_is_caught(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # The copy must be what is imported, not the installed package: the untouched copy passes ...
    assert lint_imports(tmp_path).returncode == 0
    errors = tmp_path / "src" / "hearth" / "errors.py"
    errors.write_text(errors.read_text(encoding="utf-8") + "\nimport hearth.config\n", encoding="utf-8")
    # ... and one import upward in it fails.
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert "hearth.errors -> hearth.config" in result.stdout


@pytest.mark.parametrize("statement", ["import hearth", "import hearth.cli.main", "import hearth.workspace"])
def test_light_imports_load_no_heavy_library(statement: str) -> None:
    heavy = "{'torch', 'transformers', 'peft', 'numba', 'starlette', 'aiohttp', 'openai'}"
    assert run_python(f"{statement}\nimport sys\nprint({heavy} & set(sys.modules))").strip() == "set()"


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom hearth.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)"
    )
    assert run_python(code).strip().endswith("0 False")


def test_every_verb_has_help() -> None:
    from hearth.cli.main import VERBS, cli

    context = cli.make_context("hearth", ["--help"], resilient_parsing=True)
    for verb in VERBS:
        command = cli.get_command(context, verb)
        assert command is not None
        assert command.help, f"hearth {verb} has no help"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    longer = LONGER_FUNCTIONS.get("/".join(path.parts[-2:]), {})
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
            num_lines = node.end_lineno - node.lineno + 1
            allowed = longer.get(node.name, MAX_FUNCTION_LINES)
            assert num_lines <= allowed, f"{node.name} has {num_lines} lines"


def test_public_names_can_be_imported() -> None:
    for name in hearth.__all__:
        assert getattr(hearth, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hearth.nothing  # noqa: B018 - the access is the test


def test_error_tree_matches_its_drawing() -> None:
    from hearth import errors

    drawn = {line.split("── ")[1].split()[0] for line in (errors.__doc__ or "").splitlines() if "── " in line}
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.HearthError) and name != "HearthError"
    }
    assert drawn == defined
