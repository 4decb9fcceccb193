"""The edge: Hydra, commands, completion, and mistakes told in one line."""
