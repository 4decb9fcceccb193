"""A disk that is full under the run folder: one line, no half files, and the other trials have their records."""

from __future__ import annotations

import errno
import io
import os
import pwd
import resource
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qpipe.cache.store import Store
from qpipe.errors import ConfigError
from qpipe.run.stores import open_local_store
from qpipe.run.sweep import run_jobs
from qpipe.run.swept import Swept
from tests.inprocess import Quiet, job
from tests.toy import Toy

STAGES = {
    "a": {"uses": "toy_number", "value": 1},
    "f": {"uses": "toy_files", "scores": "a"},
    "g": {"uses": "toy_files", "scores": "a"},
}
WHOLE = {"config.yaml", "record.json", "f/score.txt", "g/score.txt"}


class FullDisk:
    """Lets files below `root` grow by `room` bytes in all; then the disk is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, room: int) -> None:
        self.room = room
        plain, disk = Path.open, self

        class File(io.FileIO):
            def write(self, content: Any) -> int:
                disk.room -= len(memoryview(content).cast("B"))
                if disk.room < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(content)

        def open_(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if path.is_relative_to(root) and mode == "xb":
                return File(path, "xb")
            return plain(path, mode, *rest, **more)

        monkeypatch.setattr(Path, "open", open_)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_every_trial_is_whole_or_left_nothing_and_says_so_in_one_line(
    toy_stages: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, refused = 0, 0
    while True:
        place = tmp_path / str(room)
        jobs = [job(place, STAGES, name, cache={"dir": str(tmp_path / "cache")}) for name in ("one", "two")]
        swept = Swept(place)
        jobs = [replace(each, number=number, swept=swept) for number, each in enumerate(jobs)]
        watch = Quiet()
        with monkeypatch.context() as patch, Store(tmp_path / "cache") as store:
            FullDisk(patch, place / "one", room)
            status = run_jobs(jobs, store, watch, ["qpipe"])
        assert files_below(place / "two") == WHOLE
        assert (place / "sweep.json").exists()
        found = files_below(place / "one")
        if status == 0:
            assert found == WHOLE
            assert len(watch.records) == 2
            break
        refused += 1
        assert status == 1
        assert found == set()
        assert not [path for path in (place / "one").rglob("*") if path.name in "fg"]
        assert len(watch.records) == 1
        (line,) = watch.messages
        assert "\n" not in line
        assert "No space left on device" in line
        assert "No record of the run was left" in line
        room += 150
    assert refused > 8  # in each of the files


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["run", "sweep"])
def test_a_disk_that_is_full_before_anything_begins_is_one_line_and_nothing_is_left(
    toy: Toy, sweep: list[str]
) -> None:
    toy.pipeline(STAGES)

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))

    words = toy.command("run", *sweep, "run.workers=0")
    done = subprocess.run(
        words, env=toy.environment, cwd=toy.folder, capture_output=True, text=True, preexec_fn=small_files
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("qpipe: the folder of the run cannot be made (File too large).")
    assert not (toy.folder / "outputs").exists()


def test_without_a_home_folder_the_line_names_cache_dir(
    toy_stages: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "QPIPE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for folder in (None, "~/cache"):
        with pytest.raises(ConfigError, match=r"^cache\.dir: .* no home folder is known\. Set cache\.dir=FOLDER"):
            open_local_store(job(tmp_path, STAGES, cache={"dir": folder}).spec)


@pytest.mark.parametrize("place", ["", "leases", "blobs", "tmp"])
def test_a_remote_that_is_no_folder_is_told_with_its_reason_and_waited_for_by_nobody(
    toy: Toy, tmp_path: Path, place: str
) -> None:
    share = tmp_path / "share"
    file = share / place
    file.parent.mkdir(exist_ok=True)
    file.write_text("a file, where a folder is expected")
    toy.pipeline(STAGES)
    done = toy.run("run", "run.workers=0", f"cache.remote={share}", timeout=60)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "from here on the local cache alone is used" in line]
    assert line.startswith(f"The remote cache {share} cannot be used ([Errno 20] ")
