"""The artifact store: immutable bytes under their SHA-256, on a local folder or any fsspec file system.

    URL/sha256/ab/cdef…     one object
    URL/tmp/…               objects being written; renamed when complete

A tree (a directory) is itself an object: a small JSON list of relative paths, sizes and hashes. Its digest
therefore names the whole content of the directory, and two equal directories have equal digests.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

from hearth.errors import ConfigError, ConflictError, InputError, IntegrityError, NotFoundError, StorageError

CHUNK_BYTES = 4 << 20
_STALE_SECONDS = 3600.0  # an object in tmp/ that nobody wrote to for an hour was abandoned
# Stores where an upload becomes visible only when it is complete: no temporary name, no copy.
_ATOMIC_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
_TREE_FORMAT = "hearth-tree-1"


@dataclass(frozen=True)
class TreeFile:
    """One file of a tree; ``path`` is relative, with forward slashes."""

    path: str
    size: int
    sha256: str


class ArtifactStore:
    """Content-addressed storage; ``on_put`` hears the digest of whatever a caller stores."""

    def __init__(self, url: str | Path, *, on_put: Callable[[str], None] | None = None) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.url = str(url)
        self._on_put = on_put
        try:
            fs, root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"HEARTH_ARTIFACTS_URL {self.url} cannot be opened: {error}",
                fix="use a folder, or a URL such as s3://bucket/prefix with its fsspec driver installed",
            ) from error
        self._fs: Any = fs
        self._root = str(root).rstrip("/")
        self.local_root = Path(self._root) if isinstance(fs, LocalFileSystem) else None
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._atomic = bool(protocols & _ATOMIC_PROTOCOLS)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────

    def put_bytes(self, content: bytes) -> str:
        """Store ``content``; return its digest, ``sha256:…``."""
        return self._announce(self._put_bytes(content))

    def put_file(self, path: Path | str) -> str:
        """Store a copy of a file; return its digest. Nothing is written when the store has it already."""
        return self._announce(f"sha256:{self._put_file(Path(path)).sha256}")

    def put_tree(self, directory: Path | str, exclude: Collection[str] = ()) -> str:
        """Store every file below ``directory`` but the relative paths in ``exclude``; return the digest.

        Links to files are followed. Raises InputError for links to folders and special files.
        """
        return self._announce(self.add_tree(directory, exclude))

    def add_tree(self, directory: Path | str, exclude: Collection[str] = ()) -> str:
        """As ``put_tree``, but the caller keeps track of who needs the tree (the registry does)."""
        directory = Path(directory)
        self.remove_stale_temporaries()
        files = [self._put_file(path, name) for name, path in walk_files(directory, exclude)]
        return self._put_bytes(encode_tree(files))

    def _announce(self, digest: str) -> str:
        if self._on_put is not None:
            self._on_put(digest)
        return digest

    def _put_bytes(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        if not self._exists(sha256):
            self._write(io.BytesIO(content), sha256, origin="bytes")
        return f"sha256:{sha256}"

    def _put_file(self, path: Path, name: str = "") -> TreeFile:
        try:
            with path.open("rb") as source:
                sha256, size = hash_stream(source)
                if not self._exists(sha256):
                    source.seek(0)
                    self._write(source, sha256, origin=str(path))
        except FileNotFoundError as error:
            raise NotFoundError(f"no file {path}") from error
        except IsADirectoryError as error:
            raise InputError(f"{path} is a folder, not a file", fix="use put_tree") from error
        return TreeFile(name or path.name, size, sha256)

    def _write(self, source: IO[bytes], sha256: str, *, origin: str) -> None:
        """Copy ``source`` to its object; it appears complete or not at all."""
        with self._storage_errors(f"writing {origin} to"):
            if self.local_root is not None:
                self._write_local(source, sha256, origin)
            else:
                self._write_remote(source, sha256, origin)

    def _write_local(self, source: IO[bytes], sha256: str, origin: str) -> None:
        assert self.local_root is not None
        target = Path(self._key(sha256))
        temporary = self.local_root / "tmp" / uuid.uuid4().hex
        temporary.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as sink:
                written = _copy_hashing(source, sink)
                _check_unchanged(written, sha256, origin)
                sink.flush()
                os.fsync(sink.fileno())
                os.fchmod(sink.fileno(), 0o444)  # versions share these bytes by hard links
            temporary.rename(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        fsync_directory(target.parent)

    def _write_remote(self, source: IO[bytes], sha256: str, origin: str) -> None:
        target = self._key(sha256)
        temporary = target if self._atomic else self._key_of("tmp", uuid.uuid4().hex)
        self._fs.makedirs(temporary.rpartition("/")[0], exist_ok=True)
        try:
            with self._fs.open(temporary, "wb") as sink:
                _check_unchanged(_copy_hashing(source, sink), sha256, origin)
            if temporary != target:
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._fs.mv(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                if self._fs.exists(temporary):
                    self._fs.rm_file(temporary)
            raise

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────

    def open(self, digest: str) -> BinaryIO:
        """Open an object for reading, after its bytes were found to match.

        Raises NotFoundError when the store does not have it and IntegrityError when it is damaged.
        """
        sha256 = parse_digest(digest)
        with self._storage_errors(f"reading {digest} from"), contextlib.ExitStack() as on_error:
            if self.local_root is not None:
                handle = on_error.enter_context(self._open_raw(sha256))
                found, _ = hash_stream(handle)
            else:
                handle = cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=64 << 20))  # noqa: SIM115
                on_error.callback(handle.close)
                with self._open_raw(sha256) as remote:
                    found = _copy_hashing(remote, handle)
            if found != sha256:
                raise self._damaged(sha256, found)
            handle.seek(0)
            on_error.pop_all()
            return handle

    def read_bytes(self, digest: str) -> bytes:
        """The verified content of an object."""
        with self.open(digest) as handle:
            return handle.read()

    def exists(self, digest: str) -> bool:
        """Whether the store has this object (without reading it)."""
        return self._exists(parse_digest(digest))

    def holds(self, sha256: str, path: Path) -> bool:
        """Whether ``path`` is the store's own file for the object, by a hard link."""
        if self.local_root is None:
            return False
        try:
            return path.samefile(self._key(sha256))
        except FileNotFoundError:
            return False

    def tree(self, digest: str) -> list[TreeFile]:
        """The files of a tree, sorted by path."""
        return decode_tree(self.read_bytes(digest), digest)

    def verify(self, digest: str) -> None:
        """Read an object, and where it is a tree all its files; raise IntegrityError for the first damage."""
        with self.open(digest) as handle:
            is_tree = handle.read(len(_TREE_PREFIX)) == _TREE_PREFIX
        if is_tree:
            try:
                files = self.tree(digest)
            except InputError:
                return  # a file that merely begins like a tree
            for file in files:
                self.open(f"sha256:{file.sha256}").close()

    def materialize(self, digest: str, dest_dir: Path | str) -> Path:
        """Write a tree out as ``dest_dir``, which must be absent or empty; it appears complete or not at all.

        Files are hard links into a local store on the same file system, else copies. Every byte is verified.
        """
        files = self.tree(digest)
        dest_dir = Path(dest_dir)
        with building_directory(dest_dir) as building:
            for file in files:
                target = building / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                self._place(file.sha256, target)
        return dest_dir

    def _place(self, sha256: str, target: Path) -> None:
        with self.open(f"sha256:{sha256}") as source:
            if self.local_root is not None:
                try:
                    os.link(self._key(sha256), target)
                    return
                except OSError as error:
                    if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                        raise
            with target.open("xb") as sink:
                shutil.copyfileobj(source, sink, CHUNK_BYTES)
                sink.flush()
                os.fsync(sink.fileno())

    # ── removing ─────────────────────────────────────────────────────────────────────────────────────────

    def remove(self, digest: str) -> None:
        """Remove one object; nothing happens when it is not there."""
        with self._storage_errors(f"removing {digest} from"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._key(parse_digest(digest)))

    def remove_stale_temporaries(self) -> None:
        """Remove what crashed writers left in ``tmp/``."""
        if self.local_root is None:
            return
        oldest = time.time() - _STALE_SECONDS
        for path in (self.local_root / "tmp").glob("*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────

    def _key(self, sha256: str) -> str:
        return self._key_of("sha256", sha256[:2], sha256[2:])

    def _key_of(self, *parts: str) -> str:
        return "/".join((self._root, *parts))

    def _exists(self, sha256: str) -> bool:
        return bool(self._fs.exists(self._key(sha256)))

    def _open_raw(self, sha256: str) -> BinaryIO:
        try:
            if self.local_root is not None:
                return Path(self._key(sha256)).open("rb")
            return cast(BinaryIO, self._fs.open(self._key(sha256), "rb"))
        except FileNotFoundError as error:
            raise NotFoundError(f"the artifact store {self.url} has no sha256:{sha256}") from error

    def _damaged(self, sha256: str, found: str) -> IntegrityError:
        return IntegrityError(
            f"artifact sha256:{sha256} is damaged: {self._key(sha256)} has the hash {found}",
            fix="delete that file and store the original again; every version that uses it is affected",
        )

    @contextmanager
    def _storage_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (StorageError, IntegrityError, InputError, ConflictError):
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StorageError(
                f"{doing} the artifact store {self.url} failed: {error.strerror or error}",
                fix="free some disk space; nothing half-written was kept" if full else None,
            ) from error


_TREE_PREFIX = b'{"files":['


def encode_tree(files: Iterable[TreeFile]) -> bytes:
    """The canonical bytes of a tree: the order in which files were found does not matter."""
    rows = [{"path": f.path, "sha256": f.sha256, "size": f.size} for f in sorted(files, key=lambda f: f.path)]
    return json.dumps(
        {"files": rows, "format": _TREE_FORMAT}, separators=(",", ":"), sort_keys=True, ensure_ascii=False
    ).encode()


def decode_tree(content: bytes, digest: str) -> list[TreeFile]:
    """Read a tree; raises InputError for other objects and IntegrityError for paths that leave the tree."""
    try:
        value = json.loads(content)
        if value["format"] != _TREE_FORMAT:
            raise ValueError(f"format {value['format']}")
        files = [TreeFile(row["path"], int(row["size"]), row["sha256"]) for row in value["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"artifact {digest} is a file, not a tree") from error
    for file in files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise IntegrityError(f"tree {digest} holds the unsafe path {file.path!r}")
    return files


def parse_digest(digest: str) -> str:
    """The hex part of ``sha256:…``."""
    algorithm, _, sha256 = digest.partition(":")
    if algorithm != "sha256" or len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise InputError(f"{digest!r} is not a digest", fix="a digest is sha256: and 64 hexadecimal digits")
    return sha256


def hash_stream(source: IO[bytes]) -> tuple[str, int]:
    """SHA-256 and number of bytes of what is left to read."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def hash_file(path: Path) -> tuple[str, int]:
    """SHA-256 and size of a file."""
    with path.open("rb") as source:
        return hash_stream(source)


def walk_files(directory: Path, exclude: Collection[str] = ()) -> list[tuple[str, Path]]:
    """(relative path, path) of every file below ``directory``, sorted.

    Raises NotFoundError without the directory, InputError for links to folders, special files and no files.
    """
    if not directory.is_dir():
        raise NotFoundError(f"no folder {directory}")
    found = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name in exclude or (path.is_dir() and not path.is_symlink()):
            continue
        if not path.is_file():
            what = "a link to a folder" if path.is_dir() else "no regular file"
            raise InputError(f"{path} is {what} and cannot be stored", fix="remove it or copy its content")
        found.append((name, path))
    if not found:
        raise InputError(f"the folder {directory} has no files")
    return found


@contextmanager
def building_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling of ``target``: takes its name when the block ends well, vanishes otherwise."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConflictError(f"{target} exists already", fix="give a new or empty folder")
    building = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        building.mkdir(parents=True)
        yield building
        if target.exists():
            target.rmdir()
        building.rename(target)
        fsync_directory(target.parent)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_atomically(path: Path, content: str) -> None:
    """Replace a text file: readers see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as sink:
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def fsync_directory(path: Path) -> None:
    """Make a rename in ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy_hashing(source: IO[bytes], sink: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        sink.write(chunk)
    return digest.hexdigest()


def _check_unchanged(written: str, expected: str, origin: str) -> None:
    if written != expected:
        raise ConflictError(f"{origin} changed while it was stored", fix="store it when nothing writes to it")
