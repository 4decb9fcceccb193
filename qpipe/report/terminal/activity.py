"""A node that is running, as a person sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Activity:
    """A node that is running: since when, and how far it says it is."""

    stage: str
    begun: float
    expected_s: float | None = None
    done: int = 0
    total: int = 0
    what: str = ""
    shown: float = 0.0

    def left_s(self, now: float) -> float | None:
        """Seconds to go, from its own progress where it is well under way, else from what it took before."""
        elapsed = now - self.begun
        if self.total > 0 and self.done >= max(2, self.total / 20):
            return elapsed * (self.total - self.done) / self.done
        return None if self.expected_s is None else max(0.0, self.expected_s - elapsed)
