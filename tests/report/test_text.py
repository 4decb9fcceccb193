from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpipe.report import text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"), (math.nan, "-"), (0.0, "0 s"), (0.0234, "23 ms"), (0.099, "99 ms"), (0.0999, "0.1 s"),
        (3.14, "3.1 s"),
        (9.94, "9.9 s"), (9.96, "10 s"), (42.4, "42 s"), (59.4, "59 s"), (59.7, "1 min"), (72, "1 min 12 s"),
        (3599.6, "1 h"), (7500, "2 h 5 min"), (86_399, "1 d"), (100_000, "1 d 4 h"),
    ],
)  # fmt: skip
def test_durations_have_at_most_two_units(seconds: float | None, shown: str) -> None:
    assert text.duration(seconds) == shown


@given(st.floats(0, 1e8))
def test_no_duration_shows_a_full_smaller_unit(seconds: float) -> None:
    shown = text.duration(seconds).split()
    amounts = {unit: float(amount) for amount, unit in zip(shown[::2], shown[1::2], strict=True)}
    assert amounts.get("s", 0) < 60
    assert amounts.get("min", 0) < 60
    assert amounts.get("h", 0) < 24


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (None, "-"), (0, "0 B"), (812, "812 B"), (999.6, "1.0 kB"), (3_400_000, "3.4 MB"), (12.4e9, "12 GB"),
        (5e12, "5.0 TB"),
    ],
)  # fmt: skip
def test_sizes_are_decimal(size_bytes: float | None, shown: str) -> None:
    assert text.size(size_bytes) == shown


def test_scores_are_shown_in_the_unit_of_their_metric() -> None:
    assert text.score(0.98123, "top1") == "98.12 %"
    assert text.score(23.413, "sqnr_db") == "23.41 dB"
    assert text.score(-0.00002, "mse") == "-2e-05"
    assert text.score(0.5, "my_pkg.metrics:f1") == "0.5000"
    assert text.score(None, "top1") == "-"


def test_a_drop_is_shown_as_a_signed_change() -> None:
    assert text.change(0.012, "top1") == "-1.20"
    assert text.change(-0.001, "top5") == "+0.10"
    assert text.change(0.000001, "top1") == "0.00"
    assert text.change(2.5, "sqnr_db") == "-2.50"
    assert text.change(-0.25, "f1") == "+0.2500"


def test_a_share_is_never_rounded_to_all_or_nothing() -> None:
    assert text.share(1.0) == "100 %"
    assert text.share(0.0) == "0 %"
    assert text.share(0.9999) == "99.99 %"
    assert text.share(0.99999) == "99.999 %"
    assert text.share(0.00001) == "0.001 %"


@pytest.mark.parametrize(("step", "shown"), [(0.2, "80 %"), (0.005, "80.0 %"), (0.0005, "80.00 %")])
def test_an_axis_number_has_the_digits_that_its_step_needs(step: float, shown: str) -> None:
    assert text.tick(0.8, "top1", step) == shown


@given(st.text())
def test_clean_text_is_one_printable_line_and_stays_so(raw: str) -> None:
    cleaned = text.clean(raw)
    assert text.clean(cleaned) == cleaned
    assert "\n" not in cleaned
    assert "\x1b" not in cleaned
    cleaned.encode("utf-8")


def test_characters_that_steer_a_terminal_become_visible() -> None:
    assert text.clean("a\x1b[31mred\x07 b\u202ec\nd") == "a?[31mred? b?c d"
    assert text.clean_lines("a\n\tb\x1b[2J\r\n") == "a\n    b?[2J"


def test_long_text_is_cut_with_an_ellipsis() -> None:
    assert text.clip("abcdefgh", 8) == "abcdefgh"
    assert text.clip("abcdefghi", 8) == "abcde..."
    assert text.clip("abc", 2) == ".."
