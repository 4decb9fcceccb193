"""What OmegaConf found wrong with an interpolation, in words: OmegaConf's own speak of its classes."""

from __future__ import annotations

import re

from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    InterpolationToMissingValueError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)


def wrong_interpolation(error: OmegaConfBaseException, place: str = "") -> str:
    """`ADDRESS: what is wrong there. The way out.`; `place` is said behind the address."""
    said = (str(error).splitlines() or [""])[0]
    address = error.full_key or "config"
    if isinstance(error, InterpolationToMissingValueError) and (found := re.search(r"value: (\S+)", said)):
        return f"{found[1]}: missing. Set {found[1]}=… (it is needed by {address})."
    return f"{address}{place}: {_fact(error, said)}"


def _fact(error: OmegaConfBaseException, said: str) -> str:
    if isinstance(error, InterpolationKeyError) and (found := re.search(r"key '([^']*)'", said)):
        return f"the interpolation '${{{found[1]}}}' names nothing that the config has. Give the address of a value."
    if isinstance(error, UnsupportedInterpolationType):
        name = said.split()[-1]
        return f"there is no resolver '{name}' for '${{{name}:…}}'. Take one of OmegaConf's: oc.env, oc.select, …"
    if said.startswith("Recursive interpolation"):
        return "its interpolation leads back to itself. Give one of the values in the circle as it is."
    if isinstance(error, GrammarParseError) or said.startswith("GrammarParseError"):
        problem = said.rpartition("interpolation: ")[2].partition(" expecting ")[0]
        return f"an interpolation that cannot be read ({problem}). Write it as '${{address}}'."
    return f"{said.rpartition('while resolving interpolation: ')[2].strip(chr(34)).rstrip('.')}."
