"""The labels of the closing table are made of what is enabled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from qpipe.cli.compose import quick_hydra
from qpipe.cli.main import _register
from qpipe.errors import ConfigError
from qpipe.language.graph import build_graph
from qpipe.language.labels import check_labels, steps
from qpipe.language.spec import PipelineSpec, read_spec
from tests.nursery import Nursery


@pytest.fixture(scope="module", autouse=True)
def composing() -> Iterator[None]:
    """Hydra, which reads the files once for each pipeline."""
    _register()
    with quick_hydra(), initialize_config_module("qpipe.conf", version_base="1.3"):
        yield


def spec_of(*overrides: str) -> PipelineSpec:
    return read_spec(compose("config", overrides=list(overrides)))


def labels_of(*overrides: str) -> dict[str, str]:
    spec = spec_of(*overrides)
    check_labels(spec)
    return steps(build_graph(spec))


SHIPPED = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "pipeline").glob("*.yaml"))


@pytest.mark.parametrize("pipeline", SHIPPED)
def test_no_label_names_a_stage_that_is_off(pipeline: str) -> None:
    overrides = [f"pipeline={pipeline}", "allow_discouraged=true"]
    graph = build_graph(spec_of(*overrides))
    named = " ".join(steps(graph).values())
    alike = {"select": {"select_again"}, "cle": {"norms"}, "adaround": {"adaround_again", "mixed"}}
    for name in ("bnf", "cle", "adaround", "amp", "select"):
        if name not in graph.spec.nodes:
            continue
        stage = graph.spec.nodes[name].stage.name  # type: ignore[union-attr]
        off = [f"stages.{each}.enabled=false" for each in {name} | alike.get(name, set()) & set(graph.spec.nodes)]
        found = labels_of(*overrides, *off)
        assert not any(stage in label.replace(",", " ").split() for label in found.values())
        assert all(label.strip(" +,()") == label.strip(",()").removeprefix("+ ") for label in found.values())
        assert stage in named or pipeline == "amp"  # which does not say what all of its steps have in common


def test_labels_are_those_of_the_readme_where_all_is_on() -> None:
    assert list(labels_of("pipeline=autoquant").values()) == [
        *("float", "bnf, nearest", "bnf, nearest, per channel", "+ cle, norms", "+ quantscheme_select", "+ adaround"),
        *("+ cle", "+ cle, adaround", "+ amp", "the best in onnxruntime"),
    ]
    assert labels_of("pipeline=adaround")["score"] == "cle, calibrate, adaround"


def test_what_was_chosen_stands_for_who_chose() -> None:
    graph = build_graph(spec_of("pipeline=adaround"))
    assert steps(graph, {"start": "score_calibrate"})["score"] == "cle, calibrate, adaround"
    assert steps(graph, {"start": "score_naive"})["score"] == "naive (bnf, calibrate), adaround"


@pytest.mark.parametrize(
    ("overrides", "node", "label"),
    [
        (["pipeline=ptq", "stages.cle.enabled=false"], "score", "calibrate"),
        (["pipeline=ptq", "stages.bnf.enabled=false"], "score_naive", "naive (calibrate)"),
        (["pipeline=adaround", "stages.adaround.enabled=false"], "score", "cle, calibrate"),
        (["pipeline=adaround", "stage@stages.adaround=nearest"], "score", "cle, calibrate, nearest"),
        (["pipeline=amp", "stages.adaround.enabled=false"], "score", "amp"),
        (["pipeline=autoquant", "stages.cle.enabled=false"], "score_equalized", "prepare, bnf, cle, calibrate"),
        (["pipeline=ptq", "ladder.score=null"], "score", "score"),
        (["pipeline=ptq", "ladder.score='{cle} and {bnf}'"], "score", "cle and bnf"),
    ],
)
def test_a_label_says_what_the_model_went_through(overrides: list[str], node: str, label: str) -> None:
    assert labels_of(*overrides)[node] == label


def test_a_label_of_an_unknown_node_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^ladder.score: no node 'cel'. Did you mean 'cle'\?"):
        labels_of("pipeline=ptq", "ladder.score='{cel}'")


def test_a_pipeline_without_a_ladder_shows_its_scores_and_no_goal_that_it_does_not_have(
    tmp_path: Path, nursery: Nursery
) -> None:
    file = tmp_path / "conf" / "pipeline" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(
        "# @package _global_\n"
        "stages:\n"
        "  as_it_came: {uses: evaluate, model: source, quantized: false, limit: 32}\n"
        "  by_cosine: {uses: evaluate, model: source, float_model: source, metric: cosine, limit: 32}\n"
        "targets: [as_it_came, by_cosine]\n"
    )
    environment = os.environ | {"QPIPE_CACHE_DIR": str(tmp_path / "cache")}
    words = ["--config-dir", "conf", "pipeline=mine", "run.workers=0"]
    done = nursery.run(tmp_path, words, environment)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    (top1,) = [row for row in rows if row[:1] == ["as_it_came"]]
    assert top1[2:4] == ["%", "top1"]
    assert float(top1[1]) > 90
    assert ["by_cosine", "1.0000", "cosine"] in [row[:3] for row in rows]
    assert "goal" not in done.stdout
    (page,) = tmp_path.glob("outputs/*/*/report.html")
    assert "<td>as_it_came</td>" in page.read_text()
    words.append("goal={reference: by_cosine, scores: as_it_came, max_drop: 0.5}")
    assert "goal met" in nursery.run(tmp_path, words, environment).stdout
