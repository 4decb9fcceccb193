"""What changed between the ingredients of two keys, value by value.

A digest among the ingredients stands for something longer (the modules of the code, the files of a path): where both
sides kept a listing of it, the parts that differ are named.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

LISTED = 2000
"""A listing of more parts than this is not kept: it would outgrow the result that it explains."""

NAMED = 6
"""So many parts of a listing are named; of the others, their number."""

Part = tuple[str, str, str]
Group = Literal["format", "stage", "version", "function", "code", "library", "param", "input"]
Listings = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Change:
    """One ingredient that differs: its group, its name there ("" where the group has one only), its two values as
    JSON, and in `parts` what differs behind two digests: (what, before, after), "-" for what is not there."""

    group: Group
    name: str
    before: Any
    after: Any
    parts: tuple[Part, ...] = ()

    @property
    def label(self) -> str:
        """ "param headroom", "input model", "code"."""
        return f"{self.group} {self.name}".strip()

    @property
    def sentence(self) -> str:
        """ "param headroom: 8 -> 4", "code changed: module qpipe.stages.cle", "input model changed"."""
        if self.group == "input":
            return f"input '{self.name}' changed"
        if self.group == "code" or _kind(self.before) or _kind(self.after):
            what = _kind(self.after) or _kind(self.before)
            said = f"{self.label}: its {what} changed" if what else "code changed"
            return f"{said}: {', '.join(map(_said, self.parts))}" if self.parts else said
        return f"{self.label}: {short(self.before)} -> {short(self.after)}"


def changes(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    before_listings: Listings | None = None,
    after_listings: Listings | None = None,
) -> list[Change]:
    """Every ingredient that differs; [] for two that make the same key.

    A port whose value in `after` is None is not known yet, and counts as changed.
    """
    listings = (before_listings or {}, after_listings or {})
    found: list[Change] = []
    for name in ("format", "stage", "version", "function"):
        if before.get(name) != after.get(name):
            found.append(Change(name, "", before.get(name), after.get(name)))
    old, new = before.get("code"), after.get("code")
    if old != new:
        found.append(Change("code", "", old, new, _parts(old, new, listings, "module ")))
    for name, left, right in _pairs(before.get("libraries", {}), after.get("libraries", {})):
        found.append(Change("library", name, left, right))
    for name, left, right in _pairs(before.get("params", {}), after.get("params", {})):
        found += _in_param(name, left, right, listings)
    for name, left, right in _pairs(before.get("ports", {}), after.get("ports", {})):
        found.append(Change("input", name, left, right))
    return found


def differences(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    before_listings: Listings | None = None,
    after_listings: Listings | None = None,
) -> list[str]:
    """The same, a sentence each."""
    return [change.sentence for change in changes(before, after, before_listings, after_listings)]


def listing(parts: Mapping[str, str | None]) -> str:
    """`parts`, {name: digest}, as text; "" where there are too many.

    Lines as `b3sum` writes them, but shorter: 16 digits tell two versions of one file apart. Text, because a plan
    reads thousands of results, and a string costs a JSON reader less than a mapping.
    """
    if len(parts) > LISTED:
        return ""
    lines = []
    for name, part in sorted(parts.items()):
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n").encode("utf-8", "backslashreplace").decode()
        lines.append(f"{part[:16] if part is not None else '-'}  {escaped}")
    return "\n".join(lines)


def digests_in(ingredients: Mapping[str, Any]) -> list[str]:
    """The digests that stand for something longer: the code, and in the params contents of paths, code of factories."""
    found = [ingredients["code"]]
    stack = [*ingredients["params"].values()]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            found += [value[name] for name in ("content", "code") if isinstance(value.get(name), str)]
            stack += value.values()
        elif isinstance(value, list):
            stack += value
    return found


def short(value: Any) -> str:
    """A JSON value in at most 60 characters; a digest in 12."""
    if isinstance(value, Mapping) and (what := _kind(value)):
        return f"{what} {str(value[what])[:12]}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*before, *after}):
        left, right = before.get(name), after.get(name)
        if left != right or (right is None and name in after and name not in before):
            yield name, left, right


def _in_param(name: str, left: Any, right: Any, listings: tuple[Listings, Listings]) -> list[Change]:
    """The leaves that differ; what stands for a path or a factory is one leaf."""
    what = _kind(left) or _kind(right)
    if what:
        old, new = ((side or {}).get(what) if isinstance(side, Mapping) else None for side in (left, right))
        parts = _parts(old, new, listings, "module " if what == "code" else "file ")
        functions = [str(side.get("function")) for side in (left, right) if isinstance(side, Mapping)]
        if what == "code" and len(set(functions)) > 1:
            parts = (("function", functions[0], functions[-1]), *parts)
        return [Change("param", name, left, right, parts)]
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        found = []
        for inner, old, new in _pairs(left, right):
            found += _in_param(f"{name}.{inner}", old, new, listings)
        return found
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right) and _nested(left):
        return [
            change
            for i, (old, new) in enumerate(zip(left, right, strict=True))
            if old != new
            for change in _in_param(f"{name}[{i}]", old, new, listings)
        ]
    return [Change("param", name, left, right)]


def _nested(values: list[Any]) -> bool:
    return any(isinstance(value, Mapping | list) for value in values)


def _kind(value: Any) -> str:
    """ "content" for what stands for a path, "code" for a factory, "" for any other value."""
    if isinstance(value, Mapping):
        if set(value) == {"content"}:
            return "content"
        if set(value) == {"function", "code"}:
            return "code"
    return ""


def _parts(
    before: str | None, after: str | None, listings: tuple[Listings, Listings], label: str
) -> tuple[Part, ...]:
    """What differs between two listings, named; () where one of them is not there."""
    texts = (listings[0].get(before or ""), listings[1].get(after or ""))
    if not texts[0] or not texts[1]:
        return ()
    old, new = (_read(text) for text in texts if text)
    found: list[Part] = []
    for name, left, right in _pairs(old, new):
        what = name if name.startswith("library ") else f"{label}{name}"
        found.append((what, (left or "-")[:12], (right or "-")[:12]))
    if len(found) > NAMED:
        found = [*found[:NAMED], (f"and {len(found) - NAMED} more", "", "")]
    return tuple(found)


def _said(part: Part) -> str:
    what, before, after = part
    if before == "-" or after == "-":
        return f"{what} {'added' if before == '-' else 'removed'}"
    return f"{what} ({before} -> {after})" if what == "function" or what.startswith("library ") else what


def _read(text: str) -> dict[str, str]:
    return {name: made for made, _, name in (line.partition("  ") for line in text.split("\n"))}
