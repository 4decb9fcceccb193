"""State dicts: read from a file without unpickling code, and loaded into a module whose names and shapes they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from qpipe.errors import InputError


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from .safetensors, or from what torch.save wrote, read without unpickling code; or InputError."""
    if not path.is_file():
        raise InputError(f"There is no file of weights {path}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"The weights {path} cannot be read: {reason}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise InputError(
            f"{path} holds no state dict (tensors by name). Save it with torch.save(module.state_dict())."
        )
    return {str(name): value for name, value in found.items()}


def fill(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Load `weights` into `module`. Errors: InputError, one sentence, for names or shapes that do not fit."""
    prefix = "module."  # of DataParallel
    if weights and all(name.startswith(prefix) for name in weights):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    own = module.state_dict()
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    loaded = {own[name].data_ptr() for name in own if name in weights and own[name].numel()}
    missing = [
        name
        for name in own
        if name not in weights
        and not name.endswith("num_batches_tracked")
        and own[name].data_ptr() not in loaded  # a tied parameter: filled under its other name
    ]
    unexpected = [name for name in weights if name not in own]
    problems = (("of another shape", shapes), ("missing", missing), ("unexpected", unexpected))
    if any(names for _, names in problems):
        listed = "; ".join(f"{what}: {shortened(names)}" for what, names in problems if names)
        raise InputError(f"The weights {source} do not fit {type(module).__name__}: {listed}.")
    module.load_state_dict(dict(weights), strict=False)


def shortened(names: Sequence[str], most: int = 6) -> str:
    """The names in one line, the first `most` of them and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
