"""Numbers and sentences as a person reads them: durations, sizes, scores, and text that is safe to print."""

from __future__ import annotations

import math

PERCENT_METRICS = ("top1", "top5", "accuracy")
UNKNOWN = "-"
_STEPS = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s"))


def duration(seconds: float | None) -> str:
    """`seconds` in at most two units: "23 ms", "3.1 s", "42 s", "1 min 12 s", "2 h 5 min"; "-" for None."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds <= 0:
        return "0 s"
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    for unit, name, part, part_name in _STEPS:
        parts = round(seconds / part)
        if parts * part >= unit:
            whole, rest = divmod(parts, unit // part)
            return f"{whole} {name} {rest} {part_name}" if rest else f"{whole} {name}"
    return f"{seconds:.0f} s"


def latency(seconds: float | None) -> str:
    """Seconds of one run, to two digits at least: "0.16 ms", "4.1 ms", "1.2 s"; "-" for None."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    value, unit = (seconds, "s") if seconds >= 0.9995 else (seconds * 1000, "ms")
    return f"{value:.{0 if value >= 99.5 else 1 if value >= 0.995 else 2 if value >= 0.0995 else 3}f} {unit}"


def size(size_bytes: float | None) -> str:
    """`size_bytes` in decimal units: "812 B", "3.4 MB", "12 GB"; "-" for None."""
    if size_bytes is None or not math.isfinite(size_bytes):
        return UNKNOWN
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < (9.95 if unit != "B" else 999.5):
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        if value < 999.5:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} TB" if value < 9.95 else f"{value:.0f} TB"


def score(value: float | None, metric: str) -> str:
    """A score in its metric's unit: top1 and top5 (in [0, 1]) as "98.12 %", `sqnr_db` as "23.41 dB"."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if metric in PERCENT_METRICS:
        return f"{100 * value:.2f} %"
    if metric.endswith("_db"):
        return f"{value:.2f} dB"
    return _plain(value)


def change(drop: float | None, metric: str) -> str:
    """What a step gained or lost against float, signed: a drop of 0.012 in top1 is "-1.20"  (points)."""
    if drop is None or math.isnan(drop):
        return UNKNOWN
    if metric in PERCENT_METRICS:
        return _signed(f"{-100 * drop:+.2f}")
    if metric.endswith("_db"):
        return _signed(f"{-drop:+.2f}")
    return _signed(("+" if drop < 0 else "-") + _plain(abs(drop)))


def cost(value: float | None) -> str:
    """What running a model costs, as a share of float: "0.31"; "" for None."""
    return "" if value is None or not math.isfinite(value) else f"{value:.2f}" if value < 9.995 else f"{value:.0f}"


def amount(difference: float, metric: str) -> str:
    """The size of a difference of two scores, with its unit: "1.20 points", "3.00 dB", "0.0120"."""
    if metric in PERCENT_METRICS:
        return f"{100 * difference:.2f} points"
    return score(difference, metric)


def tick(value: float, metric: str, step: float) -> str:
    """A number at an axis whose numbers are `step` apart, with as many digits as that needs."""
    factor = 100 if metric in PERCENT_METRICS else 1
    digits = max(0, math.ceil(-math.log10(step * factor) - 1e-9)) if step > 0 else 2
    return _signed(f"{value * factor:.{min(digits, 6)}f}") + (" %" if factor == 100 else "")


def share(value: float) -> str:
    """A share in [0, 1] in per cent; never "100 %" for less than all, nor "0 %" for more than none."""
    if value in (0.0, 1.0):
        return f"{100 * value:.0f} %"
    digits = 2
    while digits < 6 and f"{100 * value:.{digits}f}" in (f"{100:.{digits}f}", f"{0:.{digits}f}"):
        digits += 1
    return f"{100 * value:.{digits}f} %"


def number(value: object) -> str:
    """Any JSON scalar, short: a float with four significant digits, everything else as it is."""
    if isinstance(value, float):
        return _plain(value)
    return clean(str(value))


def clean(text: object) -> str:
    """`text` on one line and without characters that would steer a terminal (control, bidirectional)."""
    text = str(text)
    if not text.isprintable():
        text = "".join(map(_visible, text))
    return " ".join(text.split())


def clean_lines(text: object) -> str:
    """As `clean`, with the line breaks and the indentation kept."""
    lines = str(text).expandtabs(4).splitlines()
    return "\n".join("".join(_visible(character) for character in line).rstrip() for line in lines)


def clip(text: str, width: int, ellipsis: str = "...") -> str:
    """`text`, cut to `width` characters with an ellipsis where it is longer."""
    if len(text) <= width:
        return text
    return text[: max(0, width - len(ellipsis))] + ellipsis[: max(0, width)]


def plural(count: int, noun: str) -> str:
    """ "1 node", "2 nodes"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _plain(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    magnitude = abs(value)
    if magnitude == 0 or 1e-3 <= magnitude < 1e3:
        return f"{value:.4f}"
    return f"{value:.4g}"


def _signed(text: str) -> str:
    """Without a sign where nothing but zeros remains after rounding."""
    return text if text.strip("+-0.") else text.lstrip("+-")


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\t\n\r\x0b\x0c\x85\u2028\u2029":
        return " "
    if code < 32 or 127 <= code < 160 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
        return "?"
    if 0xD800 <= code <= 0xDFFF:  # a lone surrogate (undecodable file name): no stream takes it
        return "?"
    return character
