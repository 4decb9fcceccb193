"""A network tuned part by part: each learned on what the parts before it make of the data, and kept where it gains.

    min over codes, step sizes and biases of a part of   E |y^ - y|^2,    y^ on x^, y the float model's

Every part is a sub-result: what was learned before a kill is there again. A part whose outputs on held-out samples err
no less afterwards stays as it was. All that is random comes from seeds of the parts' own names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qpipe.methods.learning.begin import begun
from qpipe.methods.learning.carry import Carry, Memory
from qpipe.methods.learning.selection import Score, gains
from qpipe.methods.learning.stretch import Problem, Randomness, Stretch, groups, own_biases
from qpipe.numerics.grid import quantize_dequantize
from qpipe.numerics.learning.cells import WIDEST, powers_of_two
from qpipe.numerics.learning.losses import fisher, mse, squared_error
from qpipe.numerics.learning.optimize import Learned, learn
from qpipe.numerics.learning.options import LearningOptions
from qpipe.numerics.learning.roundings import RoundingName, start
from qpipe.numerics.learning.variables import Free, Step, Variable

if TYPE_CHECKING:
    from qpipe.methods.learning.parts import Part
    from qpipe.model.network.network import Network
    from qpipe.model.structure.layers import Layer

Array = npt.NDArray[Any]
Memo = Callable[..., Any]
MARGIN = 0.45
"""How much of a float weight counts beside its code, in steps; of 2 bits none does."""
LossName = Literal["mse", "fisher_diag"]
"""The squared error of a part's output, as it is or weighed by what the model's outputs make of it."""
Begin = Literal["gram", "model"]
"""The codes before anything is learned: solved in closed form when the part's turn has come, or the model's own."""


@dataclass(frozen=True)
class Tuning:
    """What is learned in each part, and how.

    `relative` counts the rates of weights in steps of their grids and those of biases in the size of what they are
    added to, else both in their own units. `learn_scales` and `learn_steps` let the step sizes of weights and of
    activations move, unless they are powers of two; `activations` False leaves activations in float; `random` is what
    is mixed and dropped; `parallel` shows every part what the untuned model gives; `selective` keeps a part only where
    the outputs of the whole model are better, too, by their error or by `score`; `begin` says with which codes, and
    `begin_bias` whether biases take up the mean error of those.
    """

    learning: LearningOptions = field(default_factory=LearningOptions)
    rounding: RoundingName = "ste_weight"
    relative: bool = True
    learn_scales: bool = True
    learn_steps: bool = True
    update_bias: bool = True
    activations: bool = True
    output_qdq: bool = False
    random: Randomness = field(default_factory=Randomness)
    parallel: bool = False
    selective: bool = False
    score: Score | None = None
    memory: Memory = "auto"
    begin: Begin = "gram"
    begin_bias: bool = True
    loss: LossName = "mse"


@dataclass(frozen=True)
class Surroundings:
    """What of a stage's context and params the tuning asks for; `seed` is the stage's own."""

    memo: Memo
    seed_of: Callable[..., int]
    note: Callable[[str], None]
    progress: Callable[[int, int, str], None]
    device: str = "cpu"
    seed: int = 0


def tune(
    model: Network,
    reference: Network,
    arrays: Mapping[str, Array],
    parts: Sequence[Part],
    tuning: Tuning,
    around: Surroundings,
) -> tuple[Network, dict[str, Any]]:
    """`model` with the weights of `parts` on their grids, frozen, and the report of each part, by its name.

    Raises InputError for data that do not fit.
    """
    carry = Carry(model, reference, arrays, parts, memory=tuning.memory, device=around.device)
    outputs = carry.watch_outputs() if tuning.selective or tuning.loss == "fisher_diag" else []
    if tuning.selective and not outputs:
        around.note("The model's outputs do not tell samples apart: what a part gives itself decides what is kept.")
    reports: dict[str, Any] = {}
    for number, part in enumerate(parts):
        problem = Problem(*carry.before(part))
        if tuning.loss == "fisher_diag":
            seed = around.seed_of(str(around.seed), part.name, "fisher")
            problem = replace(problem, weights=carry.sensitivity(part.output, outputs, seed))
        if tuning.begin == "gram":
            model = begun(
                model, reference, part, carry, update_bias=tuning.begin_bias, memo=around.memo,
                seed=lambda name: around.seed_of(str(around.seed), name),
            )  # fmt: skip
        found = _remembered(model, reference, part, problem, tuning, around, (number, len(parts)))
        tuned, report = _with(model, part, found), dict(found["report"])
        if tuning.selective and outputs and report["kept"] == "after":
            before = _with(model, part, _start(model, part))
            judging = held_out(carry.units, tuning.learning.hold_out, around.seed)
            units = np.arange(carry.units) if judging is None else judging.numpy()
            better, said = _better(carry, part, (before, tuned), outputs, units, tuning.score)
            tuned, report = (tuned, report | said) if better else (before, {**report, **said, "kept": "before"})
        carry.after(part, None if tuning.parallel else tuned)
        model, reports[part.name] = tuned, {**report, "layers": [layer.name for layer in part.layers]}
        around.progress(number + 1, len(parts), part.name)
    if kept := [f"'{name}'" for name, report in reports.items() if report["kept"] == "before"]:
        names = ", ".join(kept)
        around.note(f"{len(kept)} of {len(parts)} stay as they began, since learning gained nothing: {names}.")
    return model, reports


def _remembered(
    model: Network,
    reference: Network,
    part: Part,
    problem: Problem,
    tuning: Tuning,
    around: Surroundings,
    place: tuple[int, int],
) -> dict[str, Any]:
    """{"value NAME", "scale NAME": arrays, "report": JSON} of one part, as the cache gives it back."""
    seed = around.seed_of(str(around.seed), part.name)
    stretch = Stretch(
        model, part, problem, activations=tuning.activations, output_qdq=tuning.output_qdq,
        random=tuning.random, device=around.device,
    )  # fmt: skip
    number, count = place
    total = tuning.learning.iterations

    def run(*_: Any) -> dict[str, Any]:
        learned = _learned(model, reference, part, stretch, tuning, around, seed, lambda done, of: around.progress(
            number * total + done, count * total, part.name
        ))  # fmt: skip
        scales = {f"scale {name}": encoding.scale for name, encoding in learned.encodings.items()}
        values = {f"value {name}": value.cpu().numpy() for name, value in learned.values.items()}
        return {**values, **scales, "report": learned.report}

    return dict(around.memo("part", run, *_everything(model, reference, part, stretch, tuning), seed, around.seed))


def _everything(model: Network, reference: Network, part: Part, stretch: Stretch, tuning: Tuning) -> list[Any]:
    """All that the result for a part depends on, but for the seeds: what it computes, its weights, grids, samples."""
    meta, blobs = stretch.model.pack()
    weights = {
        name: [reference.param(name), model.param(name), model.encodings[name].to_json()] for name in part.weights
    }
    problem = stretch.problem
    held = [[value.rows for value in track] for track in (problem.x_hat, problem.x, [problem.y])]
    held += [[problem.weights.rows]] if problem.weights is not None else []
    options = {key: value for key, value in asdict(tuning).items() if key not in _ELSEWHERE}
    own = [list(own_biases(model, part)), sorted(stretch.steps)]
    packed = {name: np.frombuffer(blob, np.uint8) for name, blob in sorted(blobs.items())}
    return [meta, packed, weights, held, options, own]


_ELSEWHERE = frozenset({"memory", "selective", "score", "parallel", "begin", "begin_bias"})
"""Options that act before a part is learned, or after."""


def _learned(
    model: Network,
    reference: Network,
    part: Part,
    stretch: Stretch,
    tuning: Tuning,
    around: Surroundings,
    seed: int,
    progress: Callable[[int, int], None],
) -> Learned:
    variables = variables_of(model, reference, part, stretch, tuning, around.device)
    units = len(stretch.problem.y.rows)
    axis = -1 - len(part.layers[-1].kernel_shape)
    weighed = tuning.loss == "fisher_diag"
    return learn(
        variables, stretch, stretch.batch, units, options=tuning.learning,
        loss=fisher(axis) if weighed else mse(axis), judge=weighed_error if weighed else squared_error,
        held_out=held_out(units, tuning.learning.hold_out, around.seed), seed=seed, progress=progress,
    )  # fmt: skip


def weighed_error(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The squared error weighed by squared gradients, and the squares of the targets weighed so."""
    y, g = targets
    return squared_error(outputs * g, y * g)


def variables_of(
    model: Network, reference: Network, part: Part, stretch: Stretch, tuning: Tuning, device: str = "cpu"
) -> dict[str, Variable]:
    """What is learned in a part: its weights, its own biases, the step sizes of the activations inside."""
    features, size = stretch.measured()
    found: dict[str, Variable] = {}
    for name in part.weights:
        encoding = model.encodings[name]
        weight, current = (torch.tensor(each.param(name), device=device) for each in (reference, model))
        scales = tuning.learn_scales and not powers_of_two(encoding)
        out_axis, in_axis = factor_axes(next(layer for layer in part.layers if layer.weight == name))
        found[name] = start(
            tuning.rounding, weight, current, encoding, learn_scale=scales, relative=tuning.relative,
            margin=MARGIN if encoding.bitwidth > 2 else 0.0, out_axis=out_axis, in_axis=in_axis,
        )  # fmt: skip
    for name in own_biases(model, part) if tuning.update_bias else ():
        layer = next(layer for layer in part.layers if layer.bias == name)
        unit = size.get(layer.output, 1.0) if tuning.relative else 1.0
        found[name] = Free(torch.tensor(model.param(name), device=device), unit=unit)
    learnable = tuning.learn_steps and tuning.learning.rates.get("act_scale", 0.0) > 0.0
    stretch.steps = {name: e for name, e in stretch.steps.items() if learnable and not powers_of_two(e)}
    stretch.steps = {name: e for name, e in stretch.steps.items() if e.bitwidth <= WIDEST}
    stretch.learn_steps()
    for name, encoding in stretch.steps.items():
        found[name] = Step(encoding, features.get(name, 1), device)
    return found


def factor_axes(layer: Layer) -> tuple[int | None, int | None]:
    """Along which axes of its weight FlexRound has factors of their own: both of a convolution; those of a linear layer
    lie with its scales."""
    return (layer.channel_axis, 1 - layer.channel_axis) if layer.kernel_shape else (None, None)


def held_out(units: int, share: float, seed: int) -> Tensor | None:
    """The units that only judge, the same in every part; None where that are none."""
    count = round(share * units)
    if not count:
        return None
    mixed = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    return mixed[:count].sort().values


def _start(model: Network, part: Part) -> dict[str, Any]:
    """What a part is before anything is learned: its weights on their grids."""
    weights = {name: quantize_dequantize(model.param(name), model.encodings[name], name) for name in part.weights}
    return {f"value {name}": value for name, value in weights.items()}


def _with(model: Network, part: Part, found: Mapping[str, Any]) -> Network:
    """`model` with what was found for a part; a step size goes to all that share the grid."""
    editor = model.edit()
    members = groups(model)
    for key, array in found.items():
        kind, _, name = key.partition(" ")
        if kind == "value" and name in model.graph.initializers:
            editor.set_param(name, np.asarray(array).reshape(model.param(name).shape))
        elif kind == "scale":
            for each in members.get(name, [name]):
                editor.encodings[each] = replace(model.encodings[each], scale=np.asarray(array))
    for name in part.weights:
        editor.encodings[name] = replace(editor.encodings[name], frozen=True)
    return editor.model()


def _better(
    carry: Carry, part: Part, models: tuple[Network, Network], names: Sequence[str], units: Array, score: Score | None
) -> tuple[bool, dict[str, float]]:
    """Whether the outputs of the second model are better on these units than those of the first, and by what."""
    wanted = carry.float_outputs(names, units)
    before, after = (carry.outputs(part, model, names, units) for model in models)

    def scored(found: Mapping[str, Array]) -> float:
        assert score is not None
        return score(carry.by_sample(found, units), carry.by_sample(wanted, units), carry.samples(units))

    return gains(before, after, wanted, None if score is None else scored)
