"""Things that must go together: whatever is joined, directly or by way of others, has one leader.

Not networkx's UnionFind: the stages that place quantizers would load networkx for it alone (0.2 s), and its version
would be in their keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Joined(Generic[T]):
    """A thing that was joined to no other leads itself."""

    def __init__(self) -> None:
        self._above: dict[T, T] = {}

    def leader(self, thing: T) -> T:
        """The one that is the same for all that were joined with `thing`."""
        while (above := self._above.get(thing, thing)) != thing:
            self._above[thing] = self._above.get(above, above)  # the way gets shorter each time
            thing = above
        return thing

    def join(self, first: T, others: Iterable[T]) -> None:
        """Put `others` under the leader of `first`."""
        for other in others:
            self._above[self.leader(other)] = self.leader(first)
