"""Mistakes in the config files that a person wrote: one line, with the file and the line."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qpipe.cli.config_files import config_folders, package, place
from qpipe.cli.words import arranged
from qpipe.errors import ConfigError
from tests.nursery import Nursery

HEADER = "# @package _global_\n"
NODE = "stages:\n  a: {uses: bnf, model: source}\n"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def plan(tmp_path: Path, nursery: Nursery) -> Run:
    """Plan a pipeline `mine` of this text."""

    def run(content: str | bytes, *words: str, command: str = "plan") -> subprocess.CompletedProcess[str]:
        file = tmp_path / "conf" / "pipeline" / "mine.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        arguments = [command, "--config-dir", "conf", "pipeline=mine", *words]
        return nursery.run(tmp_path, arguments, os.environ | {"QPIPE_CACHE_DIR": str(tmp_path / "cache")})

    return run


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """What it said: one line of ours, and nothing besides."""
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout, line[:7]) == (2, "", "qpipe: ")
    return line[7:]


YAML = {
    "stages:\n\tprepare: {model: source}\n": (3, "a tab"),
    "stages:\n  a: {uses: bnf\n  b: 1\n": (4, "the '{' of line 3 is not closed"),
    "stages:\n  a: [1\n": (4, "the '[' of line 3 is not closed"),
    "stages:\n  a: {model: ${x.y}}\n": (3, 'in quotes: "${…}"'),
    "stages:\n  a: 1\n  b: 2\n  a: 3\n": (5, "'a' is there twice"),
    "stages:\n  a: !foo {uses: bnf}\n": (3, "the tag '!foo'"),
    "stages:\n  no: {uses: bnf, model: source}\n": (3, "a node is called no, which YAML reads as False"),
    "stages:\n  1: {uses: bnf, model: source}\n": (3, "a node is called 1, which YAML reads as 1"),
    "stages:\n  2.5: {uses: bnf, model: source}\n": (3, "a node is called 2.5, which YAML reads as 2.5"),
    "stages:\n  ~: {uses: bnf, model: source}\n": (3, "a key is ~, which YAML reads as null"),
    "stages:\n  ? [a]\n  : {uses: bnf}\n": (3, "unhashable key"),
    "stages:\n  a: {model: *x}\n": (3, "undefined alias"),
    "a: 1\n---\nb: 2\n": (3, "another document"),
    "a: 1\nb: \x07\n": (3, "U+0007"),
    "a: " + 3000 * "[": (2, "is not closed"),
}


@pytest.mark.parametrize("content", YAML, ids=[words for _, words in YAML.values()])
def test_what_yaml_does_not_take_is_one_line_with_file_and_line(plan: Run, content: str) -> None:
    line, words = YAML[content]
    said = refused(plan(HEADER + content))
    assert said.startswith(f"conf/pipeline/mine.yaml:{line}: ")
    assert words in said


def test_a_file_that_is_no_utf8_is_one_line_with_file_and_line(plan: Run) -> None:
    said = refused(plan(HEADER.encode() + b"a: 1\nb: '\xe4'\n"))
    assert said == "conf/pipeline/mine.yaml:3: this is no text in UTF-8. Save the file as UTF-8."


INTERPOLATIONS = {
    "x: 1\nstages:\n  a: {uses: bnf, model: '${x.y.z}'}\n": ("stages.a.model", 4, "x.y"),
    "stages:\n  a: {uses: bnf, model: '${nokey}'}\n": ("stages.a.model", 3, "'${nokey}' names nothing"),
    "stages:\n  a: {uses: '${nokey}', model: source}\n": ("stages.a.uses", 3, "'${nokey}' names nothing"),
    "stages:\n  a: {uses: bnf, model: '${nores:1}'}\n": ("stages.a.model", 3, "no resolver 'nores'"),
    "x: ${y}\ny: ${x}\n" + NODE: ("x", 2, "leads back to itself"),
    "stages:\n  a: {uses: bnf, model: '${x'}\n": ("stages.a.model", 3, "cannot be read"),
    "x: ${oc.env:QPIPE_NOT_SET}\n" + NODE: ("x", 2, "'QPIPE_NOT_SET' not found"),
}


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("content", INTERPOLATIONS, ids=[words for *_, words in INTERPOLATIONS.values()])
def test_an_interpolation_that_fails_is_one_line_with_its_address(plan: Run, content: str, command: str) -> None:
    address, line, words = INTERPOLATIONS[content]
    said = refused(plan(HEADER + content, command=command))
    assert said.startswith(f"{address} (conf/pipeline/mine.yaml:{line}): ")
    assert words in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.a.enabled=${not.there}", "stages.a.enabled: the interpolation '${not.there}' names nothing"),
        ("stages.a.model=${nores:1}", "stages.a.model: there is no resolver 'nores'"),
        ("stages.a.uses={", "'stages.a.uses={' cannot be read"),
        ("--config-dri=x", "--config-dri: there is no such option. Did you mean '--config-dir'?"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_without_hydras_own(plan: Run, override: str, said: str) -> None:
    assert refused(plan(HEADER + NODE, override)).startswith(said)


def test_an_interpolation_on_the_command_line_is_resolved(plan: Run) -> None:
    done = plan(HEADER + "x: {y: false}\n" + NODE, "stages.a.enabled=${x.y}", command="run")
    assert "bnf" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("header", ["", "# my pipeline\n", "# @package global\n", "# @package pipeline\n"])
@pytest.mark.parametrize("content", [NODE, "goal: {max_drop: 0.1}\n", "- a\n"])
def test_a_pipeline_without_its_header_is_refused_with_the_way_out(plan: Run, header: str, content: str) -> None:
    if header == "# @package global\n" and content != NODE:
        return  # a name of the person's own, as far as anyone can tell
    said = refused(plan(header + content))
    below = "global" if header == "# @package global\n" else "pipeline"
    assert said == (
        f"conf/pipeline/mine.yaml: all that it says lies below '{below}', where nothing reads it. "
        "Put `# @package _global_` into its first line."
    )


def test_a_model_of_ones_own_without_its_header_is_refused(plan: Run, tmp_path: Path) -> None:
    model = tmp_path / "conf" / "model" / "mine.yaml"
    model.parent.mkdir(parents=True)
    model.write_text("model: {name: mine}\nstages: {source: {uses: load_model, path: a.onnx, data: null}}\n")
    said = refused(plan(HEADER + NODE, "model=mine"))
    assert said.startswith("conf/model/mine.yaml: all that it says lies below 'model'")


def test_names_of_ones_own_beside_the_language_are_let_through(plan: Run) -> None:
    done = plan(HEADER + "pipeline: {name: mine}\nmine: {factor: 2}\n" + NODE)
    assert done.returncode == 0, done.stderr


def test_a_file_behind_a_shipped_one_of_its_name_is_not_passed_over_in_silence(plan: Run, tmp_path: Path) -> None:
    own = tmp_path / "conf" / "scheme" / "w4a8.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("name: w4a8\n")
    said = refused(plan(HEADER + NODE, "scheme=w4a8"))
    assert said.startswith("conf/scheme/w4a8.yaml: it is not read, since scheme=w4a8 is qpipe's own. Rename the file")
    assert plan(HEADER + NODE, "scheme=w8a8").returncode == 0
    own.write_bytes((Path(__file__).parents[2] / "conf" / "scheme" / "w4a8.yaml").read_bytes())
    assert plan(HEADER + NODE, "scheme=w4a8").returncode == 0


@pytest.mark.parametrize("below", ["", ".hydra"])
def test_the_config_of_a_run_as_primary_config_leads_to_rerun(
    tmp_path: Path, nursery: Nursery, below: str
) -> None:
    folder = tmp_path / "outputs" / "one"
    (folder / ".hydra").mkdir(parents=True)
    (folder / "record.json").write_text("{}")
    for place_ in (folder, folder / ".hydra"):
        (place_ / "config.yaml").write_text("stages: {}\n")
    done = nursery.run(
        tmp_path, ["plan", "--config-dir", str(folder / below), "--config-name", "config"], dict(os.environ)
    )
    assert "since `config` is qpipe's own" in refused(done)
    assert "`qpipe rerun outputs/one`" in refused(done)


def test_options_may_stand_among_the_overrides() -> None:
    words = ["a=1", "-m", "b=2", "--config-dir", "c", "-cn=d"]
    assert arranged(words) == ["-m", "--config-dir", "c", "-cn=d", "a=1", "b=2"]
    with pytest.raises(ConfigError, match="--config-dir: has no value"):
        arranged(["a=1", "--config-dir"])


def test_folders_headers_and_places_are_read_as_hydra_and_yaml_read_them(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    words = ["--config-dir", str(tmp_path / "a"), f"hydra.searchpath=[pkg://x,file://{tmp_path}]", "-cp=/not/there"]
    assert config_folders(words) == [tmp_path / "a", tmp_path]
    file = tmp_path / "a" / "x.yaml"
    file.write_text("\n# one\n#  @package  _global_ \na:\n  b:\n  - c: 1\n")
    assert package(file) == "_global_"
    assert place("a.b[0].c", [tmp_path / "a"]) == f"{file}:6"
    assert place("a.c", [tmp_path / "a"]) == ""
