"""A PipelineSpec becomes a graph: references resolved, disabled nodes bridged, and what is wrong between nodes refused.

A disabled node hands on what came in on its port of the same kind (`{bnf} -> {cle}` reads on when bnf is off); where no
such port exists the node is gone, and so is every optional port it fed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter

from qpipe.errors import ConfigError
from qpipe.language.spec import FirstWithin, NodeSpec, PipelineSpec, Ref
from qpipe.param import listed, nearest

FORM_OUTPUTS: Mapping[str, str] = {"model": "Model", "scores": "Scores"}

LONG_CIRCLE = 20
"""Nodes of a circle that are named."""

DISCOURAGED: tuple[tuple[str, str, str], ...] = (
    ("adaround", "cle", "equalization moves the grid under weights whose rounding is already tuned"),
    ("adaround", "bnf", "folding scales weights whose rounding is already tuned"),
    ("nearest", "cle", "equalization moves the grid under weights that are already rounded"),
    ("nearest", "bnf", "folding scales weights that are already rounded"),
    ("nearest", "adaround", "after rounding to nearest there is nothing left to tune"),
    ("adaround", "nearest", "the tuned weights are on the grid already"),
    ("calibrate", "bnf", "the ranges were observed on a model that folding changes"),
    ("calibrate", "cle", "the ranges were observed on a model that equalization changes"),
    ("adaround", "amp", "weights that are tuned keep their grid, so that there is little left to mix"),
    ("nearest", "amp", "weights that are rounded keep their grid, so that there is little left to mix"),
    ("amp", "calibrate", "one scheme for all would take the place of the mix"),
    ("amp", "bnf", "the mix was chosen for a model that folding changes"),
    ("amp", "cle", "the mix was chosen for a model that equalization changes"),
    ("cle", "bnf", "equalization looks for the batch norms' scales inside the weights"),
    ("adaround", "bias_correction", "the tuned rounding already carries the correction"),
    ("bias_correction", "adaround", "the correction belongs to the rounding that adaround replaces"),
)
"""(upstream stage, downstream stage, why): orders the field advises against."""


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
    if not spec.allow_discouraged:
        _refuse_discouraged(spec, order, inputs)
    named: list[tuple[Ref, str]] = [(Ref(name), f"ladder.{name}") for name in spec.ladder]
    named += [(Ref(name), "baselines") for name in spec.baselines]
    named += [
        (ref, f"goal.{key}")
        for key, ref in (("reference", spec.goal.reference), ("scores", spec.goal.scores))
        if ref
    ]
    resolved = {str(ref): source for ref, at in named if (source := _resolve(spec, ref, at, "Scores"))}
    used = set[str]().union(*needs.values())
    sinks = tuple(name for name in enabled if name not in used)
    targets = tuple(_target(spec, name) for name in spec.targets) or sinks
    disabled = tuple(name for name in spec.nodes if name not in enabled)
    return Graph(spec, inputs, order, targets, disabled, resolved)


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
    found: dict[str, tuple[Source, ...]] = {}
    for name, (ref, at, kind) in wires.items():
        source = _resolve(spec, ref, at, kind)
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


def _refuse_discouraged(
    spec: PipelineSpec, order: tuple[str, ...], inputs: Mapping[str, Mapping[str, tuple[Source, ...]]]
) -> None:
    """Refuse a rule's downstream stage where its upstream stage is in the history of the model it gets."""
    upstream_names = {first for first, _, _ in DISCOURAGED}
    history: dict[str, frozenset[str]] = {}
    for name in order:
        node = spec.nodes[name]
        came = frozenset[str]().union(
            *(history[source.node] for source in _model_sources(spec, inputs[name]))
        )
        if isinstance(node, FirstWithin):
            history[name] = came
            continue
        for first, second, why in DISCOURAGED:
            if node.stage.name == second and first in came and "Model" in node.stage.outputs.values():
                raise ConfigError(
                    f"stages.{name}: '{second}' after '{first}' is discouraged: {why}. "
                    f"Change the order, or set allow_discouraged=true."
                )
        makes_model = "Model" in node.stage.outputs.values()
        history[name] = came | ({node.stage.name} & upstream_names) if makes_model else frozenset()


def _model_sources(spec: PipelineSpec, ports: Mapping[str, tuple[Source, ...]]) -> Iterator[Source]:
    for sources in ports.values():
        for source in sources:
            if outputs_of(spec.nodes[source.node])[source.output] == "Model":
                yield source
