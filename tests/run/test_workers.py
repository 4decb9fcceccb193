"""Workers end with their owner, however it went."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("read", [True, False])
def test_a_worker_ends_with_its_owner_whether_or_not_its_words_were_read(tmp_path: Path, read: bool) -> None:
    ours, theirs = socket.socketpair()
    command = [
        sys.executable,
        "-m",
        "qpipe.run.workers",
        json.dumps({"root": str(tmp_path)}),
        "1",
        str(theirs.fileno()),
    ]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True) as process:
        theirs.close()
        ours.sendall(b'{"stage": "none"}\n')
        assert select.select([ours], [], [], 60)[0], "it says nothing"
        if read:
            assert b'"event": "failed"' in ours.recv(1 << 20)
        ours.close()
        try:
            assert process.wait(20) == 1
        finally:
            process.kill()
