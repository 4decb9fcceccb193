"""What a record says of the git checkout: held against git itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qpipe.run.checkout import Checkout, commit
from tests.inprocess import carry_out, job
from tests.toy import Toy


def git(folder: Path, *words: str) -> str:
    said = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *said, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "a.txt").write_text("a")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    return folder


def packed(folder: Path) -> Path:
    git(folder, "pack-refs", "--all")
    return folder


def detached(folder: Path) -> Path:
    git(folder, "checkout", "-q", "--detach")
    return folder


def worktree(folder: Path) -> Path:
    git(folder, "worktree", "add", "-q", "../other", "-b", "feature/x")
    return folder.parent / "other"


def below(folder: Path) -> Path:
    (folder / "sub" / "sub").mkdir(parents=True)
    return folder / "sub" / "sub"


@pytest.mark.parametrize("place", [lambda folder: folder, packed, detached, worktree, below])
def test_the_commit_is_the_one_that_git_tells(repository: Path, place) -> None:
    folder = place(repository)
    assert commit(folder) == git(folder, "rev-parse", "HEAD")


def test_where_there_is_no_commit_nothing_is_said(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert commit(tmp_path) is None
    (tmp_path / ".git" / "HEAD").write_bytes(b"\xff\xfe")
    checkout = Checkout(tmp_path)
    checkout.ask()
    assert checkout.found() is None


def test_a_tree_is_dirty_when_a_tracked_file_changed(repository: Path) -> None:
    def dirty() -> object:
        checkout = Checkout(repository)
        checkout.ask()
        found = checkout.found()
        assert found is not None
        return found["dirty"]

    assert dirty() is False
    (repository / "outputs.txt").write_text("a run's own files are not tracked")
    assert dirty() is False
    (repository / "a.txt").write_text("b")
    assert dirty() is True


def test_a_record_has_the_commit_and_where_something_ran_whether_the_tree_was_dirty(
    repository: Path, toy_stages: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    (repository / "a.txt").write_text("b")
    one = job(repository.parent, {"a": {"uses": "toy_number", "value": 1}})
    head = git(repository, "rev-parse", "HEAD")
    (cold,) = carry_out(one)[1].records
    (warm,) = carry_out(one)[1].records
    assert cold["git"] == {"commit": head, "dirty": True}
    assert warm["git"] == {"commit": head}
    git(repository, "commit", "-qam", "two")
    (later,) = carry_out(one)[1].records
    assert later["nodes"]["a"]["key"] == cold["nodes"]["a"]["key"]
    assert later["nodes"]["a"]["verdict"] == "hit"
    monkeypatch.chdir(repository.parent)
    (outside,) = carry_out(one)[1].records
    assert "git" not in outside
