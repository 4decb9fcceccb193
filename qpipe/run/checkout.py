"""The git checkout of the working directory, for the record: which commit, and whether the tree was dirty.

The commit is read from git's own files, in a fraction of a millisecond, so every record has it. What is dirty only git
can tell, and it looks at every tracked file: it is asked where something ran, at the beginning, beside the run, which
does not wait for it. No key holds either of them: what a result was made of is in its ingredients.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

_NAMED = "ref: "
_WAIT_S = 2.0
"""So long a run that is over waits for git's answer."""


class Checkout:
    """What a record says of the checkout that a folder is in: `commit`, and `dirty` where git was asked in time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._commit = commit(folder)
        self._asked: subprocess.Popen[bytes] | None = None

    def ask(self) -> None:
        """Let git look at the tracked files, meanwhile."""
        if self._commit is None or self._asked is not None:
            return
        import subprocess  # only where something runs

        words = ["git", "--no-optional-locks", "status", "--porcelain", "--untracked-files=no"]
        with suppress(OSError):  # no git: then the commit alone
            self._asked = subprocess.Popen(
                words, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )

    def found(self) -> dict[str, Any] | None:
        """{"commit": …, "dirty": …}; None outside of a checkout."""
        if self._commit is None:
            return None
        if self._asked is None:
            return {"commit": self._commit}
        from subprocess import TimeoutExpired

        try:
            said, _ = self._asked.communicate(timeout=_WAIT_S)
        except TimeoutExpired:
            self._asked.kill()
            self._asked.communicate()
            return {"commit": self._commit}
        if self._asked.returncode:
            return {"commit": self._commit}
        return {"commit": self._commit, "dirty": bool(said.strip())}


def commit(folder: Path) -> str | None:
    """The commit that is checked out in `folder` or above it; None where git's files do not tell."""
    try:
        for place in (folder, *folder.parents):
            if (found := place / ".git").exists():
                return _head(_git_folder(found))
    except (OSError, UnicodeDecodeError):
        return None
    return None


def _git_folder(found: Path) -> Path:
    """`.git` itself, or what the file of that name points to in a worktree or a submodule."""
    if found.is_dir():
        return found
    return found.parent / found.read_text().removeprefix("gitdir:").strip()


def _head(folder: Path) -> str | None:
    head = (folder / "HEAD").read_text().strip()
    if not head.startswith(_NAMED):
        return _commit_in(head)
    named = head.removeprefix(_NAMED)
    pointer = folder / "commondir"
    common = folder / pointer.read_text().strip() if pointer.is_file() else folder
    for place in (folder, common):
        if (loose := place / named).is_file():
            return _commit_in(loose.read_text().strip())
    packed = common / "packed-refs"
    for line in packed.read_text().splitlines() if packed.is_file() else ():
        made, _, name = line.partition(" ")
        if name == named:
            return _commit_in(made)
    return None


def _commit_in(text: str) -> str | None:
    return text if len(text) in (40, 64) and not set(text) - set("0123456789abcdef") else None
