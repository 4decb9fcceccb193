"""Graph x cache -> verdicts with reasons. Nothing here writes."""
