"""Whether the rule by which steps are dropped (qpipe/plan/choice.py) chooses well, on networks that it was not made on.

    OMP_NUM_THREADS=1 python -m benchmarks.choices [NAME ...] [--seeds 1 2 3] [--schemes w4a8 w3] [--select] …

Of each network, scheme and seed there are three candidates: nearest; cle and nearest; adaround of the better one. With
`--select` a fourth stands before adaround: the observers of quantscheme_select for the better one of the two. They are
scored on held-out samples of the calibration and on the evaluation, which says what each is worth. For every number
of standard errors that a difference has to exceed (0 takes whatever is ahead) the table has

taken      steps that were taken, of all
worse      those of them that the evaluation says were worse than what stood before them, by more than two of its own
           standard errors
missed     steps that were dropped although the evaluation says that they were better by as much
lost       the mean over all of what the best of them has on the evaluation more than what was taken, in points
least      the least that what was taken has more than nearest, in points
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ladders import FOLDER, NETS, TEXT, prepared
from qpipe.methods.placement.target import Target
from qpipe.model import Model
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.plan import choice
from qpipe.stage import Samples
from qpipe.stages.adaround import adaround
from qpipe.stages.bnf import bnf
from qpipe.stages.calibrate import calibrate
from qpipe.stages.cle import cle
from qpipe.stages.evaluate import evaluate
from qpipe.stages.hold_out import hold_out
from qpipe.stages.prepare import prepare
from qpipe.stages.quantscheme_select import quantscheme_select
from tests.model.quantized import shipped

ERRORS = (0.0, 1.0, 2.0, 3.0, 4.0)
A8 = TensorScheme(8, False, False)
SCHEMES = {
    "w8a8": Scheme(TensorScheme(8, True, True, "per_tensor"), A8),
    "w4a8": Scheme(TensorScheme(4, True, True, "per_channel"), A8),
    "w4a8 minmax": Scheme(TensorScheme(4, True, True, "per_channel", observer="minmax", grid="max"), A8),
    "w3": Scheme(TensorScheme(3, True, True, "per_channel"), A8),
    "w4a4": Scheme(TensorScheme(4, True, True, "per_channel"), TensorScheme(4, False, False)),
}


def given(name: str, seed: int, folder: Path) -> tuple[Model, Samples, Samples]:
    """The network, its calibration and its evaluation."""
    words = dict(word.split("=", 1) for word in prepared(name, folder, seed))
    found = []
    for split in ("calibration", "evaluation"):
        arrays = dict(np.load(words[f"data.{split}"]))
        labels = arrays.pop("labels", None)
        found.append(Samples(arrays, labels))
    return Model.load(words["model.path"]), found[0], found[1]


def candidates(
    model: Model, scheme: Scheme, target: Target, data: Samples, score: Any, select: bool
) -> list[tuple[Any, Any]]:
    """What each of them scores: held out, and on the evaluation."""
    on: dict[str, Any] = {"scheme": scheme, "target": target}
    folded = bnf(prepare(model, data))
    floats = [folded, cle(folded, data, norms=True)]
    made = [calibrate(each, data, **on) for each in floats]
    scores = [score(each) for each in made]
    kept = int(choice.better(scores[1][0], scores[0][0]))
    if select:
        made.append(calibrate(floats[kept], data, choice=quantscheme_select(floats[kept], data, **on), **on))
        scores.append(score(made[2]))
        kept = 2 if choice.better(scores[2][0], scores[kept][0]) else kept
    return [*scores, score(adaround(made[kept], data))]


def told(
    folder: Path, names: list[str], seeds: list[int], schemes: list[str], select: bool
) -> Iterator[dict[str, Any]]:
    """The scores of all candidates, a row for each network, seed and scheme."""
    target: Target = shipped(Target, "target", "onnxruntime")
    for name in names:
        for seed in seeds if name not in TEXT else seeds[:1]:
            model, calibration, evaluation = given(name, seed, folder)
            split = hold_out(calibration, seed=seed)
            metric = TEXT.get(name, "sqnr_db" if name == "U-Net" else "top1")

            def score(candidate: Any, model=model, split=split, evaluation=evaluation, metric=metric) -> Any:  # type: ignore[no-untyped-def]
                held = evaluate(candidate, evaluation, model, split.held_out, metric=metric).values
                tested = evaluate(candidate, split.tuning, model, evaluation, metric=metric).values
                return held, tested

            for scheme in schemes:
                found = candidates(model, SCHEMES[scheme], target, split.tuning, score, select)
                yield {"network": name, "seed": seed, "scheme": scheme, "scores": found}


def by_rule(row: dict[str, Any], errors: float) -> dict[str, Any]:
    """What is taken with that many standard errors, and what the evaluation says of it."""
    held, tested = zip(*row["scores"], strict=True)
    worth = [each["score"] for each in held]
    kept, verdicts = 0, []
    for place in range(1, len(held)):
        choice.ERRORS = errors
        wins = choice.better(held[place], held[kept])
        choice.ERRORS = 2.0
        gain = next((g.amount for g in choice.gains(tested[place], tested[kept]) if g.clear), 0.0)
        verdicts.append((wins, gain))
        kept = place if wins else kept
    return {"verdicts": verdicts, "lost": max(worth) - worth[kept], "gain": worth[kept] - worth[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*NETS, *TEXT])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--select", action="store_true", help="the observers of quantscheme_select, too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in told(options.folder, options.names, options.seeds, options.schemes, options.select):
        rows.append(row)
        worth = " ".join(f"{held['score']:.4f}" for held, _ in row["scores"])
        print(f"{row['network']} {row['seed']} {row['scheme']}: {worth}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows))
    print("| standard errors | taken | worse | missed | lost | least |\n|---|---|---|---|---|---|")
    for errors in ERRORS:
        found = [by_rule(row, errors) for row in rows]
        steps = [verdict for each in found for verdict in each["verdicts"]]
        taken, worse = sum(wins for wins, _ in steps), sum(wins and gain < 0 for wins, gain in steps)
        missed = sum(not wins and gain > 0 for wins, gain in steps)
        lost, least = (100 * f(each[what] for each in found) for f, what in ((_mean, "lost"), (min, "gain")))
        print(f"| {errors:g} | {taken} of {len(steps)} | {worse} | {missed} | {lost:.2f} | {least:+.2f} |")


def _mean(values: Iterator[float]) -> float:
    return float(np.mean(list(values)))


if __name__ == "__main__":
    main()
