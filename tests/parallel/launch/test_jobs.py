"""Records of jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hearth.errors import ConflictError, NotFoundError, StorageError
from hearth.parallel.launch.jobs import JobStore
from hearth.parallel.launch.spec import JobSpec, Rendered


def spec(name: str, nodes: int = 1) -> JobSpec:
    return JobSpec(name, "r.yaml", "/w", nodes=nodes)


def test_jobs_are_found_again_by_their_name_or_its_beginning(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    assert store.list() == []
    first = store.create("slurm", spec("alpha-1"), Rendered({"a.sh": "x"}))
    store.create("slurm", spec("alpha-2"), Rendered())
    assert (first.dir / "rendered" / "a.sh").read_text() == "x"
    store.update(first, handle={"slurm_job": "7"}, state="running")
    found = store.get("alpha-1")
    assert (found.state, found.require_handle("slurm_job"), found.spec) == ("running", "7", spec("alpha-1"))
    assert [job.name for job in store.list()] == ["alpha-2", "alpha-1"]
    assert store.get("alpha-2") == store.get("alpha-2")
    with pytest.raises(NotFoundError, match="several jobs begin with 'alpha': alpha-2, alpha-1"):
        store.get("alpha")
    for wrong in ("", "beta", "../alpha-1", "alpha-1/../alpha-2"):
        with pytest.raises(NotFoundError, match="no job"):
            store.get(wrong)
    with pytest.raises(NotFoundError, match="alpha-2 was never submitted"):
        store.get("alpha-2").require_handle("slurm_job")


def test_a_name_is_taken_once_but_for_nodes_that_share_a_job(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    store.create("slurm", spec("a"), Rendered())
    with pytest.raises(ConflictError, match="there is a job a already"):
        store.create("slurm", spec("a"), Rendered())
    store.create("torchrun", spec("b", nodes=2), Rendered())
    job = store.create("torchrun", spec("b", nodes=2), Rendered())
    # Once it has ended its name is taken: a new job would go on with the run of the old one.
    store.update(job, state="failed")
    with pytest.raises(ConflictError, match="there is a job b already"):
        store.create("torchrun", spec("b", nodes=2), Rendered())


def test_of_two_launches_at_the_same_time_one_gets_the_name(tmp_path: Path) -> None:
    """The other one sees a folder, though no record is in it yet."""
    (tmp_path / "jobs" / "a").mkdir(parents=True)
    with pytest.raises(ConflictError, match=r"there is a job a already\n"):
        JobStore(tmp_path).create("slurm", spec("a"), Rendered())


def test_others_cannot_read_what_was_submitted(tmp_path: Path) -> None:
    job = JobStore(tmp_path).create("slurm", spec("a"), Rendered({"job.sbatch": "export HF_TOKEN=x"}))
    assert job.dir.stat().st_mode & 0o077 == 0


def test_a_broken_record_and_a_folder_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    job = store.create("local", spec("a"), Rendered())
    (job.dir / "job.json").write_text("{")
    with pytest.raises(StorageError, match=r"record of a job cannot be read: .*job\.json"):
        store.get("a")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write the job's folder"):
        JobStore(tmp_path / "file").create("local", spec("a"), Rendered())
