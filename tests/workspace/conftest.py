"""A private Postgres, workspaces on both databases, small model directories, and child processes."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from hearth.workspace import Workspace

CHILDREN = Path(__file__).with_name("children.py")


def _as_postgres() -> str | None:
    """The server refuses to run as root; the system's own user for it serves then."""
    return "postgres" if os.getuid() == 0 else None


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A Postgres of our own behind a Unix socket; yields the URL of its maintenance database."""
    missing = [tool for tool in ("initdb", "postgres") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no Postgres here: {' and '.join(missing)} not on PATH")
    folder = Path(tempfile.mkdtemp(prefix="hearth-pg-"))  # a socket's path must be short
    user = _as_postgres()
    name = user or getpass.getuser()
    try:
        if user is not None:
            shutil.chown(folder, user)
        data = folder / "data"
        make = ["initdb", "-D", str(data), "-U", name, "--auth=trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(make, user=user, check=True, capture_output=True, cwd=folder)
        options = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", f"unix_socket_directories={folder}"]
        server = subprocess.Popen(
            ["postgres", "-D", str(data), *options],
            user=user,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"postgresql+psycopg://{name}@/postgres?host={folder}"
            _wait_until_it_answers(url, server)
            yield url
        finally:
            server.terminate()
            server.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_answers(url: str, server: subprocess.Popen[bytes]) -> None:
    engine = sa.create_engine(url)
    try:
        for _ in range(300):
            assert server.poll() is None, "postgres ended"
            try:
                engine.connect().close()
            except sa.exc.OperationalError:
                time.sleep(0.1)
            else:
                return
        pytest.fail("postgres does not answer")
    finally:
        engine.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database: each test runs on SQLite and on Postgres."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'workspace' / 'hearth.db'}"
    server: str = request.getfixturevalue("postgres_server")
    name = f"t{uuid.uuid4().hex[:12]}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.replace("/postgres?", f"/{name}?")


@pytest.fixture
def open_workspace(tmp_path: Path, database_url: str) -> Iterator[Callable[[], Workspace]]:
    """Open the test's workspace, as often as one likes."""
    opened: list[Workspace] = []

    def open_it() -> Workspace:
        opened.append(Workspace.open(tmp_path / "workspace", database_url=database_url, environ={}))
        return opened[-1]

    yield open_it
    for workspace in opened:
        workspace.close()


@pytest.fixture
def workspace(open_workspace: Callable[[], Workspace]) -> Workspace:
    """The test's workspace."""
    return open_workspace()


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a small directory that looks like a Hugging Face model."""

    def make(content: str = "weights", **files: str) -> Path:
        folder = tmp_path / "sources" / uuid.uuid4().hex[:8]
        folder.mkdir(parents=True)
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_text(content)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)
        return folder

    return make


@pytest.fixture
def child(tmp_path: Path, database_url: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a function of children.py in a process of its own, on the same workspace."""
    started: list[subprocess.Popen[str]] = []

    def start(command: str, *arguments: object) -> subprocess.Popen[str]:
        words = [
            sys.executable,
            "-W",
            "error",
            str(CHILDREN),
            str(tmp_path / "workspace"),
            database_url,
            command,
        ]
        process = subprocess.Popen(
            [*words, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def outcome() -> Callable[[subprocess.Popen[str]], str]:
    """Wait for a child and return what it printed."""

    def wait(process: subprocess.Popen[str]) -> str:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return out

    return wait
