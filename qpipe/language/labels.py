"""What the steps of the closing table are called: a label says what was done to the model, so it is made of what is.

In a label of `ladder`, `{cle}` stands for the stage of the node `cle`, and goes with its comma where that node is
disabled; a first_within stands for the label of what it chose. A node without a label is called by its name; without a
ladder, every node that scores a model is a step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qpipe.errors import ConfigError
from qpipe.language.graph import Graph, outputs_of
from qpipe.language.spec import FirstWithin, PipelineSpec
from qpipe.param import listed, nearest

_NAMED = re.compile(r"\{([^{}]*)\}")
_GONE = re.compile(r"\0, |, \0|\0")
_NOT_STEPS = ("parity", "cost")
"""Stages that give scores to a model, and have a section of their own in a report."""


def steps(graph: Graph, chosen: Mapping[str, str] | None = None) -> dict[str, str]:
    """{node: its label} of the closing table, in its order: the ladder's, else of every node that scores a model.
    `chosen`: first_within -> the node that scored what it chose."""
    scored: Mapping[str, str | None] = {name: None for name in graph.inputs if _scores(graph, name)}
    ladder = graph.spec.ladder or scored
    return {name: label(graph, name, said, chosen or {}) for name, said in ladder.items()}


def label(graph: Graph, name: str, said: str | None, chosen: Mapping[str, str]) -> str:
    """The label `said` of the node `name`, made of what is enabled."""
    if said is None or name not in graph.inputs:
        return name

    def stage(found: re.Match[str]) -> str:
        node = graph.spec.nodes[found[1]]
        if not node.enabled:
            return "\0"
        if not isinstance(node, FirstWithin):
            return node.stage.name
        scored = chosen.get(node.name, node.candidates[-1].scores.node)  # before it has chosen, as if it were the last
        return label(graph, scored, graph.spec.ladder.get(scored), chosen)

    made = _GONE.sub("", _NAMED.sub(stage, said))
    made = " ".join(made.replace("()", "").split())
    return made if re.search(r"\w", made) else ", ".join(_history(graph, name)) or name


def check_labels(spec: PipelineSpec) -> None:
    """Refuse a label that names a node that there is not. Errors: ConfigError."""
    for name, said in spec.ladder.items():
        for named in _NAMED.findall(said or ""):
            if named not in spec.nodes:
                raise ConfigError(
                    f"ladder.{name}: no node '{named}'.{nearest(named, spec.nodes)} Nodes: {listed(spec.nodes)}."
                )


def _scores(graph: Graph, name: str) -> bool:
    node = graph.node(name)
    if isinstance(node, FirstWithin) or node.stage.name in _NOT_STEPS:
        return False
    takes = {port.kind for port in node.stage.ports.values()}
    return "Model" in takes and set(node.stage.outputs.values()) == {"Scores"}


def _history(graph: Graph, name: str) -> list[str]:
    """The stages that the model went through which the node `name` scores, the first of them first."""
    found: list[str] = []
    while True:
        wires = [
            source
            for sources in graph.inputs[name].values()
            for source in sources
            if outputs_of(graph.node(source.node))[source.output] == "Model"
        ]
        if not wires:
            return found[::-1][1:]  # without what made the model
        name = wires[0].node
        node = graph.node(name)
        found.append(name if isinstance(node, FirstWithin) else node.stage.name)
