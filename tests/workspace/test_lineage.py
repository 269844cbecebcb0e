from __future__ import annotations

import pytest

from hearth.errors import InputError


@pytest.fixture
def lineage(workspace):
    return workspace.lineage


def chain(lineage):
    lineage.add("source:books", "dataset:d1", "prepared")
    lineage.add("source:web", "dataset:d1", "prepared")
    lineage.add("dataset:d1", "run:r1", "trained")
    lineage.add("run:r1", "model:base@1", "produced")
    lineage.add("dataset:d2", "run:r2", "trained")
    lineage.add("model:base@1", "run:r2", "initialised")
    lineage.add("run:r2", "model:chat@1", "produced")


def test_up_and_down(lineage):
    chain(lineage)
    up = lineage.up("model:chat@1")
    assert up.refs() == [
        "model:chat@1",
        "run:r2",
        "dataset:d2",
        "model:base@1",
        "run:r1",
        "dataset:d1",
        "source:books",
        "source:web",
    ]
    assert up.children[0].relation == "produced"
    assert lineage.down("source:web").refs() == [
        "source:web",
        "dataset:d1",
        "run:r1",
        "model:base@1",
        "run:r2",
        "model:chat@1",
    ]
    assert lineage.up("source:web").children == []
    assert lineage.down("unknown:x").refs() == ["unknown:x"]


def test_an_edge_is_kept_once(lineage):
    lineage.add("a:1", "b:1", "made")
    lineage.add("a:1", "b:1", "made")
    lineage.add("a:1", "b:1", "checked")
    assert [child.relation for child in lineage.down("a:1").children] == ["checked", "made"]


def test_cycles_end(lineage):
    lineage.add("a:1", "b:1", "x")
    lineage.add("b:1", "c:1", "x")
    lineage.add("c:1", "a:1", "x")
    tree = lineage.down("a:1")
    assert tree.refs() == ["a:1", "b:1", "c:1"]
    last = tree.children[0].children[0].children[0]
    assert (last.ref, last.repeated, last.children) == ("a:1", True, [])


def test_a_diamond_is_expanded_once(lineage):
    for side in ("left:1", "right:1"):
        lineage.add("top:1", side, "x")
        lineage.add(side, "bottom:1", "x")
    lineage.add("bottom:1", "deep:1", "x")
    tree = lineage.down("top:1")
    bottoms = [side.children[0] for side in tree.children]
    assert [(b.repeated, len(b.children)) for b in bottoms] == [(False, 1), (True, 0)]


def test_wide_levels_need_no_giant_query(lineage):
    lineage.add_many(("dataset:d", f"run:{i}", "trained") for i in range(1200))
    lineage.add_many((f"run:{i}", f"model:m@{i}", "produced") for i in range(1200))
    assert len(lineage.down("dataset:d").refs()) == 2401


def test_depth_can_be_limited(lineage):
    chain(lineage)
    assert lineage.down("dataset:d1", max_depth=1).refs() == ["dataset:d1", "run:r1"]


@pytest.mark.parametrize("node", ["", "dataset", "dataset:", ":x", "Data:x", "dataset: a", "a:b\n"])
def test_bad_nodes_are_refused(lineage, node):
    with pytest.raises(InputError, match="is not a lineage node"):
        lineage.add(node, "run:r1", "x")
    with pytest.raises(InputError, match="cannot be made from itself"):
        lineage.add("run:r1", "run:r1", "x")


def test_paths_with_spaces_and_very_long_ones_are_nodes(lineage):
    lineage.add("source:/my texts/a b.txt", "dataset:d", "prepared")
    long, other = "source:/" + "x" * 3000, "source:/" + "x" * 2999 + "y"
    lineage.add(long, "dataset:d", "prepared")
    lineage.add(other, "dataset:d", "prepared")
    assert len(lineage.up("dataset:d").children) == 3
    for ref in (long, other, "source:/my texts/a b.txt"):
        assert lineage.exists(ref)
        assert [child.ref for child in lineage.down(ref).children] == ["dataset:d"]


def test_find_by_prefix_takes_no_wildcards(lineage):
    lineage.add("dataset:abc1", "run:r1", "x")
    lineage.add("dataset:abc2", "run:r1", "x")
    assert lineage.find("dataset:abc") == ["dataset:abc1", "dataset:abc2"]
    assert lineage.find("dataset:abc1") == ["dataset:abc1"]
    assert lineage.find("dataset:%") == []
    assert lineage.find("dataset:ab_1") == []
    assert lineage.exists("run:r1")
    assert not lineage.exists("run:r")


def test_trees_become_json(lineage):
    lineage.add("a:1", "b:1", "made")
    assert lineage.down("a:1").to_dict() == {
        "ref": "a:1",
        "relation": None,
        "repeated": False,
        "children": [{"ref": "b:1", "relation": "made", "repeated": False, "children": []}],
    }
