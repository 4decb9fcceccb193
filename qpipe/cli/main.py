"""The edge: the command line, Hydra, and what a person sees.

    qpipe [run|plan|rerun RUN|why NODE|diff RUN RUN|verify NODE|graph [FILE]|stages [NAME]|report [RUN]|runs|
          cache …]
          [overrides] [-m]

Exit status: 0 all done; 1 a node failed; 2 the config or an input is wrong; 3 the goal was not met; 4
`run.expect=cached` (or `run.max_misses`) and something (or more) had to run; 5 `run.budget_s` was spent before all was
done; 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hydra_plugins.qpipe.returns import NoScore, Returned, Score, watching
from qpipe.cli.compose import quick_hydra
from qpipe.cli.config_files import config_folders, groups, not_read, odd_name, shown, without_header
from qpipe.cli.manual import OPTIONS, overview, usage
from qpipe.cli.mistakes import one_line
from qpipe.cli.words import arranged, is_subject, split_command, take_options
from qpipe.errors import ConfigError, QpipeError
from qpipe.language.catalog import catalog, schema
from qpipe.run.record import RECORD, reached
from qpipe.run.sweep import INTERRUPTED, Job
from qpipe.run.swept import Swept
from qpipe.search.study import STUDY

if TYPE_CHECKING:
    from hydra_plugins.qpipe.launcher import Trial
    from qpipe.search.study import Study

UNREAD = 141  # as of a process that SIGPIPE ended
LEAVING = ("run", "rerun")
"""The commands that leave a folder."""
PACKAGE = Path(__file__).parents[1]

Many = Callable[[Any], int]
"""A command: it takes the composed jobs (one, or all of a sweep; of a search a Session) and returns the exit status."""
PLANNED = 10
"""Of a search so many trials are planned."""


def main() -> None:
    """The `qpipe` command, called by `__main__`, which switched the search for cycles off."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a service that ends us wants the record
    status = run(sys.argv[1:])
    # where an action ran, `sweep` enabled it again: what a stage left open is then closed in Python's own order
    if not gc.isenabled():
        gc.freeze()  # else Python looks for cycles among all objects as it ends: 0.06 s, 0.5 s for 10,000 nodes
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; its exit status."""
    command, rest = split_command(arguments)
    if sys.path[:1] not in ([os.getcwd()], [""]):
        sys.path.insert(0, os.getcwd())  # as in a worker: both find the same file under a module's name
    if command in arguments[:1] and {"--help", "-h"} & set(rest):
        print(usage(command), end="")
        return 0
    typing = False
    try:
        if command == "run" and {"--help", "-h"} & set(rest):
            print(overview(groups(config_folders(rest))), end="")
            return 0
        _register()
        if typing := bool({"-sc", "--shell-completion"} & set(arguments) and "COMP_LINE" in os.environ):
            from qpipe.cli.completion import complete, config_options

            rest = [*rest, *config_options(os.environ)]
            found, hydra_too = complete(os.environ)
            print("".join(f"{word}\n" for word in found), end="")
            if not hydra_too:
                return 0
        many, rest = _command(command, rest)
        if isinstance(many, int):
            return many
        return _compose(many, command, rest)
    except QpipeError as error:
        if not typing:  # else TAB has nothing to offer, and the command itself will say why
            say(f"qpipe: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("qpipe: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return _unread()


def _unread() -> int:
    """Nobody reads our output any more (`| head`): nothing is left to say, to anyone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return UNREAD


def say(line: str) -> None:
    """One line to the person, on standard error."""
    print(line, file=sys.stderr)


def _command(name: str, rest: list[str]) -> tuple[Many | int, list[str]]:
    """The function behind a command, and the arguments that are left for Hydra; the exit status where all is done."""
    if name == "diff":
        from qpipe.cli.explain_commands import diff

        return diff(rest), []
    if name == "why":
        return _why(rest)
    if name == "verify":
        return _verify(rest)
    if name == "cache":
        from qpipe.cli.cache_commands import cache_command

        return cache_command(rest)
    from qpipe.cli import run_commands as commands

    if name in ("stages", "report", "runs"):
        print({"stages": commands.show_stages, "report": commands.show_report, "runs": commands.show_runs}[name](rest))
        return 0, []
    if name == "rerun":
        return _rerun(rest)
    if name == "run":
        from qpipe.cli.rerun import resumed

        options, rest = take_options(rest, OPTIONS["run"])
        if "--resume" in options:
            rest = resumed(options["--resume"], rest)
    if name == "graph":
        file = None
        if is_subject(rest):
            file, *rest = rest
        return lambda jobs: commands.graph(jobs, file), rest
    return {"run": commands.run, "plan": commands.plan}[name], rest


def _rerun(rest: list[str]) -> tuple[Many, list[str]]:
    from qpipe.cli.rerun import recorded
    from qpipe.cli.run_commands import run

    if not is_subject(rest):
        raise ConfigError("rerun: names no run. Say `qpipe rerun RUN`: a run folder, or `last`.")
    return lambda jobs: run(jobs, ("rerun", rest[0])), recorded(rest[0], rest[1:])


def _why(rest: list[str]) -> tuple[Many, list[str]]:
    from qpipe.cli.explain_commands import why

    options, rest = take_options(rest, OPTIONS["why"])
    if not is_subject(rest):
        raise ConfigError("why: names nothing. Say `qpipe why NODE`.")
    return lambda jobs: why(jobs, rest[0], options.get("--against")), rest[1:]


def _verify(rest: list[str]) -> tuple[Many, list[str]]:
    from qpipe.cli.explain_commands import verify_nodes

    options, rest = take_options(rest, OPTIONS["verify"])
    if not is_subject(rest):
        raise ConfigError("verify: names nothing. Say `qpipe verify NODE` or `qpipe verify all`.")
    repeat = options.get("--repeat", "2")
    if not repeat.isdecimal() or not int(repeat):
        raise ConfigError(f"--repeat: how often to compute each node, at least 1, got {repeat!r}.")
    return lambda jobs: verify_nodes(jobs, rest[0], int(repeat)), rest[1:]


def _register() -> None:
    """Tell Hydra what a qpipe config may hold: the resolvers, a schema for every stage, launcher and sweeper."""
    from hydra_plugins.qpipe.launcher import QpipeLauncher
    from hydra_plugins.qpipe.sweeper import GRID, SEARCH, QpipeSweeper

    OmegaConf.register_new_resolver("qpipe.file", lambda name: str(PACKAGE / name), replace=True)
    OmegaConf.register_new_resolver(
        "qpipe.run_id", lambda: secrets.token_hex(2), use_cache=True, replace=True
    )
    store = ConfigStore.instance()
    base = OmegaConf.create({"stages": {}})
    OmegaConf.set_struct(
        base["stages"], False
    )  # nodes and params are checked by qpipe.language.spec, in its own words
    store.store(name="qpipe_base", node=base)
    for name in catalog():
        try:
            store.store(group="stage", name=name, node=schema(catalog()[name]))
        except ConfigError as error:  # one broken stage does not stop pipelines that do not use it
            say(f"qpipe: {error}")
    for kind, name, plugin, options in (
        ("launcher", "qpipe", QpipeLauncher, {}),
        ("sweeper", "qpipe", QpipeSweeper, {**GRID, **SEARCH}),
        ("sweeper", "qpipe_search", QpipeSweeper, {**GRID, **SEARCH, "sampler": "tpe", "max_trials": 50}),
    ):
        Plugins.instance().register(plugin)
        body: dict[str, Any] = {"_target_": f"{plugin.__module__}.{plugin.__name__}"}
        store.store(group=f"hydra/{kind}", name=name, node=body | options)


def _compose(many: Many, command: str, rest: list[str]) -> int:
    """Let Hydra compose the config and hand the jobs to `many`; mistakes that Hydra finds become one line."""
    task = _Task(many, command, arranged(rest))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us, not as Hydra's traceback
    try:
        with quick_hydra(), watching() as returned, _leaving_nothing(command) as quiet:
            sys.argv = [sys.argv[0], *task.rest, *quiet]
            hydra.main(version_base="1.3", config_path="pkg://qpipe.conf", config_name="config")(task)()
    except NoScore as error:
        raise QpipeError(str(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error, task.rest)) from error
    except (ValueError, YAMLError, RecursionError) as error:
        if task.begun:
            raise
        raise ConfigError(one_line(error, task.rest)) from error  # ValueError: a number of thousands of digits
    except OSError as error:
        if task.begun or isinstance(error, BrokenPipeError):
            raise
        if command in LEAVING:
            _take_away(error)
        at = f"'{error.filename}': " if error.filename is not None else ""
        raise QpipeError(
            f"the folder of the run cannot be made ({at}{error.strerror or error}). Choose another one with "
            "hydra.run.dir=…, or hydra.sweep.dir=… with -m."
        ) from error
    if task.leaves:
        _show_launched(returned, task.sweeps)
    return max([*task.statuses, *(each.status for each in returned)], default=0)


class _Task:
    """What Hydra gives configs to: one, the trials of a sweep, or those of a search, where its launcher finds these."""

    def __init__(self, many: Many, command: str, rest: list[str]) -> None:
        self._many, self._command, self.rest = many, command, rest
        self.leaves = command in LEAVING
        self.begun = False
        self.statuses: list[int] = []
        self.sweeps: dict[Path, Swept] = {}

    def __call__(self, config: DictConfig) -> Score:
        self.begun = True
        folder = Path(HydraConfig.get().runtime.output_dir)
        overrides = tuple(OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))  # type: ignore[arg-type]
        os.chdir(HydraConfig.get().runtime.cwd)  # with hydra.job.chdir: a relative path means what it meant before
        number = HydraConfig.get().job.num if HydraConfig.get().mode == RunMode.MULTIRUN else None
        listed = HydraConfig.get().sweeper.get("params") or {}
        if number is None and listed and not any(word.partition("=")[0] in listed for word in overrides):
            say(f"This is one run; with -m it is a sweep over {', '.join(listed)}.")

        def build() -> list[Job]:
            return [dataclasses.replace(make_job(config, folder, overrides, arguments=self.rest), number=number)]

        self.statuses.append(_carry_out(self._many, build, [folder] if self.leaves else []))
        return _told(reached(folder) if self.leaves else math.nan, self.statuses[-1], overrides)

    def qpipe_sweep(self, trials: Iterator[Trial], count: int, folder: Path) -> list[Score]:
        """Carry out all `trials` as one graph; what each came to."""
        self.begun = True
        swept = self.sweeps.setdefault(folder, Swept(folder))
        folders: list[Path] = []
        overrides: list[tuple[str, ...]] = []

        def build() -> list[Job]:
            jobs = []
            for trial in trials:
                folders.append(trial.folder)
                overrides.append(trial.overrides)
                made = self._job(trial, f"#{trial.number} " if count > 1 else "")
                jobs.append(dataclasses.replace(made, number=trial.number, swept=swept))
            return jobs

        try:
            self.statuses.append(_carry_out(self._many, build, folders if self.leaves else []))
        finally:
            if self.leaves and not swept.trials:
                remove_folder(folder, ("multirun.yaml",))
        scores = [reached(each) if self.leaves else math.nan for each in folders]
        scores += [math.nan] * (count - len(scores))  # those behind one that is refused
        status = self.statuses[-1]
        return [_told(*each) for each in zip(scores, itertools.repeat(status), [*overrides, *((),) * count])]

    def qpipe_check(self, trial: Trial) -> None:
        """Refuse a trial of which no job can be made. Errors: ConfigError."""
        self._job(trial, "")

    def qpipe_search(self, trials: Iterator[Trial], study: Study, folder: Path) -> list[Score]:
        """Carry out `trials`, each of which `study` asks for when a worker has nothing to do; what each came to."""
        from qpipe.search.session import Session

        self.begun = True
        swept = self.sweeps.setdefault(folder, Swept(folder, search=study.options.aim))
        session = Session(study, swept, trials, lambda trial: self._job(trial, f"#{trial.number} "), say)

        def build() -> Any:
            return session if self.leaves else list(itertools.islice(session, PLANNED))

        try:
            self.statuses += [_carry_out(self._many, build, []), session.refused]
        finally:
            session.close()
            if self.leaves and not swept.trials:
                remove_folder(folder, ("multirun.yaml", *STUDY))
        return [Score(*each) for each in session.scores]

    def _job(self, trial: Trial, label: str) -> Job:
        return make_job(trial.config, trial.folder, trial.overrides, label, self.rest)


def _show_launched(returned: Sequence[Returned], sweeps: dict[Path, Swept]) -> None:
    """Show what a sweep came to that no single command has shown whole: several batches; and trials that other
    launchers ran, each as a run of its own, for which nobody has left `sweep.json`."""
    from qpipe.cli.run_commands import sweep_table
    from qpipe.run.swept import Trial, read, so_far

    others: dict[Path, list[Trial]] = {}
    for each in returned:
        if each.folder is not None and each.sweep not in sweeps:
            others.setdefault(each.sweep, []).append(Trial(each.number, each.overrides, each.folder))
    for folder, trials in others.items():
        if found := read(trials):
            Swept(folder).add(found)
            print("\n".join(sweep_table(found, folder)))
    for folder, swept in sweeps.items():
        if swept.trials and (swept.batches > 1 or swept.search is not None):
            print("\n".join(sweep_table(read(so_far(swept)), folder, swept.search)))


def _told(score: float, status: int, overrides: Sequence[str]) -> Score:
    """What a trial returns. Errors: NoScore, where there is none and the sweeper reads it."""
    reads = str(HydraConfig.get().sweeper["_target_"]).rpartition(".")[2] not in ("BasicSweeper", "QpipeSweeper")
    if math.isnan(score) and reads and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise NoScore(" ".join(overrides), status)
    return Score(score, status)


@contextmanager
def _leaving_nothing(command: str) -> Iterator[list[str]]:
    """The overrides with which Hydra leaves no file: only a run has a folder, and a sweep writes multirun.yaml."""
    if command in LEAVING:
        yield []
        return
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="qpipe-") as folder:
        yield [
            "hydra.run.dir=.",
            "hydra.output_subdir=null",
            f"hydra.sweep.dir='{folder}'",
            "hydra.sweep.subdir=.",
        ]


def _take_away(error: OSError) -> None:
    """Remove what Hydra began to write when `error` ended it, where it is ours to remove."""
    from traceback import walk_tb

    places = {"run_job": "output_dir", "sweep": "sweep_dir"}  # Hydra's functions, and where each says what it writes to
    for frame, _ in walk_tb(error.__traceback__):
        folder = frame.f_locals.get(places.get(frame.f_code.co_name, ""))
        if isinstance(folder, str | Path) and not (Path(folder) / RECORD).exists():
            if frame.f_code.co_name == "sweep":
                with suppress(OSError):
                    (Path(folder) / "multirun.yaml").unlink()
            remove_folder(Path(folder))


def _carry_out(many: Many, build: Callable[[], Any], left: Sequence[Path]) -> int:
    """Build the jobs and run the command; a folder of `left` in which no record came to lie is not left behind."""
    try:
        return many(build())
    except BrokenPipeError:
        return _unread()
    except QpipeError as error:
        say(f"qpipe: {error}")
        return error.exit_code
    except OSError as error:
        say(f"qpipe: {error.filename or 'the system'}: {error.strerror or error}.")
        return QpipeError.exit_code
    finally:
        for folder in left:
            if not (folder / RECORD).exists():
                remove_folder(folder)


LEFT_BY_US = (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "workers.log")


def remove_folder(folder: Path, names: Sequence[str] = LEFT_BY_US) -> None:
    """Remove the files of that name, Hydra's or ours, then the folders that are empty, up to the working directory.

    Nothing else is touched: the folder may be one that the person named, with other things in it.
    """
    if folder.resolve() == Path.cwd():
        return
    for name in names:
        with suppress(OSError):  # it is not there, or cannot be: what ended the run was told
            (folder / name).unlink()
    for place in [folder / ".hydra", folder, *folder.parents]:
        if place.resolve() == Path.cwd() or not place.resolve().is_relative_to(Path.cwd()):
            return
        with suppress(OSError):
            place.rmdir()


def make_job(
    config: DictConfig, folder: Path, overrides: tuple[str, ...], label: str = "", arguments: Sequence[str] = ()
) -> Job:
    """The job of one composed config; `arguments` are those of the command line. Errors: ConfigError."""
    from qpipe.language.spec import NameIsNoText, read_spec

    folders = config_folders(arguments)
    if folders and (refused := not_read(HydraConfig.get().runtime.choices, arguments)):
        raise ConfigError(refused)
    try:
        if folders and (found := without_header(config, folders)):
            raise ConfigError(
                f"{shown(found[0])}: all that it says lies below '{found[1]}', where nothing reads it. "
                f"Put `# @package _global_` into its first line."
            )
        return Job(read_spec(config), folder, overrides, label)
    except NameIsNoText as error:
        place, word = odd_name(error.name, folders)
        said = f"{place or 'stages'}: a node is called {word}, which YAML reads as {error.name!r}"
        raise ConfigError(f"{said}. Put the name in quotes, or take another.") from error
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error, arguments)) from error
    except ConfigError as error:
        if isinstance(error.__cause__, OmegaConfBaseException):
            raise ConfigError(one_line(error.__cause__, arguments)) from error
        raise
