"""What a search asks for, what it remembers, and what it does not ask for twice."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from qpipe.errors import ConfigError
from qpipe.report.figures import rank
from qpipe.search.space import Choice, Condition, Interval, Space
from qpipe.search.study import FILE, NEEDED, Asked, SearchOptions, Study

PARAMS = (Choice("a", ("x", "y")), Choice("b", ("1", "2", "3", "4"), True), Choice("c", ("p", "q")))
SPACE = Space(PARAMS, {"c": Condition("a", ("y",))})
"""12 combinations."""


def worth(asked: Asked) -> dict[str, float | None]:
    given = dict(word.split("=") for word in asked.overrides)
    score = float(given["b"]) + (2.5 if given["a"] == "y" else 0) - (given.get("c") == "q")
    return {"score": score, "size": score / 10}


def searched(study: Study, under_way: int = 1) -> list[Asked]:
    """All that it asks for, so many at a time; the one that was asked last is told first."""
    found: list[Asked] = []
    waiting: list[Asked] = []
    while True:
        while len(waiting) < under_way and (asked := study.ask()) is not None:
            waiting.append(asked)
            found.append(asked)
        if not waiting:
            return found
        last = waiting.pop()
        study.tell(last.number, worth(last), Path(f"trial/{last.number}"))


@pytest.mark.parametrize("under_way", [1, 5])
@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "grid"])
def test_every_combination_is_asked_for_once_and_then_none(sampler: str, under_way: int) -> None:
    objectives = ("score", "size") if sampler == "nsga2" else ("score",)
    found = searched(Study(SPACE, SearchOptions(sampler, 100, objectives=objectives)), under_way)
    assert [each.number for each in found] == list(range(12))
    expected = {SPACE.overrides(values) for values in SPACE.combinations()}
    assert {each.overrides for each in found} == expected


def test_it_ends_at_its_number_of_trials_and_asks_the_same_again() -> None:
    first, second, other = (
        searched(Study(SPACE, SearchOptions("tpe", 7, seed=seed))) for seed in (3, 3, 4)
    )
    assert len(first) == 7
    assert first == second != other


def test_it_ends_at_its_time() -> None:
    assert Study(SPACE, SearchOptions("tpe", budget_s=0.0)).ask() is None


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_a_file_goes_on_where_it_was_left_also_in_the_middle_of_a_line(tmp_path: Path, sampler: str) -> None:
    options = SearchOptions(sampler, 9)
    study = Study(SPACE, options, tmp_path)
    asked = [study.ask() for _ in range(5)]
    for each in asked[:3]:
        assert each is not None
        study.tell(each.number, worth(each), tmp_path / str(each.number))
    study.close()
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole + b'{"op_code": 4, "work')
    (tmp_path / f"{FILE}.lock").touch()  # of a process that was killed
    study = Study(SPACE, options, tmp_path)
    assert [each.number for each in study.done()] == [0, 1, 2]
    assert study.waits
    again = searched(study)
    study.close()
    assert again[:2] == asked[3:]
    assert [each.number for each in again] == list(range(3, 9))
    assert len({each.overrides for each in [*again, *(each for each in asked[:3] if each)]}) == 9
    study = Study(SPACE, options, tmp_path)
    assert (study.ask(), len(study.done())) == (None, 9)


def test_a_folder_is_of_one_search_and_of_one_process_at_a_time(tmp_path: Path) -> None:
    study = Study(SPACE, SearchOptions("tpe", 9), tmp_path)
    with pytest.raises(ConfigError, match="another search is under way"):
        Study(SPACE, SearchOptions("tpe", 9), tmp_path)
    study.close()
    other = Space(SPACE.params[:1], {})
    with pytest.raises(ConfigError, match="holds a search among other values"):
        Study(other, SearchOptions("tpe", 9), tmp_path)


def test_what_fails_is_not_asked_again_and_leaves_the_others() -> None:
    study = Study(SPACE, SearchOptions("tpe", 100))
    found = []
    while (asked := study.ask()) is not None:
        found.append(asked.overrides)
        study.tell(asked.number, None if "a=x" in asked.overrides else worth(asked))
    assert len(set(found)) == len(found) == 12


def test_a_limit_steers_the_search() -> None:
    """Few trials of a large space: most of them keep the limit that a random one keeps in one of four cases."""
    space = Space((Interval("a", 0.0, 1.0), Interval("b", 0.0, 1.0)), {})
    study = Study(space, SearchOptions("tpe", 60, within={"size": 0.25}))
    kept = []
    while (asked := study.ask()) is not None:
        a, b = (float(word.partition("=")[2]) for word in asked.overrides)
        kept.append(a <= 0.25)
        study.tell(asked.number, {"score": a + b, "size": a})
    assert sum(kept[20:]) > 20  # 10 by chance


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sampler": "tp"}, "there is no 'tp'. Samplers: tpe, nsga2, random, grid"),
        ({"objectives": ("speed",)}, "there is no 'speed'. Figures: score, drop"),
        ({"objectives": ()}, "names nothing"),
        ({"within": {"size": "small"}}, r"within.size: expected a number, got 'small'"),
        ({"max_trials": None}, "nothing ends the search"),
    ],
)
def test_options_that_mean_nothing_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SearchOptions(**{"max_trials": 5, **given})


def test_a_figure_that_trials_do_not_have_is_refused_with_the_way_to_it() -> None:
    study = Study(SPACE, SearchOptions("tpe", 5, objectives=("size",)))
    asked = study.ask()
    assert asked is not None
    with pytest.raises(ConfigError, match=r"say nothing of 'size'\. Add a node of the stage 'cost'"):
        study.tell(asked.number, {"score": 1.0, "size": None})


def test_the_versions_that_are_known_are_those_that_are_installed() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["search"] == [f"optuna>={NEEDED[0][0]}.{NEEDED[0][1]},<{NEEDED[1][0]}"]


@pytest.mark.parametrize("found", [None, "4.8.0", "6.0.0"])
def test_without_a_fitting_optuna_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr("qpipe.search.study.version", version)
    with pytest.raises(ConfigError, match=r"needs optuna >= 4.9, < 6, got .*pip install 'qpipe\[search\]'"):
        Study(SPACE, SearchOptions("tpe", 5))


def test_what_keeps_the_limits_is_better_than_what_is_better_otherwise() -> None:
    within = {"size": 0.2, "drop": 0.01}
    figures: list[dict[str, float | None]] = [
        {"score": 0.9725, "size": 0.2, "drop": 0.9825 - 0.9725},  # above 0.01, by rounding
        {"score": 0.8, "size": 0.1, "drop": 0.01},
        {"score": 0.99, "size": 0.21, "drop": 0.0},
        {"score": 0.99, "size": 0.5, "drop": 0.0},
    ]
    ranks = [rank("score", within, each) for each in figures]
    assert ranks == sorted(ranks, reverse=True)  # type: ignore[type-var]
    assert rank("size", within, figures[1]) > rank("size", within, figures[0])  # type: ignore[operator]
    assert rank("cost", within, figures[0]) is None
