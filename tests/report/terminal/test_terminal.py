from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qpipe.report.terminal.activity import Activity
from qpipe.report.terminal.terminal import Row, Terminal, plan_lines, time_left_s

PLAN = (
    Row("load_model", "load_model", "hit"),
    Row("adaround", "adaround", "run", ("param iterations: 1000, was 10000",), 40.0),
    Row("score", "evaluate", "wait", ("model comes from adaround",), 2.0),
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shown(clock: Clock) -> tuple[Terminal, Callable[[], str]]:
    """A terminal in plain mode, and what it has written since it was last asked."""
    stream = io.StringIO()

    def new() -> str:
        written = stream.getvalue()
        stream.seek(0)
        stream.truncate()
        return written

    return Terminal(stream, live=False, clock=clock), new


def test_the_plan_has_a_line_per_node_with_its_reason() -> None:
    assert [line for line, _ in plan_lines(PLAN, 100, 42.0)] == [
        "3 nodes: 1 cached, 1 to run, 1 waiting for their inputs; about 42 s",
        "  hit   load_model",
        "  run   adaround               ~ 40 s  param iterations: 1000, was 10000",
        "  wait  score       evaluate  ~ 2.0 s  model comes from adaround",
    ]


def test_a_plan_of_hits_is_one_line() -> None:
    rows = [Row(f"n{i}", "cle", "hit") for i in range(12)]
    assert [line for line, _ in plan_lines(rows, 80, None)] == ["12 nodes, all cached"]


def test_what_is_asked_for_lazily_is_named_apart() -> None:
    lazy = [Row("amp", "amp", "not_needed"), Row("score_amp", "evaluate", "not_needed")]
    assert [line for line, _ in plan_lines([*PLAN, *lazy], 100, None)][
        -1
    ] == "  only if needed: amp, score_amp"
    assert [line for line, _ in plan_lines([PLAN[0], *lazy], 100, None)] == ["1 node, all cached"]


def test_a_long_plan_lists_what_runs_and_counts_the_rest() -> None:
    rows = [Row(f"n{i}", "cle", "hit") for i in range(900)] + [Row(f"m{i}", "cle", "run") for i in range(100)]
    lines = [line for line, _ in plan_lines(rows, 80, None)]
    assert lines[0] == "1000 nodes: 900 cached, 100 to run"
    assert len(lines) == 62
    assert lines[-1] == "  and 40 more"


def test_a_log_is_not_flooded_with_progress(shown: tuple[Terminal, Callable[[], str]], clock: Clock) -> None:
    terminal, new = shown
    terminal.started("adaround", "adaround")
    assert new() == "start   adaround\n"
    for second in range(25):
        clock.now = 100.0 + second
        terminal.progress("adaround", second, 50, f"layer {second}")
    assert new().splitlines() == [
        "        adaround: 10 of 50, layer 10; time left ~ 40 s",
        "        adaround: 20 of 50, layer 20; time left ~ 30 s",
    ]


def test_what_ends_is_said_once_with_its_notes(shown: tuple[Terminal, Callable[[], str]]) -> None:
    terminal, new = shown
    terminal.planned(PLAN)
    new()
    terminal.finished("load_model", "hit", 0.0, ())
    terminal.finished("later", "not_needed", 0.0, ())
    assert new() == ""
    terminal.finished("adaround", "ran", 41.2, ["Layer 'head' kept."])
    terminal.finished("score", "hit", 0.0, ())
    terminal.failed("amp", "The worker was killed.\nLower batch_size.")
    terminal.message("The cache is locked; the run goes on.")
    assert new().splitlines() == [
        "ran     adaround  41 s", "        Layer 'head' kept.", "hit     score",
        "failed  amp: The worker was killed.",
        "        Lower batch_size.", "The cache is locked; the run goes on.",
    ]  # fmt: skip


def test_quiet_shows_failures_alone() -> None:
    stream = io.StringIO()
    with Terminal(stream, live=False, quiet=True) as terminal:
        terminal.planned(PLAN)
        terminal.started("adaround", "adaround")
        terminal.progress("adaround", 1, 2, "")
        terminal.finished("adaround", "ran", 1.0, ("note",))
        terminal.message("hello")
        terminal.failed("score", "no labels")
    assert stream.getvalue() == "failed  score: no labels\n"


@pytest.mark.parametrize(
    ("running", "left"),
    [
        ({}, 42.0),
        ({"adaround": Activity("adaround", begun=90.0, expected_s=40.0)}, 32.0),  # 30 and 2 to come
        (
            {"adaround": Activity("adaround", begun=90.0, expected_s=40.0, done=5, total=10)},
            12.0,
        ),  # its pace counts
        ({"adaround": Activity("adaround", begun=0.0, expected_s=40.0)}, 2.0),  # overdue is not negative
        ({"adaround": Activity("adaround", 90.0, 40.0), "score": Activity("evaluate", 100.0, 2.0)}, 30.0),
    ],
)
def test_time_left_comes_from_progress_or_from_earlier_runs(
    running: dict[str, Activity], left: float
) -> None:
    assert time_left_s({"adaround": 40.0, "score": 2.0}, running, now=100.0) == left


def test_no_time_left_is_claimed_where_nothing_is_known() -> None:
    assert time_left_s({"a": None, "b": None}, {}, 0.0) is None


def test_a_stream_of_another_encoding_is_no_reason_to_fail() -> None:
    raw = io.BytesIO()
    terminal = Terminal(io.TextIOWrapper(raw, encoding="ascii"), live=False)
    terminal.message("2 × 3 – grün")
    assert raw.getvalue() == b"2 ? 3 ? gr?n\n"


def test_a_closed_stream_is_no_reason_to_fail() -> None:
    stream = io.StringIO()
    terminal = Terminal(stream, live=False)
    stream.close()
    terminal.message("nobody hears it")


def test_the_closing_table_goes_where_asked(record: dict[str, Any]) -> None:
    progress, result = io.StringIO(), io.StringIO()
    Terminal(progress, live=False).show(record, result)
    assert progress.getvalue() == ""
    assert "goal met" in result.getvalue()


LIVE = """
import sys, time
from qpipe.report.terminal.terminal import Row, Terminal
terminal = Terminal(sys.stdout)
terminal.planned([Row("adaround", "adaround", "run", ("never computed before",), 40.0)])
terminal.started("adaround", "adaround")
for step in range(int(sys.argv[1])):
    terminal.progress("adaround", step, 1000, "[red]conv")
    if step == 5:
        terminal.message("ready for the interrupt")
    time.sleep(0.02)
terminal.finished("adaround", "ran", 1.0, ())
terminal.close()
"""


def run_in_a_terminal(steps: int, interrupt: bool) -> str:
    """What a terminal receives from a live run of LIVE."""
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE, str(steps)], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
        env=environment | {"TERM": "xterm-256color", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(theirs)
    received = ""
    for chunk in _chunks(ours):
        received += chunk
        if interrupt and "ready for the interrupt" in received:
            process.send_signal(signal.SIGINT)
            interrupt = False
    process.wait(timeout=60)
    os.close(ours)
    return received


def _chunks(descriptor: int) -> Iterator[str]:
    while True:
        try:
            chunk = os.read(descriptor, 65_536)
        except OSError:  # Linux: the other side is closed
            return
        if not chunk:
            return
        yield chunk.decode(errors="replace")


def test_live_bars_show_progress_and_markup_is_only_text() -> None:
    received = run_in_a_terminal(steps=30, interrupt=False)
    assert "of 1000" in received
    assert "[red]conv" in received
    assert "0 of 1 node" in received
    assert "ran     adaround  1.0 s" in received


def test_an_interrupt_gives_the_cursor_back() -> None:
    received = run_in_a_terminal(steps=100_000, interrupt=True)
    hidden, restored = received.rfind("\x1b[?25l"), received.rfind("\x1b[?25h")
    assert hidden != -1
    assert restored > hidden


def test_a_run_of_hits_imports_no_rich() -> None:
    code = """
import io, sys
from qpipe.report.terminal.terminal import Row, Terminal
from qpipe.report.page.html import write_report
terminal = Terminal(io.StringIO(), live=True)
terminal.planned([Row("a", "cle", "hit")]); terminal.finished("a", "hit", 0.0, ()); terminal.show({})
heavy = {"rich", "matplotlib", "numpy", "torch", "onnx", "onnxruntime", "networkx", "omegaconf"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
ours = {name for name in sys.modules if name.startswith("qpipe.")}
print(sorted(name for name in ours if not name.startswith("qpipe.report")))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["[]", "['qpipe.errors', 'qpipe.writing']"]  # the words it writes its page with
