"""A mutant: one fragment of the source, what it is replaced by, and the tests that have to notice."""

from __future__ import annotations

import ast
import tomllib
from dataclasses import dataclass
from pathlib import Path

TABLES = Path(__file__).parent


class BrokenMutantError(Exception):
    """The mutant says nothing: it does not fit the source, or its tests do not run."""


@dataclass(frozen=True)
class Mutant:
    """`never` is what must never be wrong. `fragment` stands in `file` exactly once, wherever in it that is."""

    name: str
    never: str
    file: str
    fragment: str
    replacement: str
    tests: tuple[str, ...]

    def applied(self, root: Path) -> str:
        """The file's text with the mutant in it. Errors: BrokenMutantError where that is no program or no mutant."""
        try:
            text = (root / self.file).read_text(encoding="utf-8")
        except OSError as error:
            raise BrokenMutantError(f"{self.name}: {self.file} cannot be read: {error.strerror}.") from error
        found = text.count(self.fragment)
        if found != 1:
            raise BrokenMutantError(f"{self.name}: {self.file} holds {found} times, not once: {self.fragment!r}.")
        changed = text.replace(self.fragment, self.replacement)
        try:
            same = ast.dump(ast.parse(changed)) == ast.dump(ast.parse(text))
        except SyntaxError as error:
            raise BrokenMutantError(f"{self.name}: {self.file}:{error.lineno} is no Python any more.") from error
        if same:
            raise BrokenMutantError(f"{self.name}: {self.replacement!r} changes nothing.")
        return changed


def read_tables() -> dict[str, Mutant]:
    """Every mutant by its name, as the tables here say them. Errors: BrokenMutantError for one said twice."""
    found: dict[str, Mutant] = {}
    for table in sorted(TABLES.glob("*.toml")):
        for name, fields in tomllib.loads(table.read_text(encoding="utf-8")).items():
            if name in found:
                raise BrokenMutantError(f"{table.name}: there is a mutant '{name}' already.")
            found[name] = Mutant(name, **{**fields, "tests": tuple(fields["tests"])})
    return found
