from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hearth.config.sources import dump_yaml, parse_scalar, read_document, read_yaml
from hearth.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3", 3),
        ("-0", 0),
        ("007", 7),
        ("0x10", 16),
        ("0o10", 8),
        ("1.", 1.0),
        (".5", 0.5),
        ("1e3", 1000.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("2026-01-01", "2026-01-01"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("10M", "10M"),
        ("", None),
        ("~", None),
        ("null", None),
        ("'3'", "3"),
        ("[1, a]", [1, "a"]),
        ("{a: 1}", {"a": 1}),
        ("hf:org/name", "hf:org/name"),
        ("a=b", "a=b"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    assert parse_scalar(text) == value
    assert type(parse_scalar(text)) is type(value)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_prints_is_read_back(value):
    assert parse_scalar(repr(value)) == value


def test_keys_have_lines():
    document = read_yaml("a: 1\nb:\n  c:\n    - d: 2\n", "f.yaml")
    assert document.value == {"a": 1, "b": {"c": [{"d": 2}]}}
    assert document.lines == {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "c", "0", "d"): 4}


def test_an_empty_file_is_an_empty_mapping():
    for text in ("", "# only a comment\n", "---\n"):
        assert read_yaml(text, "f.yaml").value == {}


def test_duplicate_keys_are_refused_with_both_lines():
    with pytest.raises(ConfigError, match=r"f\.yaml: train\.steps: the key stands twice, on lines 2 and 4"):
        read_yaml("train:\n  steps: 1\n  seed: 2\n  steps: 3\n", "f.yaml")


def test_anchors_and_merges_work():
    document = read_yaml("a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  q: 3\nc: *x\n", "f.yaml")
    assert document.value == {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}, "c": {"p": 1, "q": 2}}


def test_an_alias_in_itself_and_a_bomb_are_refused():
    with pytest.raises(ConfigError, match="an alias contains itself"):
        read_yaml("a: &x [*x]\n", "f.yaml")
    bomb = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    with pytest.raises(ConfigError, match="grows without bound"):
        read_yaml(bomb, "f.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", r"f\.yaml: line \d+: "),
        ("a: b: c\n", r"f\.yaml: line 1: mapping values are not allowed"),
        ("\tx: 1\n", r"f\.yaml: line 1: "),
        ("- 1\n- 2\n", r"f\.yaml: the file holds a list, not sections"),
        ("hello\n", r"f\.yaml: the file holds text, not sections"),
        ("42\n", r"f\.yaml: the file holds a single value"),
        ("a: !!python/object:os.system {}\n", r"a"),
        ("a: !!python/name:os.system x\n", r"f\.yaml: line 1: the tag .* is not allowed"),
        ("? [1]\n: 2\n", r"f\.yaml: line 1: a key must be text"),
        ("a: 1\n---\nb: 2\n", r"f\.yaml: line 2: but found another document"),
        ("a: \x00\n", r"f\.yaml: unacceptable character #x0000[^\n]*$"),
        ("<<: 3\n", r"<< needs a mapping"),
    ],
)
def test_bad_yaml_is_named_with_its_line(text, message):
    if text.startswith("a: !!python/object"):
        # An unknown tag on a mapping makes nothing but a mapping.
        assert read_yaml(text, "f.yaml").value == {"a": {}}
        return
    with pytest.raises(ConfigError, match=message):
        read_yaml(text, "f.yaml")


def test_toml_is_read_and_its_mistakes_are_named(tmp_path):
    (tmp_path / "r.toml").write_text("[train]\nsteps = 3\n")
    assert read_document(tmp_path / "r.toml").value == {"train": {"steps": 3}}
    (tmp_path / "r.toml").write_text("[train]\nsteps = 3\nsteps = 4\n")
    with pytest.raises(ConfigError, match=r"r\.toml: .*line 3"):
        read_document(tmp_path / "r.toml")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"no file .*missing\.yaml"):
        read_document(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_document(tmp_path)
    (tmp_path / "r.txt").write_text("a: 1")
    with pytest.raises(ConfigError, match="no known ending") as caught:
        read_document(tmp_path / "r.txt")
    assert ".yaml" in (caught.value.fix or "")
    (tmp_path / "r.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 3\)"):
        read_document(tmp_path / "r.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_document(tmp_path / "r.yaml").value == {"a": 1}


_PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_VALUES = st.recursive(
    _PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(), _VALUES, max_size=3))
@example({"a": "\x85", "b": "1e-4", "c": "no", "d": "~", "e": "", "f": "<<", "g": "2026-01-01", "h": "0o7"})
@example({"1e-4": 1, "": 2, "~": 3, "true": 4})
def test_whatever_is_written_is_read_back(value):
    assert read_yaml(dump_yaml(value), "f.yaml").value == value


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", "a: {}"), ("a.toml", "a = {}"), ("a.json", '{{"a": {}}}')]
)
@pytest.mark.parametrize(
    ("value", "problem"),
    [("[" * 5000 + "]" * 5000, "nested too deeply"), ("9" * 5000, r"too long|5000 digits|integer string")],
)
def test_absurd_values_are_errors_of_the_file(tmp_path, name, text, value, problem):
    path = tmp_path / name
    path.write_text(text.format(value))
    with pytest.raises(ConfigError, match=problem) as caught:
        read_document(path)
    assert name in str(caught.value)
    if name == "a.yaml":
        with pytest.raises(ConfigError, match=problem):
            parse_scalar(value)
