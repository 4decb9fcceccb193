"""@stage: a typed function becomes a stage; its signature says what its ports, params and outputs are.

    @stage(version=1, config={"data": "calibration"})
    def adaround(model: Model, data: Samples, *, beam: Annotated[int, Range(ge=1)] = 8, ctx: Context = NULL) -> Model:

- a **port** is a parameter annotated with an artifact kind (`Network`, `Samples`, …; `Model` for a network with all its
  methods at hand, and all their code in the key); `Kind | None = None` makes it
  optional, `list[Kind]` lets it take many;
- every other parameter is a **param**, except `ctx`;
- the outputs are the return annotation: one kind, or a NamedTuple of kinds.

The function itself is returned unchanged (its `__stage__` is the description), so a test calls it with plain values.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol, TypeVar, Union, get_args, get_origin

from qpipe.artifacts.artifact import FACE_MODULE, NETWORK_MODULE
from qpipe.artifacts.kinds import Encodings, Files, Samples, Scores, Statistics
from qpipe.param import Factory, Library, Range, coerce, is_ambiguous

__all__ = [
    "NULL",
    "Context",
    "Encodings",
    "Factory",
    "Files",
    "Library",
    "Maker",
    "Param",
    "Port",
    "Range",
    "Resources",
    "Samples",
    "Scores",
    "Stage",
    "Statistics",
    "stage",
]

REQUIRED = inspect.Parameter.empty
Function = TypeVar("Function", bound=Callable[..., Any])
Check = Callable[[Mapping[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Maker:
    """What is wired to a port, before anything runs: a node's stage, and its params."""

    stage: str
    params: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Resources:
    """What an action takes of the machine that it runs on: threads, GPUs of its own, 10^9 bytes of memory. None
    stands for the threads that the run gives every action, and for nothing of the others. In no key."""

    cpus: Annotated[int, Range(ge=1)] | None = None
    gpus: Annotated[int, Range(ge=0)] | None = None
    memory_gb: Annotated[float, Range(gt=0)] | None = None

    def over(self, other: Resources) -> Resources:
        """These, and where nothing is said those of `other`."""
        return Resources(
            other.cpus if self.cpus is None else self.cpus,
            other.gpus if self.gpus is None else self.gpus,
            other.memory_gb if self.memory_gb is None else self.memory_gb,
        )


WiredCheck = Callable[[Mapping[str, Any], Mapping[str, "tuple[Maker, ...]"]], None]


class Context:
    """What a running stage may ask of its surroundings. This one does nothing; the executor passes a real one."""

    device: str = "cpu"
    threads: int = 1

    def progress(self, done: int, total: int, what: str = "") -> None:
        """Say that `done` of `total` steps are finished; `what` names the current one."""

    def note(self, sentence: str) -> None:
        """Record one sentence about this result for the report (a skipped layer, a measured error)."""

    def memo(self, name: str, fn: Callable[..., Any], *inputs: Any) -> Any:
        """`fn(*inputs)`, from the cache where the same stage code has seen the same inputs.

        `inputs` are numpy arrays, bytes or JSON values and must say everything that the result depends on: of
        `fn`, only where it was written counts, not what it holds on to. The name of a function that came as a param
        counts by its code. It changes none of its inputs. The result is a
        dict of arrays and JSON values, or a JSON value; it comes as it is read back, arrays read-only, tuples as lists.
        """
        return fn(*inputs)

    def seed(self, *names: str) -> int:
        """A seed in [0, 2**63) that depends on the stage's own `seed` param and on `names` alone, so that skipping or
        reordering layers changes nothing."""
        from qpipe.keys.hashing import digest

        return int(digest("seed", *names)[:15], 16)


NULL = Context()


class _Face:
    """Stands for `qpipe.model.Model` where an annotation is resolved: importing the real one would import onnx."""


class _Network:
    """Stands for `qpipe.model.Network` in the same way."""


KIND_TYPES: dict[str, type] = {
    "Model": _Face,
    "Network": _Network,
    "Samples": Samples,
    "Statistics": Statistics,
    "Encodings": Encodings,
    "Scores": Scores,
    "Files": Files,
}
_KIND_NAMES = {kind: name for name, kind in KIND_TYPES.items()} | {_Network: "Model"}


@dataclasses.dataclass(frozen=True)
class Port:
    """An input that takes an artifact of `kind`."""

    name: str
    kind: str
    optional: bool = False
    many: bool = False
    face: bool = False
    """Whether a model is handed over as a `Model` with all its methods, rather than as a `Network`."""


@dataclasses.dataclass(frozen=True)
class Param:
    """An input that takes a value; `default` is REQUIRED where the signature gives none."""

    name: str
    hint: Any
    default: Any = REQUIRED


@dataclasses.dataclass(frozen=True)
class Stage:
    """A technique: its name, what it takes and what it returns. `config` is what its schema pre-fills, `address` the
    `module:attribute` under which the catalog found it."""

    name: str
    version: int
    function: Callable[..., Any]
    ports: Mapping[str, Port]
    params: Mapping[str, Param]
    outputs: Mapping[str, str]
    config: Mapping[str, Any]
    always: bool
    takes_context: bool
    check: Check | None = None
    wired: WiredCheck | None = None
    not_after: Mapping[str, str] = dataclasses.field(default_factory=dict)
    not_before: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resources: Resources = Resources()
    address: str = ""

    @property
    def module(self) -> str:
        return self.function.__module__

    @property
    def modules(self) -> tuple[str, ...]:
        """Where its function was written and, where that is another one, the module that hands it out: what a decorator
        of a third module makes of a function says that it comes from where the function was written. And the modules
        of the models that it is handed, whose methods it may call without an import of its own."""
        models = [port for port in self.ports.values() if port.kind == "Model"]
        handed = sorted({FACE_MODULE if port.face else NETWORK_MODULE for port in models})
        return tuple(dict.fromkeys((self.module, self.address.partition(":")[0] or self.module, *handed)))

    @property
    def origin(self) -> str:
        """What names the function in a key: where it was written and, where it is handed out under another name,
        that name too."""
        written = f"{self.module}:{self.function.__qualname__}"
        return written if self.address in ("", written) else f"{self.address} = {written}"

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring, in one line."""
        return " ".join((inspect.getdoc(self.function) or "").partition("\n\n")[0].split())

    def meaning(self, name: str) -> str:
        """What the docstring says of a port or a param: the clauses that name it, those of the first paragraph where no
        other does; "" where none does."""
        first, _, rest = (inspect.getdoc(self.function) or "").partition("\n\n")
        for text in (rest, first):
            said = " ".join(text.split()).partition("Errors:")[0].strip()
            clauses = re.split(r"(?<=[.;])\s+(?=[^\s\d])", said)
            if named := [each.rstrip(".;") for each in clauses if re.search(rf"`{name}\b[^`]*`", each)]:
                return "; ".join(named).replace("`", "")
        return ""

    def unpack(self, returned: Any) -> dict[str, Any]:
        """The function's return value as {output name: value}."""
        if len(self.outputs) == 1:
            return {next(iter(self.outputs)): returned}
        return {name: getattr(returned, name) for name in self.outputs}


class _Decorator(Protocol):
    def __call__(self, function: Function) -> Function: ...


def stage(
    *,
    version: int,
    config: Mapping[str, Any] | None = None,
    always: bool = False,
    check: Check | None = None,
    wired: WiredCheck | None = None,
    not_after: Mapping[str, str] | None = None,
    not_before: Mapping[str, str] | None = None,
    resources: Mapping[str, Any] | None = None,
) -> _Decorator:
    """Make a stage of a function. Raise `version` when its meaning changes in a way its code does not show.

    `config` pre-fills the stage's schema: the node a port is usually wired to (`{"data": "calibration"}`), the
    interpolation a param usually takes (`{"scheme": "${scheme}"}`). `always` is for sources that read the
    outside world: they run every time, and what depends on them still hits when they bring back the same bytes.
    `check` is given {param: value} before anything runs and raises ValueError or InputError, a sentence, for values
    that do not go together; `wired` also {port: its Makers}, and refuses what cannot go well with what is wired there.
    `not_after` and `not_before` name stages, built-in or of any plug-in, that the model should
    not come from or go on to, and say why; such an order is refused unless `allow_discouraged` is set. `resources`,
    such as {"gpus": 1, "memory_gb": 8}, are what it takes where a config says nothing else. No key holds any of these.
    """

    def decorate(function: Function) -> Function:
        described = describe_function(function, version, config or {}, always)
        function.__stage__ = dataclasses.replace(  # type: ignore[attr-defined]
            described,
            check=check,
            wired=wired,
            not_after=dict(not_after or {}),
            not_before=dict(not_before or {}),
            resources=coerce(resources or {}, Resources, f"stage {function.__name__}: resources"),
        )
        return function

    return decorate


def describe_function(
    function: Callable[..., Any], version: int, config: Mapping[str, Any], always: bool
) -> Stage:
    """Read the signature of `function` into a Stage. Errors: TypeError, naming the parameter that cannot be read."""
    hints = typing.get_type_hints(function, localns=dict(KIND_TYPES), include_extras=True)
    ports: dict[str, Port] = {}
    params: dict[str, Param] = {}
    takes_context = False
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in hints:
            raise TypeError(f"stage {function.__name__}: parameter '{name}' has no annotation")
        if name == "ctx":
            takes_context = True
        elif port := _port(name, hints[name]):
            ports[name] = port
        elif is_ambiguous(hints[name]):
            raise TypeError(
                f"stage {function.__name__}: '{name}' takes text and paths, so nothing tells whether the file counts. "
                "Make it a Path, or two params"
            )
        else:
            params[name] = Param(name, hints[name], parameter.default)
    unknown = set(config) - set(ports) - set(params)
    if unknown:
        raise TypeError(
            f"stage {function.__name__}: config names {sorted(unknown)}, which the signature has not"
        )
    outputs = _outputs(function.__name__, hints.get("return"))
    return Stage(
        function.__name__, version, function, ports, params, outputs, dict(config), always, takes_context
    )


def _kind(hint: Any) -> str | None:
    if hint in _KIND_NAMES:
        return _KIND_NAMES[hint]
    return (
        "Model" if _is_real(hint, "Model", FACE_MODULE) or _is_real(hint, "Network", NETWORK_MODULE) else None
    )


def _is_real(hint: Any, name: str, module: str) -> bool:
    return isinstance(hint, type) and (hint.__name__, hint.__module__) == (name, module)


def _port(name: str, hint: Any) -> Port | None:
    if kind := _kind_or_none(hint):
        return Port(name, kind, face=hint is _Face or _is_real(hint, "Model", FACE_MODULE))
    arguments = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType) and type(None) in arguments:
        inner = _port(name, next(argument for argument in arguments if argument is not type(None)))
        return dataclasses.replace(inner, optional=True) if inner and len(arguments) == 2 else None
    if (
        get_origin(hint) is list
        and (inner := _port(name, arguments[0]))
        and not (inner.many or inner.optional)
    ):
        return dataclasses.replace(inner, many=True)
    return None


def _kind_or_none(hint: Any) -> str | None:
    try:
        return _kind(hint)
    except TypeError:  # an unhashable annotation is no kind
        return None


def _outputs(name: str, hint: Any) -> dict[str, str]:
    if kind := _kind_or_none(hint):
        return {kind.lower(): kind}
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        fields = typing.get_type_hints(hint, localns=dict(KIND_TYPES))
        kinds = {field: _kind_or_none(fields[field]) for field in hint._fields}
        if all(kinds.values()):
            return {field: kind for field, kind in kinds.items() if kind}
    raise TypeError(
        f"stage {name}: returns {hint!r}; a stage returns an artifact kind or a NamedTuple of kinds"
    )
