"""Graph x cache -> verdicts with reasons. Nothing here writes.

A `Walk` goes through one graph as far as the cache carries it: every node whose inputs are known gets a verdict from
`decide`, hits pass their outputs on, and what has to run comes back as actions. The executor runs those, tells the walk
(`finish`, `fail`) and asks again; `qpipe plan` asks once and stops there. So a dry run and a real one cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qpipe.artifacts.artifact import FORMAT, Artifact, Scores, load
from qpipe.cache.store import Store
from qpipe.errors import ConfigError, InputError, QpipeError
from qpipe.keys.changes import differences, digests_in, listing
from qpipe.keys.code import CodeIndex
from qpipe.keys.companions import content
from qpipe.keys.hashing import digest, stamp
from qpipe.language.graph import Graph, Source
from qpipe.language.spec import FirstWithin, NodeSpec
from qpipe.param import is_factory, listed
from qpipe.plan.history import expected_s, previous_key, previous_result
from qpipe.stage import Stage

State = Literal["hit", "ran", "failed", "skipped", "not_needed", "run", "wait"]


@dataclasses.dataclass(frozen=True)
class Action:
    """What has to run: the node that asks, its key and what the key was made of, and the artifacts on its ports."""

    node: str
    stage: str
    key: str
    ingredients: Mapping[str, Any]
    written: Mapping[str, Any]
    inputs: Mapping[str, tuple[Artifact, ...]]
    reasons: tuple[str, ...]
    always: bool = False
    """What stands under the key does not count, and is replaced."""
    expected_s: float | None = None
    stamps: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """For each param that holds paths, `Keyring.stamp` of what lies there, taken after it was read for the key."""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the result is to keep for `qpipe why`: the node, what made its inputs, and `Keyring.listings`."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a node ended. `result` is the action result behind it, `chosen` the model and the
    scores that a first_within settled on."""

    state: State
    outputs: Mapping[str, Artifact] = dataclasses.field(default_factory=dict)
    key: str | None = None
    reasons: tuple[str, ...] = ()
    result: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    ingredients: Mapping[str, Any] | None = None
    chosen: tuple[Source, Source] | None = None

    @property
    def good(self) -> bool:
        return self.state in ("hit", "ran")


class Keyring:
    """Makes the ingredients of keys; remembers, within one run, what it has hashed."""

    def __init__(self, store: Store, search_path: Path | None = None) -> None:
        self._memo = store.index.memo("file")
        self._code = CodeIndex(store.index.memo("code"))
        self._search_path = search_path or Path.cwd()
        self._stages: dict[str, dict[str, Any]] = {}
        self._parts: dict[str, Mapping[str, str | None]] = {}
        self._listings: dict[str, str] = {}

    def ingredients(self, node: NodeSpec, inputs: Mapping[str, tuple[Artifact, ...]]) -> dict[str, Any]:
        """All that the result of `node` depends on, as JSON; its digest is the action key."""
        return {
            **self._of_stage(node),
            "params": {name: self._param(node, name) for name in sorted(node.params)},
            "ports": {
                port: [artifact.digest for artifact in artifacts]
                for port, artifacts in sorted(inputs.items())
            },
        }

    def stale(self, result: Mapping[str, Any]) -> list[str]:
        """The modules that a result names beside its key, since they were loaded by names made as it ran, and that are
        something else by now."""
        also = result.get("also", {})
        if not isinstance(also, Mapping):
            return ["?"]
        return [name for name, made in also.items() if self._code.module(name, self._search_path) != made]

    def stamps(self, node: NodeSpec) -> dict[str, str]:
        """Param -> what tells whether the files that it names are written to from now on."""
        found = {name: list(_paths_in(value)) for name, value in node.params.items()}
        return {name: self._stamp(paths) for name, paths in found.items() if paths}

    def changed(self, node: NodeSpec, action: Action) -> list[str]:
        """The params of `node` that name files which are no longer what the key of `action` was made of, or were
        written to meanwhile."""
        before = action.ingredients["params"]
        found = []
        for name, paths in ((name, list(_paths_in(value))) for name, value in node.params.items()):
            try:
                same = not paths or (
                    self._stamp(paths) == action.stamps.get(name) and self._param(node, name) == before[name]
                )
            except QpipeError:
                same = False
            if not same:
                found.append(name)
        return found

    def _stamp(self, paths: Sequence[Path]) -> str:
        try:
            return digest([stamp(self._search_path / path) for path in paths])
        except OSError:
            return "gone"

    def listings(self, ingredients: Mapping[str, Any]) -> dict[str, str]:
        """What the digests among `ingredients` are made of, as far as this keyring made them: {digest: text}, a line
        for each module of a code digest and for each file of a path's content. Of more than 2,000 files, nothing."""
        found = {}
        for made in digests_in(ingredients):
            if made in self._parts:
                self._listings[made] = listing(self._parts.pop(made))
            if text := self._listings.get(made):
                found[made] = text
        return found

    def _of_stage(self, node: NodeSpec) -> dict[str, Any]:
        stage = node.stage
        if stage.name not in self._stages:
            code = self._code.digest(*stage.modules)
            self._parts[code] = self._code.modules(*stage.modules)
            self._stages[stage.name] = {
                "format": FORMAT,
                "stage": stage.name,
                "version": stage.version,
                "function": stage.origin,
                "code": code,
                "libraries": self._code.libraries(*stage.modules),
            }
        return self._stages[stage.name]

    def _param(self, node: NodeSpec, name: str) -> Any:
        value = node.params[name]
        if isinstance(value, str) and ":" in value and is_factory(node.stage.params[name].hint):
            try:
                code = self._code.digest_factory(value, self._search_path)
            except ConfigError as error:
                raise ConfigError(f"stages.{node.name}.{name}: {error}") from error
            self._parts[code] = self._code.factory_parts(value, self._search_path)
            return {"function": value.partition(":")[2], "code": code}
        return self._content(value, f"stages.{node.name}.{name}")

    def _content(self, value: Any, address: str) -> Any:
        """`value` as JSON, with paths replaced by the digest of what lies there."""
        if isinstance(value, Path):
            return {"content": self._path(value, address)}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(key): self._content(item, f"{address}.{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._content(item, address) for item in value]
        return value

    def _path(self, path: Path, address: str) -> str:
        try:
            made, files = content(path if path.is_absolute() else self._search_path / path, self._memo)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{address}: no file or folder at '{path}'. Give the path of an existing one."
            ) from error
        except OSError as error:
            raise InputError(f"{address}: cannot read '{path}': {error.strerror or error}.") from error
        self._parts[made] = files
        return made


def _paths_in(value: Any) -> Iterator[Path]:
    """Every path in the value of a param, as `Keyring` reads it."""
    if isinstance(value, Path):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _paths_in(getattr(value, field.name))
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _paths_in(item)


def decide(
    node: NodeSpec, inputs: Mapping[str, tuple[Artifact, ...]], keyring: Keyring, store: Store
) -> Outcome | Action:
    """A hit as its Outcome, or the Action that has to run, with the reasons why."""
    ingredients = keyring.ingredients(node, inputs)
    key = digest("action", ingredients)
    result = None if node.stage.always else store.result(key)
    missing: list[str] = []
    stale: list[str] = []
    strange = result is not None and not fits(result, node.stage)
    if result is not None and not strange:
        missing, stale = store.complete(result), keyring.stale(result)
        if not missing and not stale:
            return hit(key, result, ingredients=ingredients)
    previous = previous_result(store, node.stage.name, node.name)
    if node.stage.always:
        reasons: tuple[str, ...] = ("reads the outside world every time",)
    elif strange:
        reasons = ("what the cache holds under its key was made by no such stage",)
    elif stale:
        reasons = (f"code changed: module {listed(stale)}, which it loaded by a name made as it ran",)
    elif missing:
        reasons = (f"cached result lost {len(missing)} of its blobs",)
    else:
        last = previous_key(store, node.stage.name, node.name)
        reasons = () if last == key else reasons_to_run(previous, ingredients, keyring, last is not None)
    expected = expected_s(store, node.stage.name, node.name)
    return Action(
        node.name,
        node.stage.name,
        key,
        ingredients,
        node.written,
        inputs,
        reasons or ("result evicted",),
        node.stage.always or bool(stale),
        expected,
        keyring.stamps(node),
    )


def fits(result: Mapping[str, Any], stage: Stage) -> bool:
    """Whether a result has the outputs of `stage`: whoever can write to the cache may have made it up."""
    return {name: output["kind"] for name, output in result["outputs"].items()} == dict(stage.outputs)


def reasons_to_run(
    previous: Mapping[str, Any] | None, ingredients: Mapping[str, Any], keyring: Keyring, ran: bool = False
) -> tuple[str, ...]:
    """What changed since the previous result; empty where it only went missing. `ran` tells of a last run under another
    key, whose result may be gone."""
    if previous is None:
        return ("its last result was of another key, and is gone from the cache" if ran else "never run",)
    kept = previous["provenance"].get("listings", {})
    return tuple(differences(previous["ingredients"], ingredients, kept, keyring.listings(ingredients)))


def hit(
    key: str,
    result: Mapping[str, Any],
    state: State = "hit",
    reasons: tuple[str, ...] = (),
    ingredients: Mapping[str, Any] | None = None,
) -> Outcome:
    """The Outcome of a node whose action result is at hand."""
    outputs = {name: Artifact(**fields) for name, fields in result["outputs"].items()}
    return Outcome(state, outputs, key, reasons, result, ingredients=ingredients)


class Walk:
    """One graph on its way through the cache: what is settled, what is asked for, what has to run."""

    def __init__(self, graph: Graph, keyring: Keyring, store: Store, label: str = "") -> None:
        self.graph = graph
        self.label = label
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict[str, Action] = {}
        self._keyring = keyring
        self._store = store
        self._missing: dict[str, set[str]] = {}
        self._dependents: dict[str, list[str]] = {}
        self._asked: dict[str, int] = {}
        self._judged: dict[str, dict[int, float]] = {}
        """Of each first_within, the scores of the candidates so far, by their place."""
        self._ready: deque[str] = deque()
        self._demand(graph.targets)

    def advance(self) -> list[Action]:
        """Settle all that the cache settles; the actions that have to run now, each returned once."""
        actions: list[Action] = []
        foretold = 0
        while self._ready:
            if self._store.is_far and not foretold:
                self._store.expect(self._keys_of_ready())
                foretold = len(self._ready)
            foretold = max(foretold - 1, 0)
            name = self._ready.popleft()
            node = self.graph.node(name)
            if isinstance(node, FirstWithin):
                self._choose(node)
            elif any(not self._outcome(source).good for source in self._sources(name)):
                self._skip(name)
            else:
                verdict = decide(node, self.inputs(name), self._keyring, self._store)
                if isinstance(verdict, Action):
                    action = dataclasses.replace(verdict, provenance=self._provenance(verdict))
                    self.running[name] = action
                    actions.append(action)
                else:
                    self._settle(name, verdict)
        return actions

    def _keys_of_ready(self) -> list[str]:
        """The keys of the nodes that are decided next."""
        keys = []
        for name in self._ready:
            node = self.graph.node(name)
            if isinstance(node, NodeSpec) and all(self._outcome(source).good for source in self._sources(name)):
                keys.append(digest("action", self._keyring.ingredients(node, self.inputs(name))))
        return keys

    def finish(self, name: str, result: Mapping[str, Any], state: State = "ran") -> None:
        """The action of `name` has its result."""
        action = self.running.pop(name)
        self._settle(name, hit(action.key, result, state, action.reasons, action.ingredients))

    def fail(self, name: str, error: Mapping[str, Any]) -> None:
        """The action of `name` failed; `error` holds message, exit_code and, where there is one, traceback."""
        action = self.running.pop(name)
        self._settle(
            name,
            Outcome(
                "failed",
                key=action.key,
                reasons=action.reasons,
                error=error,
                ingredients=action.ingredients,
            ),
        )

    def changed(self, action: Action) -> list[str]:
        """The params of an action whose files were written to since its key was made."""
        node = self.graph.node(action.node)
        assert isinstance(node, NodeSpec)
        return self._keyring.changed(node, action)

    def verdicts(self) -> dict[str, Outcome]:
        """An outcome for every enabled node: settled ones as they are, running ones `run`, asked-for ones `wait`, and
        the rest `not_needed`."""
        found: dict[str, Outcome] = {}
        for name in self.graph.inputs:
            if name in self.outcomes:
                found[name] = self.outcomes[name]
            elif name in self.running:
                action = self.running[name]
                found[name] = Outcome(
                    "run", key=action.key, reasons=action.reasons, ingredients=action.ingredients
                )
            elif name in self._missing:
                inputs = listed(self._missing[name])
                found[name] = Outcome("wait", reasons=(f"its inputs are not known yet: {inputs}",))
            else:
                found[name] = Outcome(
                    "not_needed", reasons=("asked for only if the candidates before it miss the goal",)
                )
        return found

    def unwired(self, node: NodeSpec) -> dict[str, Any]:
        """The ingredients of a node whose inputs are not known yet: all but `ports`, which is empty."""
        return self._keyring.ingredients(node, {})

    def listings(self, ingredients: Mapping[str, Any]) -> dict[str, str]:
        """`Keyring.listings` of the keyring that made them."""
        return self._keyring.listings(ingredients)

    def scores(self, source: Source) -> dict[str, Any] | None:
        """The values of a Scores output, once it is there."""
        outcome = self.outcomes.get(source.node)
        if outcome is None or not outcome.good:
            return None
        return read_scores(outcome.outputs[source.output], self._store)

    def maker(self, source: Source) -> Source:
        """The node behind an output: of a first_within that has chosen, what it chose."""
        while (outcome := self.outcomes.get(source.node)) is not None and outcome.chosen is not None:
            model, scores = outcome.chosen
            source = model if source.output == "model" else scores
        return source

    def _provenance(self, action: Action) -> dict[str, Any]:
        makers: dict[str, list[list[str | None]]] = {}
        for port, sources in self.graph.inputs[action.node].items():
            found = [self.maker(source).node for source in sources]
            if found:
                makers[port] = [[node, self.outcomes[node].key] for node in found]
        return {
            "node": action.node,
            "makers": makers,
            "listings": self._keyring.listings(action.ingredients),
        }

    def _outcome(self, source: Source) -> Outcome:
        return self.outcomes[source.node]

    def _sources(self, name: str) -> list[Source]:
        return [source for sources in self.graph.inputs[name].values() for source in sources]

    def inputs(self, name: str) -> dict[str, tuple[Artifact, ...]]:
        """The artifacts on the ports of a node whose inputs are all there."""
        return {
            port: tuple(self._outcome(source).outputs[source.output] for source in sources)
            for port, sources in self.graph.inputs[name].items()
            if sources
        }

    def _demand(self, names: Iterable[str]) -> None:
        stack = list(reversed(list(names)))
        while stack:
            name = stack.pop()
            if name in self._missing or name in self.outcomes:
                continue
            node = self.graph.node(name)
            if isinstance(node, FirstWithin):
                self._asked[name] = 0
                needs = [
                    *self.graph.inputs[name]["reference"],
                    *self.graph.inputs[name]["candidates[0].scores"],
                ]
            else:
                needs = self._sources(name)
            stack.extend(reversed([source.node for source in needs]))
            self._await(name, needs)

    def _await(self, name: str, sources: Iterable[Source]) -> None:
        missing = {source.node for source in sources if source.node not in self.outcomes}
        self._missing[name] = missing
        for source in missing:
            self._dependents.setdefault(source, []).append(name)
        if not missing:
            self._ready.append(name)

    def _settle(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        self._missing.pop(name, None)
        for dependent in self._dependents.pop(name, []):
            self._missing[dependent].discard(name)
            if not self._missing[dependent]:
                self._ready.append(dependent)

    def _skip(self, name: str) -> None:
        culprits = {source.node for source in self._sources(name) if not self._outcome(source).good}
        self._settle(name, Outcome("skipped", reasons=(f"{listed(culprits)} did not succeed",)))

    def _choose(self, node: FirstWithin) -> None:
        """Judge the candidate asked for last: settle on it, ask for the next, or, behind the last, take the best."""
        wires = self.graph.inputs[node.name]
        reference = self.scores(wires["reference"][0])
        if reference is None:
            self._settle(node.name, Outcome("skipped", reasons=(f"{node.reference} did not succeed",)))
            return
        asked, found = self._asked[node.name], self._judged.setdefault(node.name, {})
        if asked not in found and (scores := self.scores(wires[f"candidates[{asked}].scores"][0])):
            found[asked] = scores["score"]
        met = asked in found and found[asked] >= reference["score"] - node.max_drop
        if not met and asked + 1 < len(node.candidates):
            self._asked[node.name] = asked + 1
            self._ask(node.name, wires[f"candidates[{asked + 1}].scores"])
            return
        if not found:
            self._settle(node.name, Outcome("skipped", reasons=("no candidate succeeded",)))
            return
        chosen = asked if met else max(found, key=lambda i: (found[i], -i))
        self._adopt(node.name, chosen, met)

    def _adopt(self, name: str, chosen: int, met: bool) -> None:
        wires = self.graph.inputs[name]
        model, scores = wires[f"candidates[{chosen}].model"][0], wires[f"candidates[{chosen}].scores"][0]
        if model.node not in self.outcomes:
            self._ask(name, (model,))
            return
        outputs = {
            "model": self._outcome(model).outputs[model.output],
            "scores": self._outcome(scores).outputs[scores.output],
        }
        reason = (
            f"{model.node} is within the goal"
            if met
            else f"none is within the goal; {model.node} is the best"
        )
        state: State = "ran" if self._outcome(scores).state == "ran" else "hit"
        self._settle(name, Outcome(state, outputs, reasons=(reason,), chosen=(model, scores)))

    def _ask(self, name: str, sources: Iterable[Source]) -> None:
        self._demand(source.node for source in sources)
        self._await(name, sources)


def read_scores(artifact: Artifact, store: Store) -> dict[str, Any]:
    """The values of a Scores artifact. DamagedError where it is none."""
    scores: Scores = load(artifact, store)
    return scores.values
