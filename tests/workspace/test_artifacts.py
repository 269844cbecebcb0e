from __future__ import annotations

import errno
import hashlib
import os
import shutil
import string
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hearth.errors import ConfigError, ConflictError, InputError, IntegrityError, NotFoundError, StorageError
from hearth.workspace.artifacts import ArtifactStore, TreeFile, decode_tree, encode_tree


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    if request.param == "local":
        yield ArtifactStore(tmp_path / "store")
        return
    store = ArtifactStore(f"memory://hearth-{uuid.uuid4().hex}")
    yield store
    store._fs.store.clear()


@pytest.fixture
def local(tmp_path):
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("alpha")
    (folder / "sub" / "b.bin").write_bytes(bytes(range(256)) * 1000)
    (folder / "empty").write_bytes(b"")
    return folder


def object_path(store, digest):
    sha256 = digest.removeprefix("sha256:")
    return store.local_root / "sha256" / sha256[:2] / sha256[2:]


def stored_files(store):
    return [path for path in store.local_root.rglob("*") if path.is_file()]


def test_bytes_come_back_under_their_sha256(store):
    digest = store.put_bytes(b"hello")
    assert digest == "sha256:" + hashlib.sha256(b"hello").hexdigest()
    assert store.read_bytes(digest) == b"hello"
    assert store.exists(digest)
    assert store.put_bytes(b"hello") == digest


def test_a_file_and_its_bytes_are_one_object(store, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"content" * 100_000)
    assert store.put_file(path) == store.put_bytes(path.read_bytes())


def test_what_is_not_there_is_not_found(store):
    missing = "sha256:" + "0" * 64
    assert not store.exists(missing)
    with pytest.raises(NotFoundError, match=missing):
        store.open(missing)


@pytest.mark.parametrize("digest", ["abc", "md5:" + "0" * 64, "sha256:" + "g" * 64, "sha256:../../x"])
def test_a_bad_digest_is_refused(store, digest):
    with pytest.raises(InputError, match="is not a digest"):
        store.exists(digest)


def test_a_tree_round_trips(store, tree, tmp_path):
    digest = store.put_tree(tree)
    target = store.materialize(digest, tmp_path / "out")
    assert sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()) == [
        "a.txt",
        "empty",
        "sub/b.bin",
    ]
    for name in ("a.txt", "empty", "sub/b.bin"):
        assert (target / name).read_bytes() == (tree / name).read_bytes()
    assert store.put_tree(target) == digest
    store.verify(digest)


def test_excluded_files_do_not_count(store, tree):
    digest = store.put_tree(tree)
    (tree / "hearth.json").write_text("{}")
    assert store.put_tree(tree, exclude={"hearth.json"}) == digest
    assert store.put_tree(tree) != digest


def test_any_change_changes_the_digest(store, tree):
    digest = store.put_tree(tree)
    (tree / "a.txt").rename(tree / "c.txt")
    renamed = store.put_tree(tree)
    (tree / "c.txt").write_text("Alpha")
    assert len({digest, renamed, store.put_tree(tree)}) == 3


def test_local_files_are_hard_links_and_read_only(local, tree, tmp_path):
    digest = local.put_tree(tree)
    target = local.materialize(digest, tmp_path / "out")
    first = local.tree(digest)[0]
    assert (target / first.path).stat().st_ino == object_path(local, f"sha256:{first.sha256}").stat().st_ino
    assert (target / first.path).stat().st_mode & 0o222 == 0
    assert (tree / "a.txt").stat().st_nlink == 1, "the source must stay independent of the store"


def test_where_links_are_impossible_files_are_copied(local, tree, tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    target = local.materialize(local.put_tree(tree), tmp_path / "out")
    assert (target / "a.txt").read_text() == "alpha"
    assert (target / "a.txt").stat().st_nlink == 1


def test_damage_is_found_on_every_way_of_reading(local, tree, tmp_path):
    digest = local.put_tree(tree)
    file = next(f for f in local.tree(digest) if f.path == "a.txt")
    path = object_path(local, f"sha256:{file.sha256}")
    path.chmod(0o644)
    path.write_text("alphA")
    named = rf"sha256:{file.sha256} is damaged: {path} has the hash"
    for read in (
        lambda: local.open(f"sha256:{file.sha256}"),
        lambda: local.verify(digest),
        lambda: local.materialize(digest, tmp_path / "out"),
    ):
        with pytest.raises(IntegrityError, match=named):
            read()
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out*")) == []


def test_damage_in_a_remote_store_is_found(tree):
    store = ArtifactStore(f"memory://hearth-{uuid.uuid4().hex}")
    digest = store.put_bytes(b"hello")
    with store._fs.open(store._key(digest.removeprefix("sha256:")), "wb") as sink:
        sink.write(b"hellO")
    with pytest.raises(IntegrityError, match=digest):
        store.read_bytes(digest)


def test_a_full_disk_leaves_nothing_half_written(local, tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        local.put_bytes(b"hello")
    assert "free some disk space" in (caught.value.fix or "")
    assert stored_files(local) == []


def test_a_really_full_disk(tmp_path):
    """The same on a file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        store = ArtifactStore(disk / "store")
        kept = store.put_bytes(b"small")
        big = tmp_path / "big"
        big.write_bytes(b"x" * (2 << 20))
        with pytest.raises(StorageError, match="No space left on device"):
            store.put_file(big)
        assert [path for path in stored_files(store) if path != object_path(store, kept)] == []
        assert store.read_bytes(kept) == b"small"
        with pytest.raises(StorageError):
            store.put_bytes(b"y" * (2 << 20))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_abandoned_temporaries_are_removed_and_never_read(local, tree):
    local.put_bytes(b"x")
    old, new = local.local_root / "tmp" / "old", local.local_root / "tmp" / "new"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    past = time.time() - 7200
    os.utime(old, (past, past))
    local.put_tree(tree)
    assert not old.exists()
    assert new.exists(), "somebody may still be writing it"


def test_a_file_that_changes_while_it_is_stored_is_refused(local, tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"before")
    exists = local._exists

    def change_then_answer(sha256):
        path.write_bytes(b"after!")
        return exists(sha256)

    monkeypatch.setattr(local, "_exists", change_then_answer)
    with pytest.raises(ConflictError, match="changed while it was stored"):
        local.put_file(path)
    assert stored_files(local) == []


def test_links_to_files_are_followed_and_to_folders_refused(store, tree, tmp_path):
    (tmp_path / "blob").write_text("alpha")
    plain = store.put_tree(tree)
    (tree / "a.txt").unlink()
    (tree / "a.txt").symlink_to(tmp_path / "blob")
    assert store.put_tree(tree) == plain
    (tree / "folder").symlink_to(tmp_path)
    with pytest.raises(InputError, match="a link to a folder"):
        store.put_tree(tree)


def test_dangling_links_and_special_files_are_refused(local, tree):
    (tree / "gone").symlink_to(tree / "nowhere")
    with pytest.raises(InputError, match="no regular file"):
        local.put_tree(tree)
    (tree / "gone").unlink()
    os.mkfifo(tree / "pipe")
    with pytest.raises(InputError, match="no regular file"):
        local.put_tree(tree)


def test_missing_and_empty_folders_are_refused(local, tmp_path):
    with pytest.raises(NotFoundError, match="no folder"):
        local.put_tree(tmp_path / "missing")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(InputError, match="has no files"):
        local.put_tree(tmp_path / "hollow")
    with pytest.raises(NotFoundError, match="no file"):
        local.put_file(tmp_path / "missing")
    with pytest.raises(InputError, match="is a folder"):
        local.put_file(tmp_path)


def test_a_full_target_is_not_overwritten(local, tree, tmp_path):
    digest = local.put_tree(tree)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ConflictError, match="exists already"):
        local.materialize(digest, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_a_file_is_no_tree(local, tmp_path):
    for content in (b"hello", b'{"files":[', b'{"files":[{"path":1}],"format":"hearth-tree-1"}'):
        digest = local.put_bytes(content)
        with pytest.raises(InputError, match="not a tree"):
            local.materialize(digest, tmp_path / "out")
        local.verify(digest)


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", ""])
def test_paths_that_leave_a_tree_are_refused(local, tmp_path, path):
    digest = local.put_bytes(encode_tree([TreeFile(path, 1, "0" * 64)]))
    with pytest.raises(IntegrityError, match="unsafe path"):
        local.materialize(digest, tmp_path / "out")


def test_removing_is_repeatable(store):
    digest = store.put_bytes(b"x")
    store.remove(digest)
    store.remove(digest)
    assert not store.exists(digest)


def test_an_unknown_protocol_is_a_config_error():
    with pytest.raises(ConfigError, match="nonsense://x"):
        ArtifactStore("nonsense://x")


def test_a_read_error_of_the_device_is_a_storage_error(local, monkeypatch):
    digest = local.put_bytes(b"x")

    def broken(*_args, **_kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(StorageError, match="Input/output error"):
        local.open(digest)


_NAMES = st.text(string.ascii_lowercase + "äö/ ", min_size=1, max_size=8).filter(
    lambda name: all(part not in ("", ".", "..") for part in name.split("/"))
)


@settings(deadline=None)
@given(st.dictionaries(_NAMES, st.integers(0, 2**40), max_size=6), st.randoms())
def test_the_bytes_of_a_tree_do_not_depend_on_the_order_of_its_files(sizes, random):
    files = [TreeFile(name, size, hashlib.sha256(name.encode()).hexdigest()) for name, size in sizes.items()]
    shuffled = random.sample(files, len(files))
    assert encode_tree(files) == encode_tree(shuffled)
    assert decode_tree(encode_tree(shuffled), "sha256:x") == sorted(files, key=lambda f: f.path)
