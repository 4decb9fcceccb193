"""A composed Hydra config becomes a PipelineSpec. This file alone reads OmegaConf.

Everything that can be wrong with one node is refused here: an unknown stage, port or param, a wrong type, a value out
of range, a missing port. What can be wrong between nodes is `graph.py`'s.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qpipe.errors import ConfigError, InputError
from qpipe.language.catalog import MISSING, RESERVED, catalog
from qpipe.language.elsewhere import called_here
from qpipe.language.interpolation import wrong_interpolation
from qpipe.numerics.metric_names import least_score
from qpipe.param import coerce, listed, nearest, of_its_type, parse_size
from qpipe.stage import REQUIRED, Resources, Stage

if TYPE_CHECKING:
    from qpipe.cache.shared.remote import RemoteOptions


@dataclasses.dataclass(frozen=True)
class Ref:
    """`node` or `node.output`."""

    node: str
    output: str | None = None

    def __str__(self) -> str:
        return self.node if self.output is None else f"{self.node}.{self.output}"


@dataclasses.dataclass(frozen=True)
class NodeSpec:
    """One use of a stage: what its ports are wired to, its params in their types, and as the config wrote them."""

    name: str
    stage: Stage
    ports: Mapping[str, tuple[Ref, ...]]
    params: Mapping[str, Any]
    written: Mapping[str, Any]
    enabled: bool = True
    resources: Resources = dataclasses.field(default_factory=Resources)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model, what it scores and, where that is asked, what it costs to run."""

    model: Ref
    scores: Ref
    cost: Ref | None = None


@dataclasses.dataclass(frozen=True)
class FirstWithin:
    """The lazy form: the first candidate whose score is within `max_drop` of the reference's, else the best one.

    Where `max_drop` and `min_score` are None there is no goal, and the best of all is taken (qpipe.plan.choice).
    """

    name: str
    candidates: tuple[Candidate, ...]
    reference: Ref
    max_drop: float | None
    min_score: float | None = None
    enabled: bool = True

    @property
    def free(self) -> bool:
        """Whether there is no goal, so that all candidates are asked for at once."""
        return self.max_drop is None and self.min_score is None


@dataclasses.dataclass(frozen=True)
class GoalSpec:
    """What the run is for: `scores` is a node whose score has to be at least `min_score`, or may lie at most `max_drop`
    below that of `reference`; None is no goal. `deployed` is a node that scores the same model in onnxruntime, and
    has to be within the goal too. The exported file may take at most `max_latency` times as long as float, and be at
    most `max_size` times as large, or have `max_size_bytes`."""

    metric: str
    max_drop: float | None
    reference: Ref | None = None
    scores: Ref | None = None
    min_score: float | None = None
    deployed: Ref | None = None
    max_latency: float | None = None
    max_size: float | None = None
    max_size_bytes: int | None = None

    @property
    def free(self) -> bool:
        """Whether no score is asked for."""
        return self.max_drop is None and self.min_score is None

    @property
    def absolute(self) -> float | None:
        """The score that is asked for whatever float has; None where the drop from float counts."""
        least = least_score(self.metric, math.nan, self.max_drop, self.min_score)
        return None if least is None or math.isnan(least) else least


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """How to run, never in a key. `workers` 0 runs every action in this process; `measure` says whether what was
    exported is measured in onnxruntime; `cluster` and the `address` of its scheduler say where else actions run."""

    workers: int | None = None
    threads: int | None = None
    device: str = "cpu"
    expect: str | None = None
    max_misses: int | None = None
    budget_s: float | None = None
    keep_going: bool = True
    timeout_s: float | None = None
    measure: bool = True
    cluster: Literal["dask", "ray"] | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("threads", 1), ("max_misses", 0), ("budget_s", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be >= {least} or null, got {value}.")
        if self.expect not in (None, "cached"):
            raise ValueError(f"expect must be null or 'cached', got {self.expect!r}.")
        if self.cluster is not None and self.workers == 0:
            raise ValueError("workers must be >= 1 or null on a cluster, got 0.")


@dataclasses.dataclass(frozen=True)
class PipelineSpec:
    """The whole declaration. `ladder` lists the Scores nodes of the closing table, in order, with their labels
    (`qpipe.language.labels`); `baselines` those of them that are only there to compare with."""

    nodes: Mapping[str, NodeSpec | FirstWithin]
    goal: GoalSpec
    run: RunSpec
    targets: tuple[str, ...] = ()
    ladder: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    baselines: tuple[str, ...] = ()
    allow_discouraged: bool = False
    cache_dir: str | None = None
    cache_max_bytes: int | None = None
    remote: RemoteOptions | None = None
    resolved: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_spec(config: DictConfig) -> PipelineSpec:
    """The PipelineSpec of a composed config. Errors: ConfigError with the address of the mistake."""
    plain = _plain(config)
    stages = plain.get("stages") or {}
    if not isinstance(stages, Mapping):
        raise ConfigError(f"stages: expected a mapping of nodes, got {stages!r}.")
    nodes = {name: _node(name, body) for name, body in stages.items() if body is not None}
    if not nodes:
        raise ConfigError("stages: no node is declared. Choose a pipeline, e.g. pipeline=ptq.")
    goal = plain.get("goal") or {}
    return PipelineSpec(
        nodes=nodes,
        goal=GoalSpec(
            metric=str(goal.get("metric")),
            max_drop=_drop(goal.get("max_drop"), "goal.max_drop"),
            reference=_optional_ref(goal.get("reference"), "goal.reference"),
            scores=_optional_ref(goal.get("scores"), "goal.scores"),
            min_score=_drop(goal.get("min_score"), "goal.min_score"),
            deployed=_optional_ref(goal.get("deployed"), "goal.deployed"),
            max_latency=_ratio(goal.get("max_latency"), "goal.max_latency"),
            **_size(goal.get("max_size")),
        ),
        run=_run(plain.get("run") or {}, goal),
        targets=coerce(plain.get("targets") or (), tuple[str, ...], "targets"),
        ladder=coerce(plain.get("ladder") or {}, dict[str, str | None], "ladder"),
        baselines=coerce(plain.get("baselines") or (), tuple[str, ...], "baselines"),
        allow_discouraged=coerce(plain.get("allow_discouraged", False), bool, "allow_discouraged"),
        cache_dir=(plain.get("cache") or {}).get("dir"),
        cache_max_bytes=parse_size((plain.get("cache") or {}).get("max_size"), "cache.max_size"),
        remote=_remote(plain.get("cache") or {}),
        resolved=plain,
    )


def _plain(config: DictConfig) -> dict[str, Any]:
    """The config as plain values, with what a stage's schema pre-fills also in nodes that were written by `uses` alone.

    What a stage pre-fills is resolved once, not in every node: OmegaConf takes longest of all.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
        assert isinstance(plain, dict)
        stages = plain.get("stages")
        prefilled: dict[str, dict[str, Any]] = {}
        for body in stages.values() if isinstance(stages, dict) else ():
            name = body.get("uses") if isinstance(body, dict) else None
            if not isinstance(name, str):
                continue
            if name not in prefilled:
                prefilled[name] = _prefilled(name, config)
            for key, value in prefilled[name].items():
                if key not in body:
                    body[key] = copy.deepcopy(value)
    except (OmegaConfBaseException, _Relative):
        return _resolve(_filled(config))
    return {str(key): value for key, value in plain.items()}


class _Relative(Exception):
    """A value is pre-filled that depends on the node it stands in."""


def _prefilled(name: str, config: DictConfig) -> dict[str, Any]:
    """What the stage called `name` pre-fills, as plain values; nothing where there is no such stage."""
    if name not in catalog() or not (values := dict(catalog()[name].config)):
        return {}
    if "${." in repr(values):
        raise _Relative
    found = OmegaConf.to_container(OmegaConf.create(values, parent=config), resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _filled(config: DictConfig) -> DictConfig:
    """As `_plain`, but still a config: what it resolves to has the address of a mistake in it."""
    missing: dict[str, Any] = {}
    stages = (OmegaConf.to_container(config, resolve=False) or {}).get("stages")  # type: ignore[union-attr]
    for node, body in stages.items() if isinstance(stages, dict) else ():
        name = body.get("uses") if isinstance(body, dict) else None
        if isinstance(name, str) and name in catalog():
            prefilled = catalog()[name].config
            missing[str(node)] = {key: value for key, value in prefilled.items() if key not in body}
    if not any(missing.values()):
        return config
    filled = config.copy()
    OmegaConf.set_struct(filled, False)
    filled.stages = OmegaConf.merge(filled.stages, missing)
    return filled


def _resolve(config: DictConfig) -> dict[str, Any]:
    """The config as plain values; a bad interpolation is a ConfigError with its address."""
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError(wrong_interpolation(error)) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _remote(cache: Mapping[str, Any]) -> RemoteOptions | None:
    """Where the shared cache is; None where there is none, or it is off."""
    if cache.get("remote") is None or cache.get("remote_mode") == "off":
        return None
    from qpipe.cache.shared.remote import RemoteOptions

    names = {
        "url": "remote",
        "mode": "remote_mode",
        "timeout_s": "remote_timeout_s",
        "lease_s": "remote_lease_s",
    }
    values = {field: cache[name] for field, name in names.items() if cache.get(name) is not None}
    hints = get_type_hints(RemoteOptions)
    typed = {field: coerce(value, hints[field], f"cache.{names[field]}") for field, value in values.items()}
    secret_file = coerce(cache.get("secret_file"), str | None, "cache.secret_file")
    try:
        return RemoteOptions(**typed, secret_file=secret_file)
    except ValueError as error:
        raise ConfigError(f"cache.{error}") from error


class NameIsNoText(ConfigError):
    """A node's `name` is a number or a boolean, which YAML made of it."""

    def __init__(self, name: object) -> None:
        super().__init__(f"stages: a node's name is text, got {name!r}. Put it in quotes, or take another.")
        self.name = name


def _node(name: object, body: Any) -> NodeSpec | FirstWithin:
    if not isinstance(name, str):
        raise NameIsNoText(name)
    address = f"stages.{name}"
    if not name.isidentifier():
        raise ConfigError(f"{address}: a node's name is letters, digits and '_', got {name!r}.")
    if not isinstance(body, Mapping) or "uses" not in body:
        raise ConfigError(f"{address}: a node needs 'uses', the name of a stage, got {body!r}.")
    if body["uses"] == "first_within":
        return _first_within(name, body)
    stage = catalog().find(str(body["uses"]), address)
    _check_names(stage, body, address)
    ports = {port.name: _port(stage, port.name, body, address) for port in stage.ports.values()}
    written = {
        param.name: _written(param.name, param.default, body, address) for param in stage.params.values()
    }
    params = {
        key: of_its_type(stage.params[key].default, stage.params[key].hint)
        if value is REQUIRED
        else coerce(value, stage.params[key].hint, f"{address}.{key}")
        for key, value in written.items()
    }
    if stage.check is not None:
        try:
            stage.check(params)
        except (ValueError, InputError) as error:
            raise ConfigError(f"{address}: {error}") from error
    enabled = coerce(body.get("enabled", True), bool, f"{address}.enabled")
    shown = {key: value for key, value in written.items() if value is not REQUIRED}
    asked: Resources = coerce(body.get("resources") or {}, Resources, f"{address}.resources")
    return NodeSpec(name, stage, ports, params, shown, enabled, asked.over(stage.resources))


def _check_names(stage: Stage, body: Mapping[str, Any], address: str) -> None:
    known = {**stage.ports, **stage.params}
    for key in body:
        if key in RESERVED or key in known:
            continue
        raise ConfigError(
            f"{address}: '{stage.name}' has no param '{key}'.{called_here(key, known) or nearest(key, known)} "
            f"Its ports: {listed(stage.ports)}. Its params: {listed(stage.params)}."
        )


def _port(stage: Stage, name: str, body: Mapping[str, Any], address: str) -> tuple[Ref, ...]:
    port = stage.ports[name]
    value = body.get(name, stage.config.get(name))
    if value is None or value == MISSING:
        if port.optional:
            return ()
        raise ConfigError(
            f"{address}.{name}: port '{name}' of '{stage.name}' takes a {port.kind} and is not wired. "
            f"Name the node that makes one."
        )
    values = value if isinstance(value, list) else [value]
    if len(values) != 1 and not port.many:
        raise ConfigError(f"{address}.{name}: takes one node, got {values!r}.")
    return tuple(_ref(item, f"{address}.{name}") for item in values)


def _written(name: str, default: Any, body: Mapping[str, Any], address: str) -> Any:
    """The param as the config has it; REQUIRED says that the signature's own default holds."""
    if name not in body:
        if default is REQUIRED:
            raise ConfigError(
                f"{address}.{name}: missing, and '{name}' has no default. Set {address}.{name}=…"
            )
        return REQUIRED
    if body[name] == MISSING:
        raise ConfigError(f"{address}.{name}: missing. Set {address}.{name}=…")
    return body[name]


def _ref(value: Any, address: str) -> Ref:
    if (
        not isinstance(value, str)
        or not all(part.isidentifier() for part in value.split("."))
        or value.count(".") > 1
    ):
        raise ConfigError(f"{address}: expected 'node' or 'node.output', got {value!r}.")
    node, _, output = value.partition(".")
    return Ref(node, output or None)


def _optional_ref(value: Any, address: str) -> Ref | None:
    return None if value is None else _ref(value, address)


_FORM_KEYS = ("uses", "enabled", "candidates", "reference", "max_drop", "min_score")


def _first_within(name: str, body: Mapping[str, Any]) -> FirstWithin:
    address = f"stages.{name}"
    for key in body:
        if key not in _FORM_KEYS:
            raise ConfigError(
                f"{address}: 'first_within' takes no '{key}'.{nearest(key, _FORM_KEYS)} It takes: {listed(_FORM_KEYS)}."
            )
    for key in ("candidates", "reference", "max_drop"):
        if body.get(key, MISSING) == MISSING or (body[key] is None and key != "max_drop"):
            raise ConfigError(
                f"{address}.{key}: missing. 'first_within' needs candidates, reference and max_drop."
            )
    candidates = body["candidates"]
    if not isinstance(candidates, list) or not candidates:
        raise ConfigError(f"{address}.candidates: expected a list of {{model, scores}}, got {candidates!r}.")
    return FirstWithin(
        name=name,
        candidates=tuple(_candidate(item, f"{address}.candidates[{i}]") for i, item in enumerate(candidates)),
        reference=_ref(body["reference"], f"{address}.reference"),
        max_drop=_drop(body["max_drop"], f"{address}.max_drop"),
        min_score=_drop(body.get("min_score"), f"{address}.min_score"),
        enabled=coerce(body.get("enabled", True), bool, f"{address}.enabled"),
    )


def _drop(value: Any, address: str) -> float | None:
    found: float | None = coerce(value, float | None, address)
    if found is not None and math.isnan(found):
        raise ConfigError(f"{address}: expected a number, got nan. Give a limit, or null for none.")
    return found


def _ratio(value: Any, address: str) -> float | None:
    """A share of what float takes. ConfigError for what is none, and for bytes."""
    found: float | None = coerce(value, float | None, address)
    bytes_too = ", or bytes with their unit (4MB)" if address == "goal.max_size" else ""
    if found is not None and not 0 < found <= _LARGEST_RATIO:
        raise ConfigError(
            f"{address}: expected a share of what the float model takes, such as 0.8, got {value}. "
            f"Give one above 0 and at most {_LARGEST_RATIO}{bytes_too}, or null for no limit."
        )
    return found


_LARGEST_RATIO = 100
"""A size above it was meant in bytes."""


def _size(value: Any) -> dict[str, Any]:
    """`goal.max_size`, a share of float's or, with a unit, bytes."""
    if isinstance(value, str) and value.strip()[-1:].isalpha() and value.strip().lower() != "nan":
        return {"max_size_bytes": parse_size(value, "goal.max_size")}
    return {"max_size": _ratio(value, "goal.max_size")}


def _run(plain: Mapping[str, Any], goal: Mapping[str, Any]) -> RunSpec:
    run: RunSpec = coerce(plain, RunSpec, "run")
    if goal.get("max_latency") is not None and not run.measure:
        raise ConfigError(
            "goal.max_latency: nothing is measured with run.measure=false. Leave one of them out."
        )
    return run


def _candidate(item: Any, address: str) -> Candidate:
    if not isinstance(item, Mapping) or set(item) - {"cost"} != {"model", "scores"}:
        raise ConfigError(f"{address}: expected {{model: node, scores: node}}, with or without cost, got {item!r}.")
    model, scores = (_ref(item[key], f"{address}.{key}") for key in ("model", "scores"))
    return Candidate(model, scores, _optional_ref(item.get("cost"), f"{address}.cost"))
