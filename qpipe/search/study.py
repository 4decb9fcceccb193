"""A search that can be stopped and gone on with: what was asked and what came of it, kept in a file by optuna.

optuna proposes by ask and tell, however many trials are under way. A combination is carried out once: where it is
proposed again, what came of it is told at once, and where proposals do nothing but repeat, one that nobody has tried
is drawn. A sampler's random state is in no file, so it is seeded anew for every trial, by the trial's number.

Source: T. Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", arXiv 1907.10902; `tpe` is
J. Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011, `nsga2` K. Deb et al., "A Fast and
Elitist Multiobjective Genetic Algorithm: NSGA-II", 2002.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qpipe.errors import ConfigError
from qpipe.report.figures import FIGURES, Figures, beyond
from qpipe.search.space import Choice, Space

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from optuna import Study as OptunaStudy
    from optuna.samplers import BaseSampler
    from optuna.storages import JournalStorage
    from optuna.trial import FrozenTrial, Trial

FILE = "study.journal"
STUDY = (FILE, "study.lock")
"""What a study leaves in its folder."""
SAMPLERS = ("tpe", "nsga2", "random", "grid")
NEEDED = ((4, 9), (6, 0))
"""The versions of optuna: at least the first, below the second; as in pyproject.toml."""
REPEATS = 20
"""So many proposals that are known already, one after another, and one that nobody has tried is drawn."""


@dataclass(frozen=True)
class SearchOptions:
    """How to search: `objectives` are figures, the first of which ranks; `within` are figures and the most that each
    may be (of `score`: the least). `max_trials` counts those of former times too; after `budget_s` seconds no trial
    begins."""

    sampler: str = "tpe"
    max_trials: int | None = None
    budget_s: float | None = None
    objectives: tuple[str, ...] = ("score",)
    within: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def aim(self) -> dict[str, Any]:
        """What is searched for, as JSON."""
        return {"objectives": list(self.objectives), "within": dict(self.within)}

    def __post_init__(self) -> None:
        """Errors: ConfigError."""
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"hydra.sweeper.sampler: there is no '{self.sampler}'. Samplers: {', '.join(SAMPLERS)}.")
        for name, figures in (("objectives", self.objectives), ("within", tuple(self.within))):
            for figure in figures:
                if figure not in FIGURES:
                    raise ConfigError(f"hydra.sweeper.{name}: there is no '{figure}'. Figures: {', '.join(FIGURES)}.")
        if not self.objectives:
            raise ConfigError(f"hydra.sweeper.objectives: names nothing to search for. Figures: {', '.join(FIGURES)}.")
        for figure, limit in self.within.items():
            if isinstance(limit, bool) or not isinstance(limit, int | float) or math.isnan(limit):
                raise ConfigError(f"hydra.sweeper.within.{figure}: expected a number, got {limit!r}.")
        if self.max_trials is None and self.budget_s is None and self.sampler != "grid":
            raise ConfigError("hydra.sweeper: nothing ends the search. Set hydra.sweeper.max_trials=… or budget_s=….")


class Asked(NamedTuple):
    """A trial to carry out: its number among those that are carried out, and its overrides."""

    number: int
    overrides: tuple[str, ...]


class Told(NamedTuple):
    """A trial that was carried out, and where it left its record."""

    number: int
    overrides: tuple[str, ...]
    folder: Path


class Study:
    """The trials of one search. Those that were under way when it was stopped are asked for again, under their
    numbers."""

    def __init__(self, space: Space, options: SearchOptions, folder: Path | None = None) -> None:
        """In memory alone where there is no folder. Errors: ConfigError where optuna is missing, and where the folder
        holds a search in another space."""
        self.space, self.options = space, options
        refuse_missing()
        self._lock = None if folder is None else _locked(folder)
        self._study = _open(space, options, folder)
        self._count = space.count
        self._open: dict[int, Trial] = {}
        self._names: dict[int, str] = {}
        self._known: dict[str, FrozenTrial | None] = {}
        """By combination what came of it; None while it is under way."""
        self._twins: dict[str, list[Trial]] = {}
        self._next = 0
        self._deadline = None if options.budget_s is None else time.monotonic() + options.budget_s
        self._combinations: Iterator[dict[str, str]] | None = None
        self._recall()

    def ask(self) -> Asked | None:
        """The next trial to carry out; None where there is none any more."""
        from optuna.trial import TrialState

        if self._waiting:  # begun once, and stopped; or drawn just now
            return self._begin(self._study.ask())
        limit = self.options.max_trials
        if (limit is not None and self._next >= limit) or self._late or len(self._known) == self._count:
            return None
        if self.options.sampler == "grid":
            left = next((each for each in self._every() if name_of(each) not in self._known), None)
            return None if left is None else self._fixed(left)
        for _ in range(REPEATS):
            self._study.sampler = sampler(self.options, len(self._study.get_trials(deepcopy=False)))
            trial = self._study.ask()
            name = name_of(self._chosen(trial))
            if name not in self._known:
                return self._begin(trial)
            if (known := self._known[name]) is None:
                self._twins.setdefault(name, []).append(trial)
            elif known.state == TrialState.COMPLETE:
                self._told(trial, known.user_attrs["figures"])
            else:
                self._study.tell(trial, state=TrialState.FAIL)
        return None if self._count is None else self._fixed(self._untried())

    def tell(self, number: int, figures: Figures | None, folder: Path | None = None) -> None:
        """What came of a trial that was asked for; no figures where it failed. Errors: ConfigError where it did not,
        and has nothing to say of an objective or a limit."""
        from optuna.trial import TrialState

        trial, name = self._open.pop(number), self._names[number]
        if folder is not None:
            trial.set_user_attr("folder", str(folder))
        twins = [trial, *self._twins.pop(name, [])]
        for each in twins:
            if figures is None:
                self._study.tell(each, state=TrialState.FAIL)
            else:
                self._told(each, figures)
        self._known[name] = self._study.get_trials(deepcopy=False)[trial.number]
        if figures is not None:
            self._refuse_unknown(figures)

    def close(self) -> None:
        """Let others go on with it."""
        if self._lock is not None:
            self._lock.release()

    def done(self) -> list[Told]:
        """The trials that were carried out, in the order of their numbers."""
        found = [each for each in self._study.get_trials(deepcopy=False) if "folder" in each.user_attrs]
        told = {
            attrs["number"]: Told(attrs["number"], tuple(attrs["overrides"]), Path(attrs["folder"]))
            for attrs in (each.user_attrs for each in found)
        }
        return [told[number] for number in sorted(told)]

    @property
    def waits(self) -> bool:
        """Whether a trial is asked for next that was under way when the search was stopped."""
        return self._waiting > 0

    @property
    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _recall(self) -> None:
        """Take up what the file has: what was told is known, what was under way waits to be asked for."""
        from optuna.trial import TrialState

        self._waiting = 0
        for each in self._study.get_trials():
            attrs = each.user_attrs
            if "number" not in attrs:
                if each.state == TrialState.RUNNING:  # a twin, or nobody came to use it
                    self._study.tell(each.number, state=TrialState.FAIL)
                continue
            self._next = max(self._next, attrs["number"] + 1)
            if each.state == TrialState.WAITING:
                self._waiting += 1
            elif each.state == TrialState.RUNNING:
                self._study.tell(each.number, state=TrialState.FAIL)
                self._study.enqueue_trial(each.params, user_attrs={"number": attrs["number"], "name": attrs["name"]})
                self._waiting += 1
            elif each.state == TrialState.COMPLETE or "folder" in attrs:
                self._known[attrs["name"]] = each

    def _begin(self, trial: Trial) -> Asked:
        values = self._chosen(trial)
        number = trial.user_attrs.get("number")
        if number is None:
            number, self._next = self._next, self._next + 1
        else:
            self._waiting -= 1
        name, overrides = name_of(values), self.space.overrides(values)
        for key, value in {"name": name, "overrides": list(overrides), "number": number}.items():
            trial.set_user_attr(key, value)
        self._open[number], self._names[number], self._known[name] = trial, name, None
        return Asked(number, overrides)

    def _chosen(self, trial: Trial) -> dict[str, str]:
        """The values that the sampler has for it."""
        values: dict[str, str] = {}
        for param in self.space.params:
            key = param.key
            if not self.space.asks(key, values):
                continue
            if isinstance(param, Choice):
                places = tuple(range(len(param.values)))
                ordered = trial.suggest_int(key, 0, places[-1]) if param.ordered else None
                values[key] = param.values[trial.suggest_categorical(key, places) if ordered is None else ordered]
            elif param.whole:
                values[key] = str(trial.suggest_int(key, int(param.low), int(param.high), log=param.log))
            else:
                values[key] = f"{trial.suggest_float(key, param.low, param.high, log=param.log):.6g}"
        return values

    def _fixed(self, values: Mapping[str, str]) -> Asked:
        """A trial of these values."""
        places = {
            param.key: param.values.index(values[param.key])
            for param in self.space.params
            if isinstance(param, Choice) and param.key in values
        }
        self._study.enqueue_trial(places, user_attrs={"number": self._next, "name": name_of(values)})
        self._next += 1
        self._waiting += 1
        return self._begin(self._study.ask())

    def _every(self) -> Iterator[dict[str, str]]:
        """The combinations, from where the last look ended: a grid is walked through once."""
        if self._combinations is None:
            self._combinations = self.space.combinations()
        return self._combinations

    def _untried(self) -> dict[str, str]:
        """A combination that nobody has tried, drawn by the number of the trial."""
        draw = random.Random(f"{self.options.seed} {self._next}")
        return draw.choice([each for each in self.space.combinations() if name_of(each) not in self._known])

    def _told(self, trial: Trial, figures: Figures) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr("figures", dict(figures))
        values = [figures.get(name) for name in self.options.objectives]
        if any(each is None for each in values):
            self._study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_user_attr("beyond", beyond(self.options.within, figures))
        self._study.tell(trial, [float(each) for each in values if each is not None])

    def _refuse_unknown(self, figures: Figures) -> None:
        for name in (*self.options.objectives, *self.options.within):
            if figures.get(name) is None:
                raise ConfigError(f"hydra.sweeper: the trials say nothing of '{name}'. {_WAY_OUT[name]}")


_WAY_OUT = {
    "score": "Set goal.scores to a node that scores.",
    "drop": "Set goal.scores and goal.reference to nodes that score, and add them to targets, if any are set.",
    **dict.fromkeys(("size", "cost", "bitops"), "Add a node of the stage 'cost', and to targets, if any are set."),
    "latency": "Export the model, and leave run.measure=true.",
}


def name_of(values: Mapping[str, str]) -> str:
    """One text for one combination."""
    return " ".join(f"{key}={values[key]}" for key in sorted(values))


def sampler(options: SearchOptions, turn: int) -> BaseSampler:
    """The sampler for the trial that is asked for at this turn."""
    from optuna import samplers

    seed = (options.seed * 1_000_003 + turn) % 2**32

    def limits(trial: FrozenTrial) -> Sequence[float]:
        return [min(each, 1e30) for each in trial.user_attrs.get("beyond", ())]

    constraints = limits if options.within else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is experimental in one version is the default of the next
        if options.sampler == "nsga2":
            size = min(50, max(8, (options.max_trials or 250) // 5))
            return samplers.NSGAIISampler(population_size=size, seed=seed, constraints_func=constraints)
        if options.sampler == "tpe":
            return samplers.TPESampler(
                multivariate=True, group=True, constant_liar=True, seed=seed, constraints_func=constraints
            )
        return samplers.RandomSampler(seed=seed)


def refuse_missing() -> None:
    """Errors: ConfigError where optuna is not installed, or another one than is known here."""
    try:
        found = version("optuna")
    except PackageNotFoundError:
        found = "none"
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    if not NEEDED[0] <= numbers < NEEDED[1]:
        wanted = f"optuna >= {'.'.join(map(str, NEEDED[0]))}, < {NEEDED[1][0]}"
        raise ConfigError(
            f"hydra.sweeper.sampler: a search needs {wanted}, got {found}. Install it: pip install 'qpipe[search]'."
        )


def _open(space: Space, options: SearchOptions, folder: Path | None) -> OptunaStudy:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    directions = ["maximize" if name == "score" else "minimize" for name in options.objectives]
    storage = None if folder is None else _storage(folder / FILE)
    study = optuna.create_study(study_name="qpipe", storage=storage, directions=directions, load_if_exists=True)
    said = {"space": repr((space.params, dict(space.conditions))), "objectives": list(options.objectives)}
    kept = study.user_attrs.get("said")
    if kept is None:
        study.set_user_attr("said", said)
    elif kept != said:
        raise ConfigError(
            f"hydra.sweep.dir: '{folder}' holds a search among other values, or for another objective. "
            "Choose another folder."
        )
    return study


def _locked(folder: Path) -> BaseFileLock:
    """The folder is this process's alone, until it ends. Errors: ConfigError where it is another one's."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / STUDY[1])
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(
            f"hydra.sweep.dir: another search is under way in '{folder}'. Wait for it, or choose another folder."
        ) from error
    return lock


def _storage(path: Path) -> JournalStorage:
    """The file; what a process left that was killed is tidied up."""
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

    Path(f"{path}.lock").unlink(missing_ok=True)  # optuna's own
    if path.exists():
        whole = path.read_bytes()
        if not whole.endswith(b"\n"):  # killed in the middle of a line
            path.write_bytes(whole[: whole.rfind(b"\n") + 1])
    return JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
