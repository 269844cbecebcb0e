"""Files of a source: finding them in a sorted order, opening compressed ones, naming what is missing."""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from hearth.errors import DataError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def find_files(path: str) -> tuple[Path, list[Path]]:
    """Root and sorted files of a source path: a file, a folder (recursive) or a glob.

    Hidden files and folders are left out, unless the path itself names them. Raises DataError when there is
    nothing, naming the path and its nearest existing parent.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return given.parent, [given]
    if given.is_dir():
        files = [file for file in given.rglob("*") if _visible(file, given) and file.is_file()]
        if not files:
            raise DataError(f"folder {path} holds no files", fix="name a folder with text or JSONL files")
        return given, sorted(files, key=lambda file: file.relative_to(given).as_posix())
    if glob.has_magic(path):
        root = _glob_root(given)
        matches = [Path(match) for match in glob.glob(str(given), recursive=True)]  # noqa: PTH207 - Path.glob
        # cannot take an absolute pattern
        files = [file for file in matches if file.is_file()]
        if not files:
            raise DataError(
                f"no file matches {path} (the part without wildcards, {root}, "
                + ("exists)" if root.exists() else f"does not exist; {nearest_parent(root)} does)"),
                fix="check the pattern; ** matches any number of folders",
            )
        return root, sorted(files, key=lambda file: file.relative_to(root).as_posix())
    raise DataError(
        f"no such file or folder: {path}",
        fix=f"check the path; the nearest folder that exists is {nearest_parent(given)}",
    )


def nearest_parent(path: Path) -> Path:
    """The closest parent that exists."""
    return next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))


def _glob_root(path: Path) -> Path:
    parts = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts) if parts else Path()


def _visible(file: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(root).parts)


def plain_suffix(path: Path) -> str:
    """The suffix under a compression suffix: ``.jsonl`` for ``a.jsonl.gz``; lower case."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


@contextmanager
def open_binary(path: Path) -> Iterator[IO[bytes]]:
    """The uncompressed bytes of a file. Raises DataError when it cannot be read or is damaged."""
    try:
        with _opened(path) as stream:
            yield stream
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or not {path.suffix}: {error}", fix="fetch it again") from error
    except (PermissionError, FileNotFoundError) as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", fix="check that it is still there and its permissions"
        ) from error
    except OSError as error:
        if error.errno is None:  # bz2 reports invalid data this way
            raise DataError(
                f"{path} is damaged or not {path.suffix}: {error}", fix="fetch it again"
            ) from error
        raise


def _opened(path: Path) -> IO[bytes]:
    match path.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.open(path, "rb"))
        case ".bz2":
            return cast(IO[bytes], bz2.open(path, "rb"))
        case ".xz":
            return cast(IO[bytes], lzma.open(path, "rb"))
        case ".zst":
            return _open_zstd(path)
    return path.open("rb")


def _open_zstd(path: Path) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{path} is compressed with zstd, and the zstandard library is not installed",
            fix="pip install 'hearth-lm[zstd]'",
        ) from error
    return cast(IO[bytes], io.BufferedReader(_Zstd(zstandard, path), 1 << 20))


class _Zstd(io.RawIOBase):
    """zstandard's reader with its own error turned into EOFError, which ``open_binary`` explains."""

    def __init__(self, library: object, path: Path) -> None:
        super().__init__()
        self._library = library
        self._file = path.open("rb")
        self._reader = library.ZstdDecompressor().stream_reader(  # type: ignore[attr-defined]
            self._file, read_across_frames=True
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            return int(self._reader.readinto(buffer))
        except self._library.ZstdError as error:  # type: ignore[attr-defined]
            raise EOFError(str(error)) from error

    def close(self) -> None:
        self._file.close()
        super().close()


def sha256_file(path: Path) -> str:
    """sha256 of the file as it lies on the disk."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_sections(stream: IO[bytes], size: int) -> Iterator[tuple[int, bytes]]:
    """Cut a stream into sections of about ``size`` bytes: (offset, bytes).

    A cut comes after the last blank line of a section, else after its last line end, else between two
    characters of UTF-8; no byte is lost.
    """
    offset, rest = 0, b""
    while True:
        data = rest + stream.read(size - len(rest))
        if len(data) < size:
            if data:
                yield offset, data
            return
        cut = _cut(data)
        yield offset, data[:cut]
        offset, rest = offset + cut, data[cut:]


def _cut(data: bytes) -> int:
    for separator, earliest in ((b"\n\n", len(data) // 2), (b"\n", 0)):
        at = data.rfind(separator)
        if at > earliest:
            return at + len(separator)
    cut = len(data)
    while cut > len(data) - 4 and cut > 1 and data[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    # data[cut - 1] is now the lead byte of the last character, or plain ASCII.
    return cut - 1 if cut > 1 and data[cut - 1] >= 0xC0 else len(data)
