"""What an action may leave behind in its process, put back: its result is the same in a fresh worker and in a used one.

Before each action the global random states of Python, numpy and torch are seeded from its key, so that a stage which
draws from them repeats too. After it, the working directory, `sys.path`, the environment, signal handlers and the
globals of numpy and torch are as they were. What cannot be put back, threads that still run and what user modules keep
from call to call (`seen: list[str] = []`), makes the process spent: a worker is replaced before the next action. So
does a user's module that was loaded meanwhile where the process then was another: it is loaded once, and what it did
to its process has to hold for whatever uses it. What it seeds it seeds for nobody.
"""

from __future__ import annotations

import contextlib
import decimal
import importlib.abc
import importlib.machinery
import locale
import os
import random
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qpipe.keys import loaded
from qpipe.run.machine import Before

PutBack = Callable[[], object]
_OWN_THREADS = ("qpipe", "fsspec", "tqdm")
_SEEDED = ("numpy.random", "torch")
_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGPIPE")
    if hasattr(signal, name)
)
"""Those that programs handle: to ask for all 64 twice would take 0.15 ms an action."""


class Isolation:
    """One process; `spent` says after each action why it should run no other, or is empty."""

    def __init__(self) -> None:
        self.spent: list[str] = []
        self._seeds = _Seeds()

    @contextlib.contextmanager
    def of(self, key: str) -> Iterator[None]:
        """What runs inside draws from random states that `key` alone decides, and leaves nothing behind."""
        restore, before, count = _snapshot(), _globals(), loaded.count()
        threads = set(threading.enumerate())
        self._seeds.begin(int(key[:8], 16))
        try:
            yield
        finally:
            self._seeds.end()
            changed = [name for name in loaded.users_since(count) if _globals() != before][:1]
            for put_back in restore:
                with contextlib.suppress(Exception):  # whatever an action has made of its process
                    put_back()
            loads = [f"module {name} was loaded in it, and what holds for all of a process changed" for name in changed]
            self.spent = [*_left_running(threads), *_left_in_modules(), *loads]


def _snapshot() -> list[PutBack]:
    """Functions that put everything back to what it is now, to be called in order."""
    path, path_list = list(sys.path), sys.path
    environment = dict(os.environ)
    filters = list(warnings.filters)
    found: list[PutBack] = [
        lambda: setattr(sys, "path", path_list),
        lambda: path_list.__setitem__(slice(None), path),
        lambda: _put_back_environment(environment),
        lambda: setattr(warnings, "filters", filters),
        *_bound(sys.setrecursionlimit, sys.getrecursionlimit()),
        *_bound(random.setstate, random.getstate()),
        *_bound(decimal.setcontext, decimal.getcontext().copy()),
        *(
            put
            for name in ("stdin", "stdout", "stderr")
            for put in _bound(setattr, sys, name, getattr(sys, name))
        ),
        *_bound(locale.setlocale, locale.LC_ALL, locale.setlocale(locale.LC_ALL)),
        *_signals(),
        *_of_numpy(),
        *_of_torch(),
    ]
    with contextlib.suppress(OSError):  # a folder that is gone cannot be gone back to
        found += _bound(os.chdir, os.getcwd())
    return found


def _globals() -> list[object]:
    """What `_snapshot` puts back, but for random states and `sys.path`, as far as it can be compared; that of a library
    which is not loaded is what it begins with."""
    torch, np = sys.modules.get("torch"), sys.modules.get("numpy")
    ready = torch is not None and hasattr(torch, "set_default_dtype")
    return [
        _folder(), [signal.getsignal(number) for number in _SIGNALS], dict(os.environ), sys.getrecursionlimit(),
        locale.setlocale(locale.LC_ALL), decimal.getcontext().prec,
        np.geterr() if np is not None else {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"},
        (str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.get_float32_matmul_precision(),
         _determinism(torch)) if ready and torch is not None else ("torch.float32", True, "highest", (False, False)),
    ]  # fmt: skip


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # a folder that is gone
        return ""


def _bound(put: Callable[..., object], *values: Any) -> list[PutBack]:
    return [lambda: put(*values)]


def _put_back_environment(before: dict[str, str]) -> None:
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


def _signals() -> list[PutBack]:
    if threading.current_thread() is not threading.main_thread():
        return []
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}

    def put_back() -> None:
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)

    return [put_back]


def _of_numpy() -> list[PutBack]:
    """numpy's globals; where it is not loaded yet, those it begins with."""
    if "numpy" not in sys.modules:
        return [_numpy_as_loaded]
    import numpy as np

    return [
        *_bound(lambda state: np.seterr(**state), np.geterr()),
        *_bound(lambda state: np.set_printoptions(**state), np.get_printoptions()),
        *_bound(np.random.set_state, np.random.get_state()),
    ]


def _numpy_as_loaded() -> None:
    if (np := sys.modules.get("numpy")) is not None:
        np.seterr(divide="warn", over="warn", under="ignore", invalid="warn")


def _of_torch() -> list[PutBack]:
    """torch's globals; where it is not loaded yet, those it begins with."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "set_default_dtype"):
        return [_torch_as_loaded]
    return [
        *_bound(torch.set_default_dtype, torch.get_default_dtype()),
        *_bound(torch.set_default_device, None),
        *_bound(torch.set_grad_enabled, torch.is_grad_enabled()),
        *_bound(torch.set_num_threads, torch.get_num_threads()),
        *_bound(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()),
        *_bound(_put_back_determinism, torch, _determinism(torch)),
        *_bound(torch.set_flush_denormal, False),
        *_bound(torch.random.set_rng_state, torch.random.get_rng_state()),
    ]


def _determinism(torch: Any) -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _put_back_determinism(torch: Any, before: tuple[bool, bool]) -> None:
    if _determinism(torch) != before:  # the call imports torch's compiler, which takes a second
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _torch_as_loaded() -> None:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.set_float32_matmul_precision("highest")
    _put_back_determinism(torch, (False, False))
    torch.set_flush_denormal(False)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))


def _left_running(before: set[threading.Thread]) -> list[str]:
    """Threads that the action began and that go on, but for those of the engine and of libraries that watch."""
    left = [thread for thread in threading.enumerate() if thread not in before]
    own = [thread for thread in left if _module_of(thread).startswith(_OWN_THREADS)]
    return [f"its thread '{thread.name}' still runs" for thread in left if thread not in own]


def _module_of(thread: threading.Thread) -> str:
    target = getattr(thread, "_target", None)
    return str(getattr(target, "__module__", type(thread).__module__))


def _left_in_modules() -> list[str]:
    return [f"module {name} keeps something from call to call" for name in loaded.changed_modules()]


class _Seeds(importlib.abc.MetaPathFinder):
    """Seeds the global random states, of a library that an action imports first as soon as it is loaded."""

    def __init__(self) -> None:
        self._seed = 0
        self._asking = False

    def begin(self, seed: int) -> None:
        """Seed what is loaded, and from now on what will be."""
        self._seed = seed
        random.seed(seed)
        for name in _SEEDED:
            if name in sys.modules:
                _seed(name, seed)
        if any(name not in sys.modules for name in _SEEDED):
            sys.meta_path.insert(0, self)
        loaded.around.append(self._kept)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """What is drawn and seeded inside does not count: a module is loaded in one of the actions that use it."""
        states = {name: _state(name) for name in _SEEDED if name in sys.modules}
        own = random.getstate()
        try:
            yield
        finally:
            random.setstate(own)
            for name in _SEEDED:
                if name in states:
                    _set_state(name, states[name])
                elif name in sys.modules:
                    _seed(name, self._seed)

    def end(self) -> None:
        loaded.around.remove(self._kept)
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _SEEDED or self._asking:  # another finder asks all of them, this one too
            return None
        self._asking = True
        try:
            specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            spec = next((found for found in specs if found is not None), None)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Seeding(spec.loader, name, self._seed)
        return spec


class _Seeding(Before):
    """Seeds the module when it is loaded."""

    def __init__(self, loader: Any, name: str, seed: int) -> None:
        super().__init__(loader)
        self._name, self._seed = name, seed

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)
        _seed(self._name, self._seed)


def _state(name: str) -> Any:
    module = sys.modules[name]
    return module.get_rng_state() if name == "torch" else module.get_state()


def _set_state(name: str, state: Any) -> None:
    module = sys.modules[name]
    (module.set_rng_state if name == "torch" else module.set_state)(state)


def _seed(name: str, seed: int) -> None:
    module = sys.modules[name]
    if name == "torch" and module.version.cuda is None:
        module.default_generator.manual_seed(seed)  # manual_seed keeps a stack for devices that are not there
    elif name == "torch":
        module.manual_seed(seed)
    else:
        module.seed(seed)
