"""Names of metrics and spans live in one module only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from hearth.telemetry import names

SOURCE = Path(names.__file__).resolve().parents[1]
METRIC = re.compile(r"^(hearth_(engine|gateway|training|data|monitor)_\w+|gen_ai\.[\w.]+)$")


def string_constants(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_no_other_module_holds_a_metric_or_span_name() -> None:
    known = set(names.metric_names())
    offenders = {
        str(path.relative_to(SOURCE)): sorted(found)
        for path in SOURCE.rglob("*.py")
        if path != Path(names.__file__).resolve()
        and (found := {text for text in string_constants(path) if text in known or METRIC.match(text)})
    }
    assert offenders == {}


def test_the_check_would_see_an_offender(tmp_path: Path) -> None:
    module = tmp_path / "bad.py"
    module.write_text(f'Counter("{names.ENGINE_TTFT}")\nSPAN = "gen_ai.response.id"\n')
    found = string_constants(module)
    assert {text for text in found if METRIC.match(text)} == {names.ENGINE_TTFT, "gen_ai.response.id"}


def test_names_follow_the_conventions() -> None:
    metric_names = names.metric_names()
    assert len(metric_names) == len(set(metric_names)) > 15
    for name in metric_names:
        assert re.fullmatch(r"hearth_[a-z]+(_[a-z]+)+", name), name
        assert not name.endswith("_total"), f"{name}: the client adds _total"
