"""The process in which a worker of a cluster carries out actions.

It asks the cache first, so that what a lost worker had finished is not made again; holds the key against what lies on
its own machine (the code, the libraries, the files of params), so that nothing is kept under a key it was not made
by; and publishes what it made itself, so that bytes and results outlive whoever asked.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from qpipe.cache.store import Store
from qpipe.errors import CacheError, ChangedError
from qpipe.keys.changes import differences
from qpipe.language.catalog import catalog
from qpipe.language.spec import NodeSpec
from qpipe.param import coerce, of_its_type
from qpipe.plan.decision import fits
from qpipe.plan.keyring import Keyring
from qpipe.plan.verdicts import Request
from qpipe.run.context import Emit
from qpipe.run.isolation import Isolation
from qpipe.run.performing import perform
from qpipe.run.stores import cache_folder
from qpipe.run.workers import open_at, serve
from qpipe.stage import REQUIRED


def carry_out(
    request: Request, store: Store, emit: Emit, threads: int, isolation: Isolation | None = None
) -> dict[str, Any]:
    """Let the result of the action stand in the cache; `stands` says "made", or "found" where it stood there already.

    Raises what the stage raises; ChangedError where this machine would give the action another key."""
    key, probe = request["key"], request.get("probe")
    if probe is not None and not store.has(probe):
        raise CacheError(
            f"the folder {store.root} of this worker's machine is not the cache of who asked. Name one that all "
            "machines see with cache.dir, or a shared cache with cache.remote."
        )
    if not request["always"]:
        found = store.result(key)
        if found is not None and fits(found, catalog()[request["stage"]]) and not store.complete(found):
            return {"stands": "found"}
    refuse_another_key(request, store)
    made = perform(request, store, emit, threads, isolation)
    refuse_another_key(request, store)  # a file may have been written to meanwhile
    if request["always"]:
        store.forget(key)  # what it read last time does not stand in the way
    store.publish(key, made)
    for line in store.settle():
        emit({"event": "message", "text": line})
    return {"stands": "made"}


def refuse_another_key(request: Request, store: Store) -> None:
    """Errors: ChangedError where code, libraries or params count otherwise here than in the key of the action."""
    stage, asked = catalog().find(request["stage"], f"stages.{request['node']}"), request["ingredients"]
    written = request["written"]
    params = {
        name: coerce(written[name], param.hint, f"stages.{request['node']}.{name}")
        if name in written
        else of_its_type(param.default, param.hint)
        for name, param in stage.params.items()
        if name in written or param.default is not REQUIRED
    }
    here = Keyring(store).ingredients(NodeSpec(request["node"], stage, {}, params, written), {})
    apart = differences({**asked, "ports": {}}, here)
    if apart:
        raise ChangedError(
            f"on the worker's machine it would be another action ({'; '.join(apart)}). Make both machines the same."
        )


def main(address: dict[str, Any], threads: int, fd: int) -> None:
    """Serve until the socket `fd` ends; the cache is at `address`, its root is this machine's own where it is null."""
    root = address["root"] or str(cache_folder(None))
    serve(open_at({**address, "root": root}), threads, fd, carry_out)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
