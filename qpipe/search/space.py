"""The combinations that a search chooses from, in the words of a sweep.

    a,b  choice(a,b)  range(2,9,2)                          values that are listed
    interval(1,16)  int(interval(1,16))                     any number between, any whole one
    tag(log,interval(1e-4,1e-1))                            the same, evenly spread over its orders of magnitude

A condition, `{stages.adaround.beam: "rounding=adaround,both"}`, says that a key is chosen only where another one has
one of these values; elsewhere it is left out, and has the value that the config files give it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpipe.errors import ConfigError

MANY = 20_000
"""Of more combinations a search does not come to the end: they are not counted."""


@dataclass(frozen=True)
class Choice:
    """A key and the values it may have, as an override writes them; `ordered` where they are numbers that rise."""

    key: str
    values: tuple[str, ...]
    ordered: bool = False


@dataclass(frozen=True)
class Interval:
    """A key and the bounds of its value, both of which it may have."""

    key: str
    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether only whole numbers count."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class Condition:
    """The key is `other`'s to allow: by one of the `values`."""

    other: str
    values: tuple[str, ...]


Values = Mapping[str, str]
"""By key, the value that was chosen, as an override writes it."""


@dataclass(frozen=True)
class Space:
    """What may be chosen, each behind what it depends on, and the overrides that all combinations have in common."""

    params: tuple[Choice | Interval, ...]
    conditions: Mapping[str, Condition]
    fixed: tuple[str, ...] = ()

    def asks(self, key: str, given: Values) -> bool:
        """Whether `key` is chosen, where those before it are as `given`."""
        condition = self.conditions.get(key)
        return condition is None or given.get(condition.other) in condition.values

    def overrides(self, values: Values) -> tuple[str, ...]:
        """The overrides of one combination."""
        return (*self.fixed, *(f"{key}={value}" for key, value in values.items()))

    @property
    def count(self) -> int | None:
        """How many combinations there are; None where they are too many to count, and where an interval has any
        number."""
        if any(isinstance(each, Interval) for each in self.params):
            return None
        found = sum(1 for _ in itertools.islice(self.combinations(), MANY + 1))
        return found if found <= MANY else None

    def combinations(self) -> Iterator[dict[str, str]]:
        """Every combination, the last key changing first. Errors: ConfigError where an interval has too many."""
        for each in self.params:
            if isinstance(each, Interval):
                raise ConfigError(f"{each.key}: an interval has no list of values. List them: range(…) or choice(…).")
        yield from self._behind({}, 0)

    def _behind(self, given: dict[str, str], place: int) -> Iterator[dict[str, str]]:
        if place == len(self.params):
            yield given
            return
        param = self.params[place]
        if not self.asks(param.key, given):
            yield from self._behind(given, place + 1)
            return
        assert isinstance(param, Choice)
        for value in param.values:
            yield from self._behind({**given, param.key: value}, place + 1)

    def probes(self) -> Iterator[dict[str, str]]:
        """Combinations in which every value that is listed, and both ends of every interval, stand at least once."""
        first: dict[str, str] = {}
        for param in self.params:
            for value in _ends(param):
                found = self._completed(self._allowing({param.key: value}))
                if value != _ends(param)[0] or not first:
                    yield found
                first = first or found

    def _allowing(self, wanted: dict[str, str]) -> dict[str, str]:
        """`wanted`, and what has to be chosen for it to be asked."""
        for key in list(wanted):
            condition = self.conditions.get(key)
            if condition is not None and condition.other not in wanted:
                wanted = self._allowing({condition.other: condition.values[0], **wanted})
        return wanted

    def _completed(self, wanted: Values) -> dict[str, str]:
        found: dict[str, str] = {}
        for param in self.params:
            if self.asks(param.key, found):
                found[param.key] = wanted.get(param.key, _ends(param)[0])
        return found


def _ends(param: Choice | Interval) -> tuple[str, ...]:
    return param.values if isinstance(param, Choice) else (str(param.low), str(param.high))


def read_space(overrides: Sequence[Any], conditions: Mapping[str, str]) -> Space:
    """The space of the parsed overrides of a sweep (`hydra.core.override_parser.types.Override`); of a key that is
    given twice the last counts. Errors: ConfigError for a condition that means nothing, and for nothing to choose."""
    fixed: dict[str, str] = {}
    params: dict[str, Choice | Interval] = {}
    for each in overrides:
        key = str(each.get_key_element())
        for found in (fixed, params):
            found.pop(key, None)
        if each.is_sweep_override():
            params[key] = _param(key, each)
        else:
            fixed[key] = f"{key}={each.get_value_element_as_str()}"
    if not params:
        raise ConfigError("hydra.sweeper: nothing is to be chosen. List values: scheme=w8a8,w4a8 -m.")
    read = {key: _condition(key, text, params, fixed) for key, text in conditions.items() if key not in fixed}
    for key in [key for key, condition in read.items() if condition is not None and not condition.values]:
        del params[key]  # never asked: what it depends on is fixed, to another value
    asked = {key: condition for key, condition in read.items() if condition is not None and key in params}
    return Space(tuple(_sorted(params, asked)), asked, tuple(fixed.values()))


def _param(key: str, override: Any) -> Choice | Interval:
    if override.is_interval_sweep():
        found = override.value()
        return Interval(key, found.start, found.end, "log" in found.tags)
    values = tuple(dict.fromkeys(map(str, override.sweep_string_iterator())))
    return Choice(key, values, _rising(values))


def _rising(values: Sequence[str]) -> bool:
    try:
        numbers = [float(each) for each in values]
    except ValueError:
        return False
    return len(numbers) > 2 and all(a < b for a, b in itertools.pairwise(numbers))


def _condition(
    key: str, text: str, params: Mapping[str, Choice | Interval], fixed: Mapping[str, str]
) -> Condition | None:
    """Where the other key is fixed: None if the condition holds, else one without values."""
    address = f"hydra.sweeper.conditions.'{key}'"
    other, equals, listed = str(text).partition("=")
    values = tuple(each.strip() for each in listed.split(","))
    if key not in params:
        raise ConfigError(f"{address}: nothing is to be chosen for it. Keys: {', '.join(params)}.")
    if equals and other in fixed:
        return None if fixed[other].partition("=")[2] in values else Condition(other, ())
    param = params.get(other)
    if not equals or not isinstance(param, Choice) or other == key:
        choices = [each for each, found in params.items() if isinstance(found, Choice) and each != key]
        raise ConfigError(f"{address}: expected KEY=VALUE[,VALUE], got '{text}'. Keys: {', '.join(choices)}.")
    if not set(values) & set(param.values):
        raise ConfigError(f"{address}: '{other}' is never '{listed}'. Its values: {', '.join(param.values)}.")
    return Condition(other, values)


def _sorted(params: Mapping[str, Choice | Interval], conditions: Mapping[str, Condition]) -> list[Choice | Interval]:
    """In their order, but each behind what it depends on."""
    found: dict[str, Choice | Interval] = {}

    def take(key: str, waiting: tuple[str, ...]) -> None:
        if key in waiting:
            raise ConfigError(f"hydra.sweeper.conditions: {' -> '.join((*waiting, key))} depend on one another.")
        if key in conditions:
            take(conditions[key].other, (*waiting, key))
        found.setdefault(key, params[key])

    for key in params:
        take(key, ())
    return list(found.values())
