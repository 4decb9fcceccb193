"""What TAB offers, and `COMMAND --help`."""

from __future__ import annotations

import re
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import pytest

from qpipe.cli.cache_commands import COMMANDS as CACHE_COMMANDS
from qpipe.cli.completion import choices, complete
from qpipe.cli.main import _register
from qpipe.cli.manual import COMMANDS, OPTIONS, usage
from qpipe.cli.words import take_options
from qpipe.errors import ConfigError
from tests.toy import Toy

CHAIN = {"alpha": {"uses": "toy_number"}, "beta": {"uses": "toy_add", "scores": "alpha"}}


def offered(line: str) -> list[str]:
    return complete({"COMP_LINE": line})[0]


def test_commands_options_and_subcommands_complete() -> None:
    assert offered("qpipe ") == list(COMMANDS)
    assert offered("qpipe ve") == ["verify"]
    assert offered("qpipe why x --") == ["--against", "--config-dir", "--config-name", "--multirun", "--help"]
    assert offered("qpipe --conf") == ["--config-dir", "--config-name"]
    assert offered("qpipe cache p") == ["pin"]
    assert "adaround" in offered("qpipe stages ada")
    assert offered("qpipe diff la") == ["last", "last~1"]


def test_nodes_complete_in_the_pipeline_on_the_line() -> None:
    _register()
    assert offered("qpipe why pipeline=ptq score_f") == ["score_float"]
    assert offered("qpipe verify a") == ["all", *(name for name in offered("qpipe why a"))]
    assert "best" in offered("qpipe cache rm ")  # of autoquant, the default
    assert offered("qpipe why pipeline=nope s") == []


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("qpipe why adaround sche", None),
        ("qpipe why adaround scheme=w", "qpipe scheme=w"),
        ("qpipe verify all --repeat 3 run.wo=", "qpipe run.wo="),
        ("qpipe plan x=1 --config-dir conf -m pipe", "qpipe -m x=1 pipe"),  # where configs lie, Hydra is told itself
        ("qpipe why adaround --config-dir conf pipeline=", "qpipe pipeline="),
    ],
)
def test_overrides_are_left_to_hydra(line: str, left: str | None) -> None:
    environment = {"COMP_LINE": line}
    found, hydra_too = complete(environment)
    assert (found, hydra_too) == ([], True)
    assert environment["COMP_LINE"] == (left or "qpipe sche")


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("stages.score.backend=", ["simulation", "onnxruntime"]),
        ("stages.score.backend=o", ["onnxruntime"]),
        ("stages.cle.enabled=", ["true", "false"]),
        ("stages.score.quantized=f", ["false"]),
        ("stages.score.metric=", ["top1", "top5", "sqnr_db", "cosine", "mse"]),
        ("stages.calibrate.weight_granularity=", ["auto", "per_tensor", "per_channel", "per_block", "null"]),
        ("scheme.weight.granularity=", ["auto", "per_tensor", "per_channel", "per_block"]),
        ("scheme.activation.observer=m", ["minmax", "moving_average", "mse"]),
        ("scheme.weight.symmetric=", ["true", "false"]),
        ("goal.metric=sq", ["sqnr_db"]),
        ("run.device=", ["cpu", "cuda"]),
        ("run.keep_going=", ["true", "false"]),
        ("run.expect=", ["cached", "null"]),
        ("cache.remote_mode=", ["write", "read", "off"]),
        ("allow_discouraged=", ["true", "false"]),
    ],
)
def test_values_of_a_literal_an_enum_and_a_boolean_complete(typed: str, found: list[str]) -> None:
    _register()
    key = typed.partition("=")[0]
    assert offered(f"qpipe pipeline=ptq {typed}") == [f"{key}={value}" for value in found]


@pytest.mark.parametrize("key", ["stages.score.backend", "scheme.weight.symmetric", "run.device", "goal.metric"])
def test_values_complete_behind_a_plus_and_in_a_list(key: str) -> None:
    _register()
    values = [each.partition("=")[2] for each in offered(f"qpipe pipeline=ptq {key}=")]
    assert offered(f"qpipe plan pipeline=ptq +{key}=") == [f"+{key}={value}" for value in values] != []
    assert f"{key}=x,{values[-1]}" in offered(f"qpipe -m pipeline=ptq {key}=x,")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


def test_a_type_has_the_values_that_are_few() -> None:
    assert choices(Colour | None) == ["red", "blue", "null"]
    assert choices(Annotated[Literal[4, 8], "bits"]) == ["4", "8"]
    assert choices(bool | Literal["auto"]) == ["true", "false", "auto"]
    assert choices(int | None) == choices(float) == choices(None) == []


def test_params_of_a_node_that_was_written_by_uses_alone_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _register()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "conf" / "pipeline" / "short.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\nstages: {s: {uses: evaluate, model: source}}\n")
    line = "qpipe --config-dir conf pipeline=short stages.s."
    assert offered(f"{line}ba") == ["stages.s.backend=", "stages.s.batch_size="]
    assert offered(f"{line}backend=s") == ["stages.s.backend=simulation"]
    assert offered("qpipe --config-dir ") == offered("qpipe plan -cd ") == ["conf/"]
    assert offered("qpipe --config-dir=co") == ["--config-dir=conf/"]


def test_the_shell_gets_nodes_and_overrides(toy: Toy) -> None:
    toy.pipeline(CHAIN)

    def tab(line: str) -> list[str]:
        environment = toy.environment | {"COMP_LINE": line, "COMP_POINT": str(len(line))}
        command = [sys.executable, "-m", "qpipe", "-sc", "query=bash"]
        done = subprocess.run(command, env=environment, cwd=toy.folder, capture_output=True, text=True)
        assert done.stderr == ""  # it would stand in the middle of what is being typed
        return done.stdout.split()

    assert tab("qpipe why --config-dir conf pipeline=toy ~model ~data be") == ["beta"]
    assert "pipeline=ptq" in tab("qpipe why alpha pipeline=")
    for words in ("--config-dir conf", "plan --config-dir=conf", "-cd conf"):
        assert {"pipeline=toy", "pipeline=ptq"} <= set(tab(f"qpipe {words} pipeline="))
    assert "stages.beta.amount=" in tab("qpipe pipeline=toy --config-dir conf ~model ~data stages.beta.")
    (toy.folder / "conf" / "pipeline" / "broken.yaml").write_text("a: {")
    assert tab("qpipe --config-dir conf pipeline=broken stages.") == []
    toy.run("run", "run.workers=0")
    run = Path(toy.record()["run_dir"]).name
    assert tab("qpipe why alpha --against ") == ["last", "last~1", run]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_one_screen_and_says_the_options_and_the_exit_status(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qpipe", command, "--help"], capture_output=True, text=True, cwd="/"
    ) if command == "why" else None
    text = usage(command) if done is None else done.stdout
    assert text == usage(command)
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith(f"usage: qpipe {command}" if command != "run" else "usage: qpipe [run]")
    assert all(option in text for option in OPTIONS.get(command, {}))
    assert "Exit status: 0" in text
    if command == "cache":
        assert all(re.search(rf"\b{name}\b", text) for name in CACHE_COMMANDS)


def test_options_are_taken_from_anywhere_on_the_line() -> None:
    known = {"--against": "RUN", "--json": ""}
    assert take_options(["d", "--against", "last", "x=1"], known) == ({"--against": "last"}, ["d", "x=1"])
    assert take_options(["--json", "--against=a=b"], known) == ({"--json": "", "--against": "a=b"}, [])
    with pytest.raises(ConfigError, match=r"--against: has no value. Say `--against RUN`"):
        take_options(["d", "--against", "--json"], known)


def test_the_first_help_fits_a_screen_and_names_every_command_and_group(tmp_path: Path) -> None:
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "of_ones_own.yaml").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "qpipe", "--config-dir", "conf", "--help"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert all(re.search(rf"^ +{name}\b", done.stdout, re.M) for name in COMMANDS)
    shipped = Path(__file__).parents[2] / "conf"
    for group in ("model", "data", "scheme", "target", "pipeline", "experiment"):
        assert re.search(rf"^  {group} ", done.stdout, re.M)
        assert all(path.stem in done.stdout for path in (shipped / group).glob("*.yaml"))
    assert "of_ones_own" in done.stdout
