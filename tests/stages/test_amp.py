"""amp: the mix is what brute force finds, a new budget measures nothing again, and the toolkits' defects are none."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from qpipe.errors import ConfigError, InputError
from qpipe.methods.placement.target import Limits
from qpipe.numerics.grid import quantize_dequantize, same_grid
from qpipe.numerics.metrics import sqnr_db
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.param import coerce
from qpipe.stage import Context, Samples, Scores
from qpipe.stages.adaround import adaround
from qpipe.stages.amp import admitted, amp
from qpipe.stages.calibrate import calibrate
from qpipe.stages.evaluate import evaluate
from qpipe.stages.parity import parity

WEIGHT, ACTIVATION = TensorScheme(4, True, True, "per_channel"), TensorScheme(8, False, False)
SCHEME = Scheme(WEIGHT, ACTIVATION)
NET = """n (float[N,3,6,6] x) => (float[N,5] y) {
    t = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(t)
    u = Conv<pads=[1,1,1,1]>(r, k)  s = Add(u, r)
    g = GlobalAveragePool(s)  f = Flatten(g)  y = Gemm<transB=1>(f, v, c) }"""
PARAMS = {"w": (8, 3, 3, 3), "b": (8,), "k": (8, 8, 3, 3), "v": (5, 8), "c": (5,)}
CANDIDATES = ("w2a8", "w4a8", "w8a16")
OPEN = {"metric": "sqnr_db", "candidates": CANDIDATES}


class Kept(Context):
    """Keeps sub-results and counts new ones by name; dies after `lives` of them."""

    def __init__(self, lives=10**9):
        self.kept, self.lives, self.new, self.notes = {}, lives, [], []

    def memo(self, name, fn, *inputs):
        from qpipe.keys.hashing import digest

        key = digest(name, list(inputs))
        if key not in self.kept:
            if len(self.new) == self.lives:
                raise KeyboardInterrupt
            self.kept[key] = fn(*inputs)
            self.new.append(name)
        return self.kept[key]

    def note(self, sentence):
        self.notes.append(sentence)


@pytest.fixture
def model(network):
    return network(NET, PARAMS)


def samples(seed, count, labels=False):
    x = np.random.default_rng(seed).normal(size=(count, 3, 6, 6)).astype(np.float32)
    return Samples({"x": x}, np.arange(count) % 5 if labels else None)


@pytest.fixture
def forwards(monkeypatch):
    """The number of samples of each pass of a model, in the order of the passes."""
    import qpipe.methods.mixing.judge as judge

    counted, run = [], judge.run

    def counting(model, arrays, **options):
        counted.append(len(arrays["x"]))
        return run(model, arrays, **options)

    monkeypatch.setattr(judge, "run", counting)
    return counted


def mixed(model, target, *, data=None, evaluation=None, **options):
    given = {"scheme": SCHEME, "target": target, **OPEN, **options}
    return amp(model, data or samples(0, 24), evaluation or samples(1, 20), **given)


def rows(found, name):
    return found.scores.values[name]


def bits(model):
    return {name: e.bitwidth for name, e in model.encodings.items()}


def test_what_shares_a_grid_a_layer_or_an_operator_shares_a_candidate(model, target):
    found = mixed(model, target, min_score=30.0)
    assert [row["group"] for row in rows(found, "groups")] == ["w", "k", "v", "s", "y"]
    of, activation = bits(found.model), {2: 8, 4: 8, 8: 16}
    assert activation[of["w"]] == of["x"]
    assert activation[of["k"]] == of["r"]
    assert of["u"] == of["r"]  # the Add reads both
    assert activation[of["v"]] == of["f"] == of["g"]
    assert len(set(of.values())) > 2


def bitops(of):
    """By hand: multiplications times both bitwidths, and the elements of each grid times theirs."""
    products = 8 * 36 * 27 * of["x"] * of["w"] + 8 * 36 * 72 * of["r"] * of["k"] + 5 * 8 * of["f"] * of["v"]
    elements = {"x": 3 * 36, "r": 8 * 36, "u": 8 * 36, "s": 8 * 36, "f": 8, "y": 5}
    return products + sum(count * of[name] for name, count in elements.items())


def size_bits(of):
    return sum(np.prod(PARAMS[name]) * of[name] for name in ("w", "k", "v"))


def test_costs_are_those_counted_by_hand(model, target):
    found = mixed(model, target, min_score=30.0)
    of = bits(found.model)
    values = found.scores.values
    assert values["bitops"] == bitops(of)
    assert values["size_bytes"] == size_bits(of) // 8
    for row, (weight, activation) in zip(rows(found, "uniform"), [(2, 8), (4, 8), (8, 16)], strict=True):
        same = {name: weight if name in "wkv" else activation for name in of}
        assert (row["bitops"], row["size_bytes"]) == (bitops(same), size_bits(same) // 8)
    assert values["share"] == values["bitops"] / max(row["bitops"] for row in rows(found, "uniform"))


def uniform_grids(model, target, data, name):
    weight, activation = (int(text) for text in name[1:].split("a"))
    scheme = Scheme(replace(WEIGHT, bitwidth=weight), replace(ACTIVATION, bitwidth=activation))
    return calibrate(model, data, scheme=scheme, target=target).encodings


def outputs(model, data, quantized=True):
    import torch

    with torch.no_grad():
        return model.to_torch(quantized=quantized)(torch.tensor(data.arrays["x"])).numpy()


def test_sensitivities_are_the_sqnr_of_each_group_alone(model, target):
    data = samples(0, 24)
    found = mixed(model, target, data=data, min_score=30.0)
    reference = outputs(model, data, quantized=False)
    members = {"w": "wx", "k": "kru", "v": "vgf", "s": "s", "y": "y"}
    for name in CANDIDATES:
        grids = uniform_grids(model, target, data, name)
        for row in rows(found, "groups"):
            alone = {tensor: grids[tensor] for tensor in members[row["group"]]}
            expected = sqnr_db(outputs(model.with_encodings(alone), data), reference)
            assert row[f"alone {name}"] == pytest.approx(expected, abs=1e-3)


def every_mix(found):
    """(bits of all tensors, sum of the losses alone) of every mix of the groups' candidates."""
    members = {"w": "wx", "k": "kru", "v": "vgf", "s": "s", "y": "y"}
    groups = rows(found, "groups")
    for names in itertools.product(CANDIDATES, repeat=len(groups)):
        of, loss = {}, 0.0
        for name, row in zip(names, groups, strict=True):
            weight, activation = (int(text) for text in name[1:].split("a"))
            of.update({t: weight if t in "wkv" else activation for t in members[row["group"]]})
            loss += 10 ** (-row[f"alone {name}"] / 10)
        yield of, loss


@pytest.mark.parametrize("kind", ["bitops", "size"])
@pytest.mark.parametrize("budget", [0.26, 0.4, 0.75, 1.0])
def test_the_integer_programme_is_the_best_of_all_mixes(model, target, budget, kind):
    evaluation = samples(1, 20)
    found = mixed(model, target, max_drop=None, budget=budget, cost=kind)
    count = {"bitops": bitops, "size": size_bits}[kind]
    limit = budget * max(count(of) for of, _ in every_mix(found))
    best = min(loss for of, loss in every_mix(found) if count(of) <= limit)
    measured = rows(found, "measured")
    tried = [row for row in measured if row["share"] <= budget * (1 + 1e-12)]
    assert min(row["loss"] for row in tried) == pytest.approx(best, rel=1e-6)
    assert count(bits(found.model)) <= limit
    assert found.scores.values["score"] == max(row["score"] for row in tried)
    expected = evaluate(found.model, evaluation, model, metric="sqnr_db").values["score"]
    assert found.scores.values["score"] == pytest.approx(expected, abs=1e-3)


def test_max_drop_is_kept_for_less_than_any_uniform_candidate_that_keeps_it(model, target):
    evaluation = samples(1, 20)
    for least in (24.0, 28.0, 33.0):
        found = mixed(model, target, min_score=least)
        score = evaluate(found.model, evaluation, model, metric="sqnr_db").values["score"]
        assert score >= least - 1e-3
        assert found.scores.values["met"]
        meeting = [row["bitops"] for row in rows(found, "uniform") if row["score"] >= least]
        assert found.scores.values["bitops"] <= min(meeting)
        cheaper = [row for row in rows(found, "measured") if row["share"] < found.scores.values["share"]]
        assert all(row["score"] < least for row in cheaper) or found.scores.values["conversions_saved"]


def test_a_new_budget_or_goal_measures_no_sensitivity_again(model, target, forwards):
    """Counted: forward passes over the 24 samples of the calibration, and over the 20 of the evaluation."""
    ctx, data, evaluation = Kept(), samples(0, 24), samples(1, 20)
    given = {"data": data, "evaluation": evaluation, "ctx": ctx}
    first = mixed(model, target, max_drop=None, budget=0.5, **given)
    assert forwards.count(24) == 1 + 3 + 3 + 3 + 2 + 2  # float, and every option of every group
    for goal in ({"max_drop": None, "budget": 0.3}, {"min_score": 28.0}, {"max_drop": None, "budget": 0.9}):
        before = len(forwards)
        found = mixed(model, target, **goal, **given)
        assert 24 not in forwards[before:]
        assert rows(found, "groups")[0]["alone w2a8"] == rows(first, "groups")[0]["alone w2a8"]
    before = len(forwards)
    again = mixed(model, target, max_drop=None, budget=0.5, **given)
    assert forwards[before:] == []
    assert again.scores.values == first.scores.values


def test_another_candidate_measures_that_one_alone(model, target, forwards):
    ctx = Kept()
    mixed(model, target, min_score=30.0, ctx=ctx)
    before = len(forwards)
    mixed(model, target, min_score=30.0, ctx=ctx, candidates=("w4a16", *CANDIDATES[::-1]))
    assert forwards[before:].count(24) == 1 + 3  # float; the three groups with weights
    before = len(forwards)
    mixed(model, target, min_score=30.0, ctx=ctx, candidates=CANDIDATES[1:])
    assert forwards[before:].count(24) == 0


def test_a_killed_run_goes_on_where_it_was(model, target):
    whole = Kept()
    expected = mixed(model, target, min_score=30.0, ctx=whole)
    ctx = Kept(lives=7)
    with pytest.raises(KeyboardInterrupt):
        mixed(model, target, min_score=30.0, ctx=ctx)
    ctx.lives, ctx.new = 10**9, []
    found = mixed(model, target, min_score=30.0, ctx=ctx)
    assert len(ctx.new) == len(whole.new) - 7
    assert found.scores.values == expected.scores.values
    assert bits(found.model) == bits(expected.model)


def test_scores_of_another_model_other_data_or_another_scheme_are_not_taken(model, target):
    ctx = Kept()
    mixed(model, target, min_score=30.0, ctx=ctx)
    other = model.with_params({"c": model.param("c") + 1})
    for changed in (
        {"model": other}, {"data": samples(5, 24)}, {"data": samples(0, 23)},
        {"scheme": replace(SCHEME, weight=replace(WEIGHT, granularity="per_tensor"))},
        {"scheme": replace(SCHEME, activation=replace(ACTIVATION, observer="mse"))},
        {"target": replace(target, bias="float")}, {"metric": "cosine", "max_drop": 0.1},
    ):  # fmt: skip
        given = {"model": model, "target": target, "min_score": 30.0, **changed}
        ctx.new = []
        fresh = mixed(given.pop("model"), given.pop("target"), **given)
        given = {"model": model, "target": target, "min_score": 30.0, **changed}
        kept = mixed(given.pop("model"), given.pop("target"), **given, ctx=ctx)
        assert "mix" in ctx.new, changed
        assert kept.scores.values == fresh.scores.values, changed


def test_scores_do_not_depend_on_the_size_of_batches(model, target):
    found = [mixed(model, target, min_score=30.0, batch_size=size) for size in (1, 7, 24)]
    for other in found[1:]:
        for row, same in zip(rows(found[0], "groups"), rows(other, "groups"), strict=True):
            for name in CANDIDATES:  # float32 sums in another order, 130 dB below the signal
                a, b = (10 ** (-each[f"alone {name}"] / 10) for each in (row, same))
                assert a == pytest.approx(b, rel=1e-3, abs=1e-11)


def test_no_samples_are_one_line(model, target):
    with pytest.raises(InputError, match=r"^the samples are empty"):
        mixed(model, target, min_score=30.0, data=samples(0, 0))
    with pytest.raises(ConfigError, match="must be >= 1, got 0"):
        coerce(0, amp.__stage__.params["limit"].hint, "stages.amp.limit")


def test_weights_of_every_candidate_come_from_the_float_weights(model, target):
    """Promoted from 2 to 8 bits, a weight is what 8 bits make of the float one: the grids of a uniform model."""
    data = samples(0, 24)
    found = mixed(model, target, data=data, max_drop=None, budget=1.0, candidates=("w2a8", "w8a8"))
    grids = uniform_grids(model, target, data, "w8a8")
    assert set(found.model.encodings) == set(grids)
    for name, grid in grids.items():
        assert same_grid(found.model.encodings[name], grid), name
    for name in model.params:
        np.testing.assert_array_equal(found.model.param(name), model.param(name))


def noisy(outputs, labels):
    """A score that rises a little with the outputs' precision, under noise ten times as large."""
    steps = np.frombuffer(np.ascontiguousarray(outputs).tobytes(), np.uint8)
    return 0.9 + 0.05 * np.random.default_rng(int(steps.astype(np.int64).sum())).normal()


@pytest.mark.parametrize("method", ["sqnr_db", "evaluation"])
@pytest.mark.parametrize("seed", range(4))
def test_under_noise_no_uniform_candidate_is_cheaper_and_better(model, target, seed, method):
    found = mixed(
        model, target, metric=f"{__name__}:noisy", max_drop=0.05, method=method, evaluation=samples(seed, 9)
    )
    values = found.scores.values
    least = values["float"] - 0.05
    for row in rows(found, "uniform"):
        if row["score"] >= least:
            assert values["bitops"] <= row["bitops"]
            assert values["score"] >= least
        if row["bitops"] <= values["bitops"] and not values["met"]:
            assert row["score"] <= values["score"]


def test_a_function_that_changes_under_its_name_is_asked_again(model, target, forwards, monkeypatch):
    import sys

    ctx = Kept()
    given = {"metric": f"{__name__}:noisy", "max_drop": 1.0, "ctx": ctx}
    mixed(model, target, **given)
    before = len(forwards)
    monkeypatch.setattr(sys.modules[__name__], "noisy", lambda outputs, labels: -1.0)
    found = mixed(model, target, **given)
    assert found.scores.values["float"] == found.scores.values["score"] == -1.0
    assert len(forwards) == before + 1 or len(forwards) == before  # one mix may be new, no outputs are made twice


def test_a_budget_that_cannot_be_kept_is_one_line(model, target):
    message = (
        r"^A budget of 0\.05 of the size of w8a16 cannot be kept: the cheapest mix takes 0\.25\. "
        r"Raise the budget, or name a smaller candidate\.$"
    )
    with pytest.raises(InputError, match=message):
        mixed(model, target, max_drop=None, budget=0.05, cost="size")


def test_where_no_mix_keeps_the_goal_the_best_one_comes_out_with_a_note(model, target):
    ctx = Kept()
    found = mixed(model, target, min_score=299.0, ctx=ctx)
    assert not found.scores.values["met"]
    assert found.scores.values["score"] == max(row["score"] for row in rows(found, "measured"))
    (note,) = ctx.notes
    assert re.fullmatch(r"No mix keeps sqnr_db at 299 or above \(float has 300\): the best one has [\d.]+\.", note)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ("w8a8",)}, "name at least two different ones"),
        ({"candidates": ("w8a8", "w8a8")}, "name at least two different ones"),
        ({"candidates": ("w8a8", "8/8")}, "a candidate is a text like w4a8, w4 .weights alone. or float, got '8/8'"),
        ({"candidates": ("w8a8", "w9a8")}, "bitwidth must be one of"),
        ({"max_drop": None}, "set max_drop, min_score or budget"),
        ({"scheme": Scheme(WEIGHT, None)}, "the scheme leaves activations in float: write w2 instead of w2a8"),
    ],
)  # fmt: skip
def test_candidates_and_goals_that_mean_nothing_are_refused_before_anything_runs(target, options, message):
    defaults = {name: param.default for name, param in amp.__stage__.params.items()}
    given = {**defaults, "scheme": SCHEME, "target": target, **OPEN, **options}
    with pytest.raises(ValueError, match=message):
        amp.__stage__.check(given)


def test_the_target_says_what_it_forbids(target):
    defaults = {name: param.default for name, param in amp.__stage__.params.items()}
    narrow = replace(target, name="narrow", activation=Limits(bitwidths=(8,)))
    given = {**defaults, "scheme": SCHEME, "target": narrow, "candidates": ("w4a8", "w8a16")}
    with pytest.raises(InputError, match="takes activations with 8 bits, not 16, as the scheme 'w8a16' has"):
        amp.__stage__.check(given)
    given = {**given, "candidates": ("w8a8", "float"), "target": replace(narrow, activations="required")}
    with pytest.raises(InputError, match="leave out 'float'"):
        amp.__stage__.check(given)


def test_the_overrides_it_names_give_the_same_grids_by_hand(model, target):
    from qpipe.numerics.scheme import Override

    data = samples(0, 24)
    found = mixed(model, target, data=data, min_score=30.0)
    written = coerce(rows(found, "overrides"), tuple[Override, ...], "scheme.overrides")
    by_hand = calibrate(model, data, scheme=replace(SCHEME, overrides=written), target=target)
    assert set(by_hand.encodings) == set(found.model.encodings)
    for name, grid in found.model.encodings.items():
        assert same_grid(grid, by_hand.encodings[name]), name


def test_weights_alone_and_tensors_without_a_choice_stand_alone(model, target):
    found = mixed(model, target, candidates=("w2", "w8"), scheme=Scheme(WEIGHT, None), min_score=20.0)
    assert [row["group"] for row in rows(found, "groups")] == ["w", "k", "v"]
    assert set(found.model.encodings) == {"w", "k", "v"}
    assert found.scores.values["conversions"] == 0
    same = mixed(model, target, candidates=("w2a8", "w8a8"), min_score=20.0)
    assert [row["tensors"] for row in rows(same, "groups")] == [1, 1, 1]
    assert {e.bitwidth for n, e in same.model.encodings.items() if n not in "wkv"} == {8}


def test_float_is_a_candidate(model, target):
    found = mixed(model, target, candidates=("w2a8", "float"), min_score=30.0, conversion_slack=0.0)
    assert 0 < len(found.model.encodings) < 10
    assert {e.bitwidth for e in found.model.encodings.values()} <= {2, 8}
    assert found.scores.values["score"] >= 30.0


def test_the_choice_of_observers_is_taken(model, target):
    data = samples(0, 24)
    choice = Scores({"weight_observer": "mse", "activation_observer": "percentile", "activation_percentile": 95.0})
    found = mixed(model, target, data=data, choice=choice, max_drop=None, budget=1.0)
    scheme = Scheme(
        replace(WEIGHT, bitwidth=8, observer="mse"),
        replace(ACTIVATION, bitwidth=16, observer="percentile", percentile=95.0),
    )
    expected = calibrate(model, data, scheme=scheme, target=target).encodings
    chosen = [n for n, e in found.model.encodings.items() if e.bitwidth == expected[n].bitwidth]
    assert chosen
    assert all(same_grid(found.model.encodings[name], expected[name]) for name in chosen)


def test_tuned_weights_keep_their_grid(model, target):
    data = samples(0, 24)
    tuned = adaround(calibrate(model, data, scheme=Scheme(replace(WEIGHT, bitwidth=3), None), target=target), data)
    found = mixed(tuned, target, data=data, max_drop=None, budget=1.0)
    assert {found.model.encodings[name].bitwidth for name in "wkv"} == {3}
    for name in "wkv":
        array = found.model.param(name)
        np.testing.assert_array_equal(quantize_dequantize(array, found.model.encodings[name]), array)


def test_adaround_tunes_the_mix_and_the_deployed_model_computes_what_is_simulated(model, target):
    data, evaluation = samples(0, 64), samples(1, 40)
    found = mixed(model, target, data=data, evaluation=evaluation, min_score=25.0)
    assert len(set(bits(found.model).values())) > 2
    tuned = adaround(found.model, data)
    assert bits(tuned) == bits(found.model)
    assert all(tuned.encodings[name].frozen for name in "wkv")
    for model_of_interest in (found.model, tuned):
        scores = parity(model_of_interest, evaluation).values
        assert scores["agree"]
    better = evaluate(tuned, evaluation, model, metric="sqnr_db").values["score"]
    assert better > evaluate(found.model, evaluation, model, metric="sqnr_db").values["score"]


@pytest.mark.parametrize(
    ("scheme", "limits", "expected"),
    [
        (SCHEME, (8, 16), ("w4a8", "w8a8", "w8a16")),
        (replace(SCHEME, weight=replace(WEIGHT, bitwidth=2)), (8, 16), ("w4a8", "w8a8", "w8a16", "w2a8")),
        (Scheme(WEIGHT, replace(ACTIVATION, bitwidth=16)), (16,), ("w4a16", "w8a16")),
        (SCHEME, (8,), ("w4a8", "w8a8")),
        (Scheme(WEIGHT, None), (), ("w4", "w8")),
    ],
)  # fmt: skip
def test_candidates_that_are_not_named_are_those_that_the_target_takes(target, scheme, limits, expected):
    assert admitted(scheme, replace(target, activation=Limits(bitwidths=limits))) == expected


def test_where_the_target_leaves_nothing_to_mix_the_scheme_comes_out_with_a_note(model, target):
    ctx, data = Kept(), samples(0, 24)
    only = replace(target, weight=Limits(bitwidths=(4,)), activation=Limits(bitwidths=(8,)))
    found = mixed(model, only, data=data, candidates=None, max_drop=0.5, ctx=ctx)
    expected = calibrate(model, data, scheme=SCHEME, target=only).encodings
    assert all(same_grid(found.model.encodings[name], grid) for name, grid in expected.items())
    assert ctx.notes[0] == "All candidates (w4a8) come to the same grids in this model."


def test_gram_sees_samples_that_only_the_observers_saw(model, target):
    data, fainter = samples(0, 16).arrays["x"], samples(0, 16).arrays["x"].copy()
    fainter[5] *= 0.01  # the ranges stay, and of the four samples that `limit` takes it is none
    options = {"scheme": SCHEME, "target": target, "method": "gram", "limit": 4, "min_score": 28.0, **OPEN}
    ctx = Kept()
    found = [
        amp(model, Samples({"x": x}), samples(1, 8), ctx=ctx, **options).scores.values for x in (data, fainter)
    ]
    fresh = amp(model, Samples({"x": fainter}), samples(1, 8), ctx=Kept(), **options).scores.values
    assert found[0]["groups"] != found[1]["groups"]
    assert found[1] == fresh


def test_gram_finds_a_mix_without_a_pass_per_candidate(model, target, forwards):
    ctx = Kept()
    found = mixed(model, target, method="gram", min_score=28.0, ctx=ctx)
    assert found.scores.values["met"]
    assert 24 not in forwards
    for row in rows(found, "groups"):
        values = [row[f"alone {name}"] for name in CANDIDATES]
        assert values == sorted(values), row["group"]
        assert values[0] < values[-1], row["group"]
    before = len(ctx.new)
    mixed(model, target, method="gram", max_drop=None, budget=0.5, ctx=ctx)
    assert "gram" not in ctx.new[before:]
    assert "second moments" not in ctx.new[before:]


def test_conversions_are_saved_only_where_the_goal_holds_and_for_little(model, target):
    free = mixed(model, target, min_score=28.0, conversion_slack=0.0).scores.values
    saving = mixed(model, target, min_score=28.0, conversion_slack=3.0).scores.values
    assert saving["conversions"] < free["conversions"]
    assert saving["score"] >= 28.0
    meeting = [row["share"] for row in saving["uniform"] if row["score"] >= 28.0]
    assert free["share"] < saving["share"] <= min(meeting)


def test_labels_are_what_evaluation_scores_by(model, target):
    labelled = samples(3, 40, labels=True)
    with pytest.raises(InputError, match="The metric 'top1' needs labels"):
        mixed(model, target, metric="top1", max_drop=0.1)
    found = mixed(model, target, metric="top1", method="evaluation", max_drop=0.1, evaluation=labelled)
    assert found.scores.values["float"] == evaluate(model, labelled, quantized=False).values["score"]
    assert found.scores.values["score"] == evaluate(found.model, labelled).values["score"]


def test_another_bitwidth_of_one_layer_by_override_solves_that_layer_and_those_behind_it(model, target):
    from qpipe.numerics.scheme import Override

    data, ctx = samples(0, 40), Kept()
    weights = [layer.weight for layer in model.layers()]

    def tuned(*overrides):
        written = coerce(list(overrides), tuple[Override, ...], "scheme.overrides")
        scheme = replace(SCHEME, overrides=written)
        ctx.new = []
        calibrated = calibrate(model, data, scheme=scheme, target=target, ctx=ctx)
        return adaround(calibrated, data, ctx=ctx)

    tuned()
    assert ctx.new.count("gram") == len(weights) == 3
    for place, weight in enumerate(weights):
        found = tuned({"nodes": [weight], "weight": {"bitwidth": 8}})
        assert found.encodings[weight].bitwidth == 8
        assert ctx.new == ["gram"] * (len(weights) - place)


def test_the_search_is_on_held_out_samples_that_have_the_labels(model, target, forwards):
    given = {"data": samples(1, 12), "evaluation": samples(2, 17, labels=True), "max_drop": 0.2, "metric": "top1"}
    mixed(model, target, **given, held_out=samples(3, 19, labels=True))
    assert 17 not in forwards
    assert 19 in forwards
    forwards.clear()
    mixed(model, target, **given, held_out=samples(3, 19))
    assert 17 in forwards
    assert 19 not in forwards
    mixed(model, target, **given | {"metric": "sqnr_db", "max_drop": None, "min_score": 20.0}, held_out=samples(3, 19))
    assert 19 in forwards
