"""The Hydra and the OmegaConf that qpipe composes with: looked up before they are imported, for another one may fail in
any way, or compose something else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution

NEEDED: Mapping[str, str] = {"hydra-core": ">=1.3.2,<1.4", "omegaconf": ">=2.3,<2.4"}
"""As in pyproject.toml: a test compares them."""


def refusal(needed: Mapping[str, str] = NEEDED) -> str | None:
    """The sentence that says what is installed and what to install instead; None where all that is installed fits."""
    wrong = [
        f"{name} {found}" for name in needed if (found := _installed(name)) and not fits(found, needed[name])
    ]
    if not wrong:
        return None
    wanted = [f"{name}{bounds}" for name, bounds in needed.items()]
    verb = "is" if len(wrong) == 1 else "are"
    install = " ".join(f"'{each}'" for each in wanted)
    return (
        f"{' and '.join(wrong)} {verb} installed; qpipe needs {' and '.join(wanted)}: pip install {install}"
    )


def _installed(name: str) -> str | None:
    """The version; None where nothing says it: the import will tell what there is."""
    try:
        about = distribution(name).read_text("METADATA") or ""  # `version` would parse all of it: 2 ms of each run
    except PackageNotFoundError:
        return None
    said = re.search(r"^Version: *(\S+)", about, re.MULTILINE)
    return said[1] if said else None


def fits(found: str, bounds: str) -> bool:
    """Whether a version lies in ">=A,<B". A pre-release counts as its release: 1.4.0rc1 is not below 1.4."""
    low, high = bounds.removeprefix(">=").split(",<")
    return _release(low) <= _release(found) < _release(high)


def _release(text: str) -> tuple[int, ...]:
    """(1, 4) for "1.4.0rc1": the numbers it begins with, without zeros at the end."""
    digits = re.match(r"[\d.]*", text)
    numbers = [int(each) for each in (digits[0] if digits else "").split(".") if each]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
