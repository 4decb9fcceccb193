"""Graph x cache -> verdicts with reasons. Nothing here writes.

A `Walk` goes through one graph as far as the cache carries it: every node whose inputs are known gets a verdict from
`decide`, hits pass their outputs on, and what has to run comes back as actions. The executor runs those, tells the walk
(`finish`, `fail`) and asks again; `qpipe plan` asks once and stops there. So a dry run and a real one cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from qpipe.artifacts.artifact import Artifact, load
from qpipe.artifacts.kinds import Scores
from qpipe.cache.store import Store
from qpipe.keys.hashing import digest
from qpipe.language.graph import Graph, Source, outputs_of
from qpipe.language.spec import FirstWithin, NodeSpec
from qpipe.param import listed
from qpipe.plan.choice import Choice, Contest, Wanted, least_of
from qpipe.plan.decision import decide
from qpipe.plan.history import expected_s
from qpipe.plan.keyring import Keyring
from qpipe.plan.verdicts import Action, Outcome, State, hit


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
        self._origins: dict[Source, Source] = {}
        nodes = (graph.node(name) for name in graph.inputs)
        found = (path for node in nodes if isinstance(node, NodeSpec) for path in keyring.libraries(node))
        self.libraries = tuple(dict.fromkeys(found))
        self._settled = 0
        self._contests: dict[str, Contest] = {}
        """Of each first_within, what is known of its candidates so far."""
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
                    action = dataclasses.replace(
                        verdict, provenance=self._provenance(verdict), libraries=self.libraries
                    )
                    self.running[name] = action
                    actions.append(action)
                else:
                    self._settle(name, verdict)
        return actions

    def refuse_missing(self) -> None:
        """Refuse functions that are not there, of all nodes that may run. Errors: ConfigError."""
        for name in self.graph.inputs:
            node = self.graph.node(name)
            if isinstance(node, NodeSpec) and name not in self.outcomes:
                self._keyring.refuse_missing(node)

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

    def expected_s(self, name: str) -> float | None:
        """Seconds that a node will take, by what ran before; None where nothing like it did."""
        node = self.graph.node(name)
        if isinstance(node, FirstWithin):  # it only chooses
            return 0.0
        found = {
            port: [self._size(source) for source in sources] for port, sources in self.graph.inputs[name].items()
        }
        sizes = {port: sum(each) for port, each in found.items() if all(each)}
        return expected_s(self._store, node.stage.name, name, sizes, self._keyring.folder)

    @property
    def folder(self) -> str:
        """The working directory in which it is carried out."""
        return self._keyring.folder

    def _size(self, source: Source) -> int:
        """Bytes of an output: its own, or, before it is made, those of what it is made of; 0 where neither is known."""
        if self._settled != len(self.outcomes):
            self._settled, self._origins = len(self.outcomes), {}
        passed: list[Source] = []
        while source not in self._origins and not self._good(source):
            passed.append(source)
            before = self._made_of(source)
            if before is None:
                break
            source = before
        source = self._origins.get(source, source)
        self._origins.update(dict.fromkeys(passed, source))  # else a chain is walked once from each of its nodes
        return self.outcomes[source.node].outputs[source.output].size_bytes if self._good(source) else 0

    def _good(self, source: Source) -> bool:
        outcome = self.outcomes.get(source.node)
        return outcome is not None and outcome.good

    def _made_of(self, source: Source) -> Source | None:
        """The first output of its own kind that the node of an output reads."""
        kind = outputs_of(self.graph.node(source.node))[source.output]
        inputs = (each for sources in self.graph.inputs[source.node].values() for each in sources)
        return next((each for each in inputs if outputs_of(self.graph.node(each.node))[each.output] == kind), None)

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

    def origin(self, source: Source) -> Source:
        """The output of its kind that an output goes back to: of a model, the model as it was loaded."""
        source = self.maker(source)
        while (before := self._made_of(source)) is not None:
            source = self.maker(before)
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
            "sizes": {
                port: sum(artifact.size_bytes for artifact in found) for port, found in action.inputs.items()
            },
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
                contest = self._contests[name] = Contest(node)
                first = range(len(node.candidates) if node.free else 1)
                needs = [*self.graph.inputs[name]["reference"], *self._of(contest, Wanted(tuple(first)))]
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
        """Hear of the candidates asked for last, then settle on one or ask for more."""
        wires, contest = self.graph.inputs[node.name], self._contests[node.name]
        reference = self.scores(wires["reference"][0])
        if reference is None:
            self._settle(node.name, Outcome("skipped", reasons=(f"{node.reference} did not succeed",)))
            return
        for place in contest.asked - set(contest.scores):
            if scores := self.scores(wires[f"candidates[{place}].scores"][0]):
                contest.scores[place] = scores
        for place in contest.asked - set(contest.costs):
            source = wires.get(f"candidates[{place}].cost")
            scores = self.scores(source[0]) if source else None
            if scores and scores.get("cost") is not None:
                contest.costs[place] = scores["cost"]
        found = contest.step(least_of(node, reference, self.graph.spec.goal.metric))
        if isinstance(found, Wanted):
            self._ask(node.name, self._of(contest, found))
        elif isinstance(found, Choice):
            self._adopt(contest, found)
        else:
            self._settle(node.name, Outcome("skipped", reasons=("no candidate succeeded",)))

    def _of(self, contest: Contest, wanted: Wanted) -> tuple[Source, ...]:
        """The outputs that say what is wanted; they count as asked for."""
        wires = self.graph.inputs[contest.node.name]
        contest.asked.update(wanted.places)
        ports = [f"candidates[{place}].{port}" for port in ("scores", "cost") for place in wanted.places]
        return tuple(wires[port][0] for port in ports if port in wires)

    def _adopt(self, contest: Contest, choice: Choice) -> None:
        name = contest.node.name
        wires = self.graph.inputs[name]
        model, scores = (wires[f"candidates[{choice.place}].{port}"][0] for port in ("model", "scores"))
        if model.node not in self.outcomes:
            self._ask(name, (model,))
            return
        outputs = {
            "model": self._outcome(model).outputs[model.output],
            "scores": self._outcome(scores).outputs[scores.output],
        }
        reason = (
            f"{model.node} is within the goal"
            if choice.met
            else f"{self._unmet(name)}; {model.node} is the best"
        )
        told = contest.told(candidate.model.node for candidate in contest.node.candidates)
        state: State = "ran" if self._outcome(scores).state == "ran" else "hit"
        self._settle(name, Outcome(state, outputs, reasons=(reason, *told), chosen=(model, scores), contest=contest))

    def _unmet(self, name: str) -> str:
        node = self.graph.node(name)
        return "there is no goal" if isinstance(node, FirstWithin) and node.free else "none is within the goal"

    def _ask(self, name: str, sources: Iterable[Source]) -> None:
        self._demand(source.node for source in sources)
        self._await(name, sources)


def read_scores(artifact: Artifact, store: Store) -> dict[str, Any]:
    """The values of a Scores artifact. DamagedError where it is none."""
    scores: Scores = load(artifact, store)
    return scores.values
