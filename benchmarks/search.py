"""How many trials a search takes until it has the best: the sweeper's `tpe`, optuna's TPE as it comes, and random
draws.

    python -m benchmarks.search [--seeds 20] [--under-way 1 4] [--table benchmarks/search_table.csv]
    python -m benchmarks.search --record FOLDER     # makes the table anew: 576 trials

The table holds what every combination of a space scores on the built-in model (128 samples of calibration, 400 of
evaluation, nearest rounding), so that a search over it takes no time, and what is best is known. Two questions:

    drop    the fewest bit operations whose score lies at most one point below float's
    bitops  the best score of those with at most 4 x 8 bits

`asked` counts trials as a search does that carries out every one; `distinct` those that are not cached: a combination
that is asked for again costs nothing here. `in turn` draws without repeating itself, by chance alone: (N + 1) / (k + 1)
of N trials of which k are the best, in closed form. Trials are told in the order in which they are asked for,
`under-way` of them at a time. Of so many seeds: the median, and the quartiles.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qpipe.report.figures import Figures, beyond, rank
from qpipe.search.space import Choice, Space
from qpipe.search.study import SearchOptions, Study

TABLE = Path(__file__).parent / "search_table.csv"
SPACE = Space(
    (
        Choice("scheme.weight.bitwidth", ("2", "3", "4", "8"), ordered=True),
        Choice("scheme.activation.bitwidth", ("4", "6", "8"), ordered=True),
        Choice("scheme.weight.granularity", ("per_tensor", "per_channel")),
        Choice("stages.cle.enabled", ("true", "false")),
        Choice("scheme.weight.observer", ("minmax", "mse", "sqnr")),
        Choice("scheme.activation.observer", ("minmax", "mse", "percentile", "sqnr")),
    ),
    {},
)
FIXED = (
    *("pipeline=chain", "model.granularity=auto", "scheme=w8a8", "stage@stages.round=nearest", "goal.max_drop=0.01"),
    *("targets=[score_float,score]", "run.measure=false", "run.threads=1"),
    *("stages.calibration.limit=128", "stages.evaluation.limit=400"),
)
QUESTIONS: Mapping[str, tuple[str, Mapping[str, float]]] = {
    "drop": ("bitops", {"drop": 0.01}),
    "bitops": ("score", {"bitops": 4 * 8 / 32**2}),
}
"""Objective and limits."""

Key = tuple[str, ...]
Table = Mapping[Key, Figures]


class Length(NamedTuple):
    """Trials until the best was found."""

    asked: int
    distinct: int


def record(folder: Path, table: Path) -> None:
    """Carry out every combination, and keep what came of it."""
    words = [f"{each.key}={','.join(each.values)}" for each in SPACE.params if isinstance(each, Choice)]
    command = [sys.executable, "-m", "qpipe", "-m", *FIXED, *words, f"hydra.sweep.dir='{folder}'"]
    if subprocess.run(command).returncode not in (0, 3):  # 3: some are not within the goal
        raise SystemExit("the sweep failed")
    with (folder / "sweep.csv").open() as file, table.open("w") as out:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow([*(each.key for each in SPACE.params), "score", "drop"])
        for row in csv.DictReader(file):
            key = [row[each.key].lower() for each in SPACE.params]
            rows.writerow([*key, row["score"], f"{float(row['drop']):.6g}"])


def read(path: Path) -> Table:
    """The figures of every combination. Bit operations are those of the layers, all of which are quantized."""
    found: dict[Key, Figures] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            key = tuple(row[each.key] for each in SPACE.params)
            bits = int(row["scheme.weight.bitwidth"]) * int(row["scheme.activation.bitwidth"])
            found[key] = {"score": float(row["score"]), "drop": float(row["drop"]), "bitops": bits / 32**2}
    return found


def best(table: Table, objective: str, within: Mapping[str, float]) -> set[Key]:
    """The combinations that nothing beats: by the objective alone, so there may be several."""
    ranks = {key: rank(objective, within, figures) for key, figures in table.items()}
    most = max(each[:2] for each in ranks.values() if each is not None)
    return {key for key, each in ranks.items() if each is not None and each[:2] == most}


def ours(sampler: str, seed: int, objective: str, within: Mapping[str, float], under_way: int) -> Proposals:
    """The sweeper's study."""
    study = Study(SPACE, SearchOptions(sampler, 10_000, objectives=(objective,), within=within, seed=seed))

    def ask() -> tuple[Any, Key]:
        asked = study.ask()
        assert asked is not None
        given = dict(word.split("=", 1) for word in asked.overrides)
        return asked.number, tuple(given[each.key] for each in SPACE.params)

    return _proposed(ask, study.tell, under_way)


def plain(kind: str, seed: int, objective: str, within: Mapping[str, float], under_way: int) -> Proposals:
    """optuna as it comes: every choice a categorical, repeated proposals carried out again."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def limits(trial: Any) -> list[float]:
        return list(trial.user_attrs.get("beyond", ()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tpe = optuna.samplers.TPESampler(seed=seed, constraints_func=limits)
    sampler = tpe if kind == "tpe" else optuna.samplers.RandomSampler(seed=seed)
    study = optuna.create_study(sampler=sampler, direction="maximize" if objective == "score" else "minimize")

    def ask() -> tuple[Any, Key]:
        trial = study.ask()
        return trial, tuple(
            trial.suggest_categorical(each.key, each.values) for each in SPACE.params if isinstance(each, Choice)
        )

    def tell(trial: Any, figures: Figures) -> None:
        trial.set_user_attr("beyond", beyond(within, figures))
        study.tell(trial, figures[objective])

    return _proposed(ask, tell, under_way)


Proposals = Callable[[Table], Iterator[Key]]
"""What is asked for, one after another, where every trial comes to what the table says."""


def _proposed(ask: Callable[[], tuple[Any, Key]], tell: Callable[[Any, Figures], None], under_way: int) -> Proposals:
    def proposed(table: Table) -> Iterator[Key]:
        waiting: deque[tuple[Any, Key]] = deque()
        while True:
            waiting.append(ask())
            yield waiting[-1][1]
            if len(waiting) >= under_way:
                trial, key = waiting.popleft()
                tell(trial, table[key])

    return proposed


def length(proposed: Iterator[Key], wanted: set[Key]) -> Length:
    """How long it takes."""
    seen: set[Key] = set()
    for asked in itertools.count(1):
        key = next(proposed)
        seen.add(key)
        if key in wanted:
            return Length(asked, len(seen))
    raise AssertionError


WAYS: Mapping[str, Callable[..., Proposals]] = {
    "sweeper's tpe": lambda *rest: ours("tpe", *rest),
    "optuna's TPE": lambda *rest: plain("tpe", *rest),
    "random": lambda *rest: plain("random", *rest),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--under-way", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    if options.record:
        record(options.record, options.table)
    table = read(options.table)
    print("| question | under way | search | asked: median (quartiles), mean | distinct: median, mean |")
    print("|---|---|---|---|---|")
    for question, (objective, within) in QUESTIONS.items():
        wanted = best(table, objective, within)
        chance = (len(table) + 1) / (len(wanted) + 1)
        print(f"| {question}: best are {len(wanted)} of {len(table)} | | in turn | mean {chance:.0f} | {chance:.0f} |")
        for under_way, (name, way) in itertools.product(options.under_way, WAYS.items()):
            runs = (way(seed, objective, within, under_way)(table) for seed in range(options.seeds))
            found = [length(each, wanted) for each in runs]
            asked, distinct = ([getattr(each, kind) for each in found] for kind in ("asked", "distinct"))
            low, middle, high = statistics.quantiles(asked, n=4, method="inclusive")
            first = f"{middle:.0f} ({low:.0f}-{high:.0f}), {statistics.mean(asked):.0f}"
            second = f"{statistics.median(distinct):.0f}, {statistics.mean(distinct):.0f}"
            print(f"| {question} | {under_way} | {name} | {first} | {second} |", flush=True)


if __name__ == "__main__":
    main()
