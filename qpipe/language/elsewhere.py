"""What other toolkits call the params of our stages: for the message to a person who writes them as there.

docs/names.md has the same, with the stages, and what has no counterpart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

TOOLKITS: Mapping[str, Mapping[str, str]] = {
    "Quark": {
        "NumIterations": "iterations",
        "BatchSize": "batch_size",
        "LearningRate": "lr",
        "LRAdjust": "lr_adjust",
        "EarlyStop": "early_stop",
        "NumBatches": "early_stop",
        "SelectiveUpdate": "selective_update",
        "UpdateBias": "update_bias",
        "OutputQDQ": "output_qdq",
        "DropRatio": "drop_ratio",
        "TargetOpType": "ops",
        "RegParam": "reg_param",
        "BetaRange": "beta_range",
        "WarmStart": "warm_start",
        "FixedSeed": "seed",
        "DataSize": "limit",
        "MemOptLevel": "memory",
        "Parallel": "inputs",
        "RefModelPath": "float_model",
        "OptimAlgorithm": "solver",
    },
    "AIMET": {
        "default_num_iterations": "iterations",
        "default_reg_param": "reg_param",
        "default_beta_range": "beta_range",
        "default_warm_start": "warm_start",
        "num_batches": "limit",
        "beta_gamma_lr": "lr_ranges",
        "scales_lr": "lr_factors",
        "loss_fn": "loss",
        "allowed_accuracy_drop": "max_drop",
    },
    "AutoRound": {
        "iters": "iterations",
        "nsamples": "limit",
        "minmax_lr": "lr_scales",
        "enable_minmax_tuning": "learn_ranges",
        "enable_quanted_input": "quantized_input",
    },
    "NNCF": {"subset_size": "limit", "fast_bias_correction": "bias_correction"},
}
"""Toolkit -> its name -> ours. Case and underscores do not count, for Quark has each in two spellings."""


def called_here(name: str, known: Iterable[str]) -> str:
    """` Quark's NumIterations is 'iterations' here.`, where `name` is a toolkit's for one of `known`, or nothing."""
    allowed = set(known)
    for toolkit, names in TOOLKITS.items():
        for theirs, ours in names.items():
            if _plain(theirs) == _plain(name) and ours in allowed:
                return f" {toolkit}'s {theirs} is '{ours}' here."
    return ""


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
