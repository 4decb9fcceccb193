"""What a search chooses from, by the words of a sweep."""

from __future__ import annotations

import itertools

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qpipe.errors import ConfigError
from qpipe.search.space import Choice, Interval, Space, read_space

PARSER = OverridesParser.create()
CONDITIONAL = {"d": "c=2", "b": "a=x"}


def space(*words: str, **conditions: str) -> Space:
    return read_space(PARSER.parse_overrides(list(words)), conditions)


def test_the_words_of_a_sweep_say_what_is_chosen() -> None:
    words = ["a=x,y", "b=range(2,9,3)", "c=interval(1,4)", "d=int(interval(1,4))", "e=tag(log,interval(1,4))", "f=7"]
    found = space(*words)
    assert found.params == (
        Choice("a", ("x", "y")),
        Choice("b", ("2", "5", "8"), ordered=True),
        Interval("c", 1.0, 4.0),
        Interval("d", 1, 4),
        Interval("e", 1.0, 4.0, log=True),
    )
    assert [each.whole for each in found.params if isinstance(each, Interval)] == [False, True, False]
    assert found.overrides({"a": "y", "b": "5"}) == ("f=7", "a=y", "b=5")
    assert space("a=1,2", "a=3", "b=4,5").overrides({}) == ("a=3",)  # of a key that is given twice the last counts


def test_a_condition_leaves_out_the_combinations_that_differ_in_nothing() -> None:
    """Against all tuples, in which what is not asked is set to one value."""
    found = space("d=p,q", "a=x,y", "b=1,2,3", "c=1,2", **CONDITIONAL)
    assert [each.key for each in found.params] == ["c", "d", "a", "b"]
    expected = {
        (a, b if a == "x" else None, c, d if c == "2" else None)
        for a, b, c, d in itertools.product("xy", "123", "12", "pq")
    }
    listed = [tuple(each.get(key) for key in "abcd") for each in found.combinations()]
    assert len(listed) == found.count == len(expected)
    assert set(listed) == expected


def test_a_condition_on_a_value_that_is_fixed_holds_or_not() -> None:
    assert [each.key for each in space("a=x", "b=1,2", "c=1,2", b="a=x").params] == ["b", "c"]
    assert [each.key for each in space("a=y", "b=1,2", "c=1,2", b="a=x").params] == ["c"]
    assert [each.key for each in space("a=x,y", "b=1", "c=1,2", b="a=x").params] == ["a", "c"]


def test_every_value_and_both_ends_are_looked_at_beforehand() -> None:
    found = space("a=x,y,z", "b=interval(2,3)", "c=1,2", "d=p,q", d="c=2", b="a=z")
    probes = list(found.probes())
    seen = {(key, value) for each in probes for key, value in each.items()}
    listed = [("a", value) for value in "xyz"] + [("c", value) for value in "12"] + [("d", value) for value in "pq"]
    assert seen == {*listed, ("b", "2.0"), ("b", "3.0")}
    assert all(each["a"] == "z" for each in probes if "b" in each)
    assert all(each["c"] == "2" for each in probes if "d" in each)


@pytest.mark.parametrize(
    ("words", "conditions", "said"),
    [
        (["a=1"], {}, "nothing is to be chosen"),
        (["a=1,2"], {"z": "a=1"}, "'z': nothing is to be chosen for it. Keys: a."),
        (["a=1,2", "b=1,2"], {"b": "a"}, "expected KEY=VALUE"),
        (["a=1,2", "b=1,2"], {"b": "c=1"}, "expected KEY=VALUE"),
        (["a=1,2", "b=1,2"], {"b": "a=3"}, "'a' is never '3'. Its values: 1, 2."),
        (["a=1,2", "b=1,2"], {"b": "a=1", "a": "b=1"}, "depend on one another"),
    ],
)
def test_what_means_nothing_is_refused(words: list[str], conditions: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        space(*words, **conditions)


def test_an_interval_cannot_be_listed() -> None:
    with pytest.raises(ConfigError, match=r"b: an interval has no list of values. List them"):
        list(space("a=1,2", "b=interval(0,1)").combinations())
