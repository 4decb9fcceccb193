"""What a running action may ask for: progress, notes, sub-results; and whether its code is what its key was made of."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qpipe.artifacts.artifact import Artifact, load, save
from qpipe.artifacts.kinds import Statistics
from qpipe.cache.store import Store
from qpipe.errors import ChangedError, DamagedError
from qpipe.keys import loaded
from qpipe.keys.hashing import digest
from qpipe.plan.verdicts import OF_STAGE, Request, artifact_json
from qpipe.stage import Context

Emit = Callable[[dict[str, Any]], None]


class ActionContext(Context):
    """The Context of a running action: progress goes to `emit`, sub-results into the store."""

    def __init__(self, request: Request, store: Store, emit: Emit, threads: int) -> None:
        self.device = request["device"]
        self.threads = threads
        self.notes: list[str] = []
        self.parts: set[str] = set()
        self._request = request
        ingredients = request["ingredients"]
        # Of the action's ingredients all but params and ports, which a sub-result's own inputs stand for.
        self._code = {name: ingredients[name] for name in ("stage", *OF_STAGE)}
        self._store = store
        self._emit = emit
        self._last = 0.0
        self._functions: dict[str, Any] = {}
        written, params = request.get("written", {}), ingredients["params"]
        pairs = [pair for name in written for pair in _functions_in(written[name], params.get(name))]
        self._functions_of_params = dict(pairs)
        self._loaded = loaded.count()
        self._folder = os.getcwd()
        known = [_expected(request, code) for code in _codes(ingredients)]
        self._names = {name for each in known for name in each} if all(known) else set[str]()
        """The modules of its key; none where a listing is too long to be kept."""
        self._asked: set[str] = set()

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """What runs inside finds the modules of its key as they are, and others of users only by importing them."""
        return loaded.apart(self._names, self._asked) if self._names else contextlib.nullcontext()

    def progress(self, done: int, total: int, what: str = "") -> None:
        now = time.monotonic()
        if now - self._last >= 0.1 or done >= total:
            self._last = now
            self._emit({"event": "progress", "done": done, "total": total, "what": what})

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def memo(self, name: str, fn: Callable[..., Any], *inputs: Any) -> Any:
        key = digest("memo", self._code, name, _names(fn), [self._with_code(item) for item in inputs])
        code = getattr(fn, "__code__", None)
        if self._functions.setdefault(key, code) is not code:
            raise ValueError(
                f"ctx.memo: two functions share the name '{name}' and the inputs. Name them apart."
            )
        self.parts.add(key)
        check_code(self._request, self._store)
        found = self._store.result(key)
        if found is not None and not self._store.complete(found):
            try:
                value = _remembered(load(Artifact(**found["outputs"]["result"]), self._store))
                self._store.touch([key])
                return value
            except (DamagedError, KeyError, TypeError, AttributeError):
                self._store.forget(key)  # a damaged or made-up sub-result is a miss
        started = time.perf_counter()
        value = fn(*inputs)
        check_code(self._request, self._store)  # a function may import what it needs when it runs
        artifact = save(_to_remember(value), self._store)
        if not self.found_on_the_way():
            self._store.publish(
                key,
                {
                    "outputs": {"result": artifact_json(artifact)},
                    "ingredients": {**self._code, "memo": name},
                    "provenance": {"duration_s": time.perf_counter() - started},
                },
            )
            self._emit({"event": "published", "key": key})
        return _remembered(load(artifact, self._store))  # as it comes the next time

    def _with_code(self, item: Any) -> Any:
        """An input of a sub-result, the name of a param's function replaced by its code."""
        if isinstance(item, str):
            code = self._functions_of_params.get(item)
            return item if code is None else {"function": item, "code": code}
        if isinstance(item, list | tuple):
            return [self._with_code(each) for each in item]
        if isinstance(item, Mapping):
            return {name: self._with_code(each) for name, each in item.items()}
        return item

    def found_on_the_way(self) -> dict[str, tuple[str, str]]:
        """{name: (digest, file)} of the first-party modules that its key does not hold and that it has imported, or
        those of its key when they were loaded: their names came from a param, a variable, a file."""
        if not self._names:
            return {}
        found = {*loaded.loaded_since(self._loaded), *self._asked}
        found |= loaded.belonging(found | self._names)
        found -= self._names
        loaded.remember(self._names, found)
        made = loaded.digests(found, self._store.index.memo("code"))
        return {name: (made[name], os.path.relpath(loaded.file(name), self._folder)) for name in sorted(made)}


def _names(fn: Callable[..., Any]) -> str:
    """What a function is called where it was written."""
    fn = getattr(fn, "func", fn)  # what functools.partial holds
    return f"{getattr(fn, '__module__', '')}:{getattr(fn, '__qualname__', '')}"


def _to_remember(value: Any) -> Statistics:
    """Arrays as arrays, all else as JSON; a value that is no dict stands alone under no name."""
    if not isinstance(value, dict):
        return Statistics({}, {"value": value})
    arrays = {
        name: item for name, item in value.items() if hasattr(item, "__array__") and hasattr(item, "dtype")
    }
    return Statistics(arrays, {"values": {name: item for name, item in value.items() if name not in arrays}})


def _remembered(value: Statistics) -> Any:
    if "value" in value.values:
        return value.values["value"]
    return {**value.arrays, **value.values["values"]}


def check_code(request: Request, store: Store) -> None:
    """Hold the modules that run here against the key. ChangedError where they are others than were planned with."""
    for code in _codes(request["ingredients"]):
        expected = _expected(request, code)
        if changed := loaded.differing(code, expected, store.index.memo("code")):
            raise ChangedError(
                f"the code that ran is not what was planned with: {', '.join(changed)} was edited meanwhile, or "
                f"another file of that name comes first on the path. The result is not kept; run again."
            )


def _expected(request: Request, code: str) -> Mapping[str, str]:
    """{module: first digits of its digest} of a code digest; {} where no listing of it is kept."""
    return _modules(request.get("provenance", {}).get("listings", {}).get(code, ""))


@functools.lru_cache(64)
def _modules(text: str) -> Mapping[str, str]:
    return {name: digits for digits, name in (line.split("  ", 1) for line in text.splitlines())}


def _codes(ingredients: Mapping[str, Any]) -> list[str]:
    """The digests of code in the ingredients of a key: the stage's own, and those of factories."""
    return [ingredients["code"], *_factory_codes(ingredients["params"])]


def _factory_codes(made: Any) -> Iterator[str]:
    """The digests of code that stand in the ingredients of params, at any depth."""
    if isinstance(made, Mapping):
        if set(made) == {"function", "code"}:
            yield made["code"]
        else:
            for item in made.values():
                yield from _factory_codes(item)
    elif isinstance(made, list):
        for item in made:
            yield from _factory_codes(item)


def _functions_in(written: Any, made: Any) -> Iterator[tuple[str, str]]:
    """(module:function, digest of its code), of a param as it was written and as it stands in the key."""
    if isinstance(made, Mapping) and set(made) == {"function", "code"}:
        if isinstance(written, str):
            yield written, made["code"]
    elif isinstance(made, Mapping) and isinstance(written, Mapping):
        for name in written:
            yield from _functions_in(written[name], made.get(name))
    elif isinstance(made, list) and isinstance(written, list):
        for left, right in zip(written, made, strict=False):
            yield from _functions_in(left, right)
