"""`make mutants`: every mutant, or those that are named, in copies of the tree side by side; a table, and a status."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from tests.mutants.mutant import BrokenMutantError, Mutant, read_tables
from tests.mutants.workplace import ROOT, Workplace


def main() -> int:
    """0 where all were noticed; 1 where one was not; 2 where one says nothing."""
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to try; all of them otherwise")
    parser.add_argument("--workers", type=int, default=2, help="copies of the tree that are at work at once")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        mutants = _named(options.names)
        survived = _try(mutants, options.workers)
    except BrokenMutantError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    verdict = "all noticed" if not survived else f"{len(survived)} SURVIVED: {', '.join(survived)}"
    print(f"{len(mutants)} mutant{'s' * (len(mutants) != 1)}, {verdict}, {time.monotonic() - started:.0f} s.")
    return 1 if survived else 0


def _named(names: Sequence[str]) -> list[Mutant]:
    """The mutants of these names, all of them where none is given; each applies."""
    known = read_tables()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BrokenMutantError(f"there is no {' and no '.join(unknown)}. There are: {', '.join(known)}.")
    chosen = [known[name] for name in names or known]
    broken = [text for mutant in chosen if (text := _broken(mutant))]
    if broken:
        raise BrokenMutantError("\n".join(["these do not apply:", *broken]))
    return chosen


def _broken(mutant: Mutant) -> str:
    try:
        mutant.applied(ROOT)
    except BrokenMutantError as error:
        return f"  {error}"
    return ""


def _try(mutants: Sequence[Mutant], workers: int) -> list[str]:
    """Print a line for each mutant as it is tried; the names of those that no test noticed."""
    places: SimpleQueue[Workplace] = SimpleQueue()
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    width = max(len(mutant.name) for mutant in mutants)

    def healthy(share: Sequence[str]) -> None:
        place = places.get()
        try:
            place.refuse_failing(share)
        finally:
            places.put(place)

    def tried(mutant: Mutant) -> bool:
        place, began = places.get(), time.monotonic()
        try:
            noticed = place.notices(mutant)
        finally:
            places.put(place)
        verdict = "noticed " if noticed else "SURVIVED"
        print(f"{mutant.name:{width}}  {verdict} {time.monotonic() - began:5.1f} s  {mutant.never}", flush=True)
        return noticed

    opened = []
    try:
        for _ in range(workers):
            opened.append(Workplace())
            places.put(opened[-1])
        with ThreadPoolExecutor(workers) as pool:
            shares = [share for i in range(workers) if (share := tests[i::workers])]
            list(pool.map(healthy, shares))
            verdicts = list(pool.map(tried, mutants))
    finally:
        for place in opened:
            place.__exit__(None, None, None)
    return [mutant.name for mutant, noticed in zip(mutants, verdicts, strict=True) if not noticed]


if __name__ == "__main__":
    sys.exit(main())
