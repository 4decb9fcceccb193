"""A PipelineSpec becomes a graph: references resolved, disabled nodes bridged, and what is wrong between nodes refused.

A disabled node hands on what came in on its port of the same kind (`{bnf} -> {cle}` reads on when bnf is off); where no
such port exists the node is gone, and so is every optional port it fed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter

from qpipe.errors import ConfigError, InputError
from qpipe.language.spec import FirstWithin, NodeSpec, PipelineSpec, Ref
from qpipe.param import listed, nearest
from qpipe.stage import Maker, Stage

FORM_OUTPUTS: Mapping[str, str] = {"model": "Model", "scores": "Scores"}

EXPORTER = "export"
"""The stage whose files are measured."""

LONG_CIRCLE = 20
"""Nodes of a circle that are named."""

@dataclasses.dataclass(frozen=True)
class Source:
    """An output of an enabled node."""

    node: str
    output: str


@dataclasses.dataclass(frozen=True)
class Graph:
    """Enabled nodes, what feeds each of their ports, a topological order, and the nodes that are asked for."""

    spec: PipelineSpec
    inputs: Mapping[str, Mapping[str, tuple[Source, ...]]]
    order: tuple[str, ...]
    targets: tuple[str, ...]
    disabled: tuple[str, ...]
    resolved_refs: Mapping[str, Source]

    def node(self, name: str) -> NodeSpec | FirstWithin:
        return self.spec.nodes[name]

    @property
    def exporters(self) -> tuple[str, ...]:
        """The targets that export a model."""
        nodes = (self.node(name) for name in self.targets)
        return tuple(node.name for node in nodes if isinstance(node, NodeSpec) and node.stage.name == EXPORTER)

    def edges(self) -> list[tuple[str, str, str]]:
        """(source, target, port) of every edge, in order."""
        return [
            (source.node, target, port)
            for target, ports in self.inputs.items()
            for port, sources in ports.items()
            for source in sources
        ]


def build_graph(spec: PipelineSpec) -> Graph:
    """The graph of `spec`. Errors: ConfigError for a dangling reference, an unknown output, a kind that does not fit, a
    cycle, a discouraged order, an unknown target."""
    enabled = {name: node for name, node in spec.nodes.items() if node.enabled}
    inputs = {name: _inputs(spec, node) for name, node in enabled.items()}
    needs = {
        name: {source.node for sources in ports.values() for source in sources}
        for name, ports in inputs.items()
    }
    order = _order(needs)
    _refuse_what_is_wired(enabled, inputs)
    if not spec.allow_discouraged:
        _refuse_discouraged(spec, order, inputs)
    named: list[tuple[Ref, str]] = [(Ref(name), f"ladder.{name}") for name in spec.ladder]
    named += [(Ref(name), "baselines") for name in spec.baselines]
    goal = {"reference": spec.goal.reference, "scores": spec.goal.scores, "deployed": spec.goal.deployed}
    named += [(ref, f"goal.{key}") for key, ref in goal.items() if ref]
    resolved = {str(ref): source for ref, at in named if (source := _resolve(spec, ref, at, "Scores"))}
    used = set[str]().union(*needs.values())
    sinks = tuple(name for name in enabled if name not in used)
    targets = tuple(_target(spec, name) for name in spec.targets) or sinks
    disabled = tuple(name for name in spec.nodes if name not in enabled)
    graph = Graph(spec, inputs, order, targets, disabled, resolved)
    _refuse_limits_of_nothing(graph)
    return graph


def _refuse_limits_of_nothing(graph: Graph) -> None:
    goal = graph.spec.goal
    sizes = (goal.max_size, goal.max_size_bytes)
    asked = {"max_latency": goal.max_latency, "max_size": next((size for size in sizes if size is not None), None)}
    for name, limit in asked.items():
        if limit is not None and not graph.exporters:
            raise ConfigError(
                f"goal.{name}: none of the targets exports a model, so that nothing is measured. Add a node that uses "
                f"'{EXPORTER}', or leave the limit out."
            )


def outputs_of(node: NodeSpec | FirstWithin) -> Mapping[str, str]:
    """{output name: kind} of a node."""
    return FORM_OUTPUTS if isinstance(node, FirstWithin) else node.stage.outputs


def _target(spec: PipelineSpec, name: str) -> str:
    if name not in spec.nodes:
        raise ConfigError(
            f"targets: no node '{name}'.{nearest(name, spec.nodes)} Nodes: {listed(spec.nodes)}."
        )
    if not spec.nodes[name].enabled:
        raise ConfigError(f"targets: node '{name}' is disabled. Enable it or take it out of the targets.")
    return name


def _inputs(spec: PipelineSpec, node: NodeSpec | FirstWithin) -> dict[str, tuple[Source, ...]]:
    if isinstance(node, FirstWithin):
        return _form_inputs(spec, node)
    wired: dict[str, tuple[Source, ...]] = {}
    for name, refs in node.ports.items():
        port = node.stage.ports[name]
        address = f"stages.{node.name}.{name}"
        sources = [_resolve(spec, ref, address, port.kind) for ref in refs]
        found = tuple(source for source in sources if source)
        if len(found) != len(sources) and not (port.optional or (port.many and found)):
            gone = next(ref for ref, source in zip(refs, sources, strict=True) if source is None)
            raise ConfigError(
                f"{address}: node '{gone.node}' is disabled and has no {port.kind} to hand on. Enable it."
            )
        wired[name] = found
    return wired


def _form_inputs(spec: PipelineSpec, node: FirstWithin) -> dict[str, tuple[Source, ...]]:
    address = f"stages.{node.name}"
    wires = {"reference": (node.reference, f"{address}.reference", "Scores")}
    for i, candidate in enumerate(node.candidates):
        wires[f"candidates[{i}].model"] = (candidate.model, f"{address}.candidates[{i}].model", "Model")
        wires[f"candidates[{i}].scores"] = (candidate.scores, f"{address}.candidates[{i}].scores", "Scores")
        if candidate.cost is not None:
            wires[f"candidates[{i}].cost"] = (candidate.cost, f"{address}.candidates[{i}].cost", "Scores")
    found: dict[str, tuple[Source, ...]] = {}
    for name, (ref, at, kind) in wires.items():
        source = _resolve(spec, ref, at, kind)
        if source is None and name.endswith(".cost"):
            continue
        if source is None:
            raise ConfigError(f"{at}: node '{ref.node}' is disabled and has no {kind} to hand on. Enable it.")
        found[name] = (source,)
    return found


def _resolve(spec: PipelineSpec, ref: Ref, address: str, kind: str) -> Source | None:
    """The enabled output behind `ref`; None where a disabled node leaves nothing. Checks that its kind is `kind`."""
    seen: dict[str, None] = {}
    while True:
        if ref.node not in spec.nodes:
            raise ConfigError(
                f"{address}: no node '{ref.node}'.{nearest(ref.node, spec.nodes)} Nodes: {listed(spec.nodes)}."
            )
        node = spec.nodes[ref.node]
        output = _output(node, ref, address, kind)
        if node.enabled:
            return Source(ref.node, output)
        through = _bridge(node, outputs_of(node)[output])
        if through is None:
            return None
        if through.node in seen:
            raise ConfigError(f"{address}: disabled nodes lead in a circle: {' -> '.join(seen)}.")
        seen[through.node] = None
        ref = through


def _output(node: NodeSpec | FirstWithin, ref: Ref, address: str, kind: str) -> str:
    outputs = outputs_of(node)
    if ref.output is None:
        fitting = [name for name, made in outputs.items() if made == kind]
        if len(fitting) == 1:
            return fitting[0]
        made = listed(f"{name} ({made})" for name, made in outputs.items())
        if fitting:
            raise ConfigError(
                f"{address}: node '{ref.node}' has several outputs of kind {kind}: {made}. Name one."
            )
        raise ConfigError(f"{address}: takes a {kind}, and node '{ref.node}' makes {made}.")
    if ref.output not in outputs:
        raise ConfigError(
            f"{address}: node '{ref.node}' has no output '{ref.output}'.{nearest(ref.output, outputs)} "
            f"Its outputs: {listed(outputs)}."
        )
    if outputs[ref.output] != kind:
        raise ConfigError(f"{address}: takes a {kind}, and '{ref}' is a {outputs[ref.output]}.")
    return ref.output


def _bridge(node: NodeSpec | FirstWithin, kind: str) -> Ref | None:
    if isinstance(node, FirstWithin):
        return None
    for name, refs in node.ports.items():
        if node.stage.ports[name].kind == kind and len(refs) == 1:
            return refs[0]
    return None


def _order(needs: Mapping[str, set[str]]) -> tuple[str, ...]:
    try:
        return tuple(TopologicalSorter(needs).static_order())
    except CycleError as error:
        names = error.args[1]
        if len(names) > LONG_CIRCLE:
            names = [
                *names[: LONG_CIRCLE // 2],
                f"… {len(names) - LONG_CIRCLE} more …",
                *names[-LONG_CIRCLE // 2 :],
            ]
        circle = " -> ".join(names)
        raise ConfigError(
            f"stages: the nodes {circle} feed one another in a circle. Cut one wire."
        ) from error


def _refuse_what_is_wired(
    enabled: Mapping[str, NodeSpec | FirstWithin], inputs: Mapping[str, Mapping[str, tuple[Source, ...]]]
) -> None:
    """Refuse what a stage knows cannot go well with the nodes on its ports."""
    for name, node in enabled.items():
        if isinstance(node, FirstWithin) or node.stage.wired is None:
            continue
        makers = {
            port: tuple(
                Maker("first_within", {}) if isinstance(made, FirstWithin) else Maker(made.stage.name, made.params)
                for made in (enabled[source.node] for source in sources)
            )
            for port, sources in inputs[name].items()
        }
        try:
            node.stage.wired(node.params, makers)
        except (ValueError, InputError) as error:
            raise ConfigError(f"stages.{name}: {error}") from error


def _refuse_discouraged(
    spec: PipelineSpec, order: tuple[str, ...], inputs: Mapping[str, Mapping[str, tuple[Source, ...]]]
) -> None:
    """Refuse a stage where the model that it gets went through one that either of the two says it should not."""
    history: dict[str, Mapping[str, Stage]] = {}
    for name in order:
        node = spec.nodes[name]
        came: dict[str, Stage] = {}
        for source in _model_sources(spec, inputs[name]):
            came |= history[source.node]
        history[name] = came
        if isinstance(node, FirstWithin):
            continue
        if "Model" not in node.stage.outputs.values():
            history[name] = {}
            continue
        orders = {**node.stage.not_after}
        orders |= {first: why for first in came if (why := came[first].not_before.get(node.stage.name))}
        for first, why in orders.items():
            if first in came:
                raise ConfigError(
                    f"stages.{name}: '{node.stage.name}' after '{first}' is discouraged: {why}. "
                    f"Change the order, or set allow_discouraged=true."
                )
        history[name] = {**came, node.stage.name: node.stage}


def _model_sources(spec: PipelineSpec, ports: Mapping[str, tuple[Source, ...]]) -> Iterator[Source]:
    for sources in ports.values():
        for source in sources:
            if outputs_of(spec.nodes[source.node])[source.output] == "Model":
                yield source
