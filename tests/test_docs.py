"""The pages in docs/ tell the truth: their CI recipes run, step by step, in a folder that is all a runner has."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qpipe.cli.cache_commands import COMMANDS as CACHE_COMMANDS
from qpipe.cli.manual import COMMANDS
from qpipe.language.spec import RunSpec
from qpipe.run.sweep import BUDGET_SPENT, GOAL_MISSED, NOT_CACHED
from tests.toy import Toy

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
CHAIN = {
    "a": {"uses": "toy_number", "value": 3},
    "b": {"uses": "toy_add", "scores": "a", "seconds": 0.2},
    "c": {"uses": "toy_add", "scores": "b"},
}
PIPELINE = "--config-dir conf pipeline=toy ~model ~data"


def recipe(name: str) -> dict[str, Any]:
    """The YAML of docs/ci.md that begins with the comment `# name`."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), re.DOTALL)
    (text,) = [block for block in blocks if block.startswith(f"# {name}")]
    return dict(yaml.safe_load(text))


class Runner:
    """A machine of a CI service, new for every job: a checkout, `qpipe` on the path, and what the service keeps."""

    def __init__(self, toy: Toy, kept: Path) -> None:
        self.toy, self.kept = toy, kept
        tools = toy.folder / "bin"
        tools.mkdir(exist_ok=True)
        (tools / "qpipe").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m qpipe "$@"\n')
        (tools / "qpipe").chmod(0o755)
        self.environment = toy.environment | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        del self.environment["QPIPE_CACHE_DIR"]

    def checkout(self, name: str) -> Path:
        folder = self.toy.folder / "jobs" / name
        shutil.copytree(self.toy.folder / "conf", folder / "conf")
        return folder

    def shell(self, script: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-eo", "pipefail", "-c", script],
            cwd=folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def github(
        self, name: str, event: str, branch: str, change: str = "", workflow_name: str = "quantize"
    ) -> list[tuple[str, int]]:
        """(name, exit status) of every shell step of the recipe that ran."""
        workflow = recipe(f".github/workflows/{workflow_name}.yml")
        folder = self.checkout(name)
        environment = {str(key): str(value) for key, value in workflow["env"].items()}
        environment["PIPELINE"] = f"{PIPELINE} {change}".strip()
        if "REMOTE" in environment:
            environment["REMOTE"] = f"file://{self.toy.folder}/shared"
        done: list[tuple[str, int]] = []
        for step in workflow["jobs"]["quantize"]["steps"]:
            failed = any(status for _, status in done)
            if not self._is_wanted(step.get("if"), event, branch, failed):
                continue
            if "run" not in step:
                self._action(step, folder)
            elif step["name"] != "Install":  # what it installs is here
                run = self.shell(step["run"], folder, environment)
                done.append((step["name"], run.returncode))
        return done

    def _is_wanted(self, condition: str | None, event: str, branch: str, failed: bool) -> bool:
        known = {
            "github.event_name == 'pull_request'": event == "pull_request",
            "github.ref == 'refs/heads/main'": branch == "main",
            "always()": True,
        }
        terms = (condition or "").split(" && ") if condition else []
        assert set(terms) <= set(known), f"the test does not know the condition {condition!r}"
        return all(known[term] for term in terms) and (not failed or "always()" in terms)

    def _action(self, step: dict[str, Any], folder: Path) -> None:
        """What the service's own actions do: keep a file, bring it back."""
        action = step["uses"].partition("@")[0]
        if action == "actions/cache/restore" and self.kept.exists():
            shutil.copy(self.kept, folder / step["with"]["path"])
        elif action == "actions/cache/save":
            shutil.copy(folder / step["with"]["path"], self.kept)
        else:
            assert action.startswith(("actions/", "aws-actions/"))


@pytest.fixture
def runner(toy: Toy) -> Runner:
    toy.pipeline(CHAIN)
    return Runner(toy, toy.folder / "kept.zip")


@pytest.mark.slow
def test_the_github_recipe_carries_the_cache_from_main_to_a_pull_request(runner: Runner) -> None:
    first = runner.github("first", "push", "main")
    assert [status for _, status in first] == [0] * len(first)
    assert [name for name, _ in first][-1] == "Pack"
    assert [name for name in runner.toy.calls() if name != "tick"] == ["number", "add", "add"]
    saved = runner.kept.read_bytes()
    unchanged = runner.github("unchanged", "pull_request", "topic")
    assert [status for _, status in unchanged] == [0] * len(unchanged)
    assert runner.toy.calls() == [], "all came from the archive"
    assert runner.kept.read_bytes() == saved, "a pull request saves nothing"
    changed = runner.github("changed", "pull_request", "topic", "stages.c.amount=5")
    assert all(status == 0 for _, status in changed)
    assert runner.toy.calls() == ["add"]


def test_the_gate_of_the_github_recipe_stops_a_pull_request_before_anything_runs(runner: Runner) -> None:
    fan = {f"n{i}": {"uses": "toy_number", "value": i} for i in range(13)}
    runner.toy.pipeline(fan)
    done = runner.github("much", "pull_request", "topic")
    assert done[-1] == ("A pull request may not compute much", NOT_CACHED)
    assert runner.toy.calls() == []


@pytest.mark.slow
def test_what_a_failed_job_on_main_made_is_kept(runner: Runner) -> None:
    runner.toy.pipeline({**CHAIN, "bad": {"uses": "toy_boom", "scores": "c"}})
    done = dict(runner.github("failing", "push", "main"))
    assert done["Run"] == 1
    assert done["Pack"] == 0
    runner.toy.calls()
    runner.toy.pipeline(CHAIN)
    assert all(status == 0 for _, status in runner.github("repaired", "push", "main"))
    assert runner.toy.calls() == []


def test_a_pull_request_reads_the_shared_cache_and_writes_nothing_to_it(runner: Runner) -> None:
    shared = runner.toy.folder / "shared"
    first = runner.github("first", "push", "main", workflow_name="shared")
    assert [status for _, status in first] == [0]
    runner.toy.calls()
    before = sorted(str(path) for path in shared.rglob("*"))
    assert len(before) > 6
    changed = runner.github("changed", "pull_request", "topic", "stages.c.amount=5", workflow_name="shared")
    assert [status for _, status in changed] == [0]
    assert runner.toy.calls() == ["add"], "the rest came from the shared cache"
    assert sorted(str(path) for path in shared.rglob("*")) == before


@pytest.mark.slow
def test_the_gitlab_recipe_runs_and_finds_its_cache_again(runner: Runner) -> None:
    job = recipe(".gitlab-ci.yml")
    paths = job["quantize"]["cache"]["paths"]
    for name, calls in (("one", ["number", "add", "add"]), ("two", [])):
        folder = runner.checkout(name)
        for path in paths:
            if name == "two":
                shutil.copytree(runner.toy.folder / "jobs" / "one" / path, folder / path)
        environment = {key: value.replace("$CI_PROJECT_DIR", str(folder)) for key, value in job["variables"].items()}
        environment["PIPELINE"] = PIPELINE
        for line in job["quantize"]["script"]:
            run = runner.shell(line, folder, environment)
            assert run.returncode == 0, run.stdout + run.stderr
        assert [call for call in runner.toy.calls() if call != "tick"] == calls


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"`qpipe cache (\w+)", text):
        assert name in CACHE_COMMANDS
    for name in re.findall(r"(?:`|\$ )qpipe (\w+)(?=[ `])(?!=)", text):
        assert name in COMMANDS
    for name in re.findall(r"run\.(\w+)=", text):
        assert name in RunSpec.__dataclass_fields__
    for link, _, anchor in re.findall(r"\]\(((?!http)[^)#]*)(#([^)]*))?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings]


def test_the_pipeline_of_the_page_on_goals_plans(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "pipelines.md").read_text(), re.DOTALL)
    file = tmp_path / "conf" / "pipeline" / "judged.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(block)
    done = subprocess.run(
        [sys.executable, "-m", "qpipe", "plan", "--config-dir", "conf", "pipeline=judged"],
        cwd=tmp_path, env=os.environ | {"QPIPE_CACHE_DIR": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert " score_float " in done.stdout


def test_what_a_gate_refuses_is_said_on_standard_error(toy: Toy) -> None:
    """The recipe sends the plan to /dev/null."""
    toy.pipeline(CHAIN)
    for command, said in (("plan", "run.max_misses=2"), ("run", "run.max_misses=2"), ("plan", "run.expect=cached")):
        done = toy.run(command, said)
        assert done.returncode == NOT_CACHED
        assert done.stderr.splitlines()[-1].startswith(f"{said}: 3 nodes would run")
        assert "would run, " not in done.stdout


def test_the_statuses_are_those_of_the_page() -> None:
    text = (ROOT / "docs" / "ci.md").read_text()
    assert re.search(rf"`run.expect=cached`.*\| {NOT_CACHED} \|", text)
    assert re.search(rf"`run.max_misses=N`.*\| {NOT_CACHED} \|", text)
    assert re.search(rf"`run.budget_s=S`.*\| {BUDGET_SPENT} \|", text)
    assert f"{GOAL_MISSED} the goal was not met" in text
