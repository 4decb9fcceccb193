"""qat: trained on labels, on float's outputs, on both; data that lack labels; killed and gone on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qpipe.errors import InputError, StageError
from qpipe.numerics.grid import quantize_dequantize, same_grid
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.stage import Samples
from qpipe.stages.calibrate import calibrate
from qpipe.stages.nearest import nearest
from qpipe.stages.qat import qat, refuse_idle
from tests.stages.test_polish import NET, PARAMS, Kept, error, samples

W3A8 = Scheme(TensorScheme(3, True, True, "per_channel", observer="mse"), TensorScheme(8, False, False))
FAST = {"epochs": 3.0, "batch_size": 16, "hold_out": 0.2, "looks": 4, "lr": 3e-2, "lr_biases": 1e-2}


def hinge(outputs, labels):
    """A loss of a user's: the margin by which another class leads."""
    own = outputs.gather(1, labels[:, None])
    return (outputs - own + 1.0).clamp(min=0.0).mean()


def broken(outputs, labels):
    raise KeyError("a table")


def without_gradient(outputs, labels):
    return (outputs.argmax(1) != labels).float().mean()


@pytest.fixture
def net(network):
    return network(NET, PARAMS)


def labelled(net, data):
    """The class that is largest for a sample, as the float model has it beside the mean of `samples(0, 160)`: what it
    does not say itself, and can learn to."""
    mean, outputs = (
        np.asarray(net.session(quantized=False).run(None, dict(each.arrays))[0]) for each in (samples(0, 160), data)
    )
    return Samples(data.arrays, (outputs - mean.mean(0)).argmax(1).astype(np.int64))


def share_right(model, data):
    outputs = model.session(mode="deploy").run(None, dict(data.arrays))[0]
    return float((np.asarray(outputs).argmax(1) == data.labels).mean())


def likelihood_loss(model, data):
    """The mean cross entropy by numpy, of the deployed graph in onnxruntime."""
    y = np.asarray(model.session(mode="deploy").run(None, dict(data.arrays))[0], np.float64)
    shifted = y - y.max(1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(y)), data.labels]).mean())


@pytest.fixture
def start(net, target):
    return nearest(calibrate(net, samples(0, 160), scheme=W3A8, target=target))


def test_distilled_it_comes_nearer_to_float(start, net):
    found, test = qat(start, samples(0, 160), net, **FAST), samples(1, 300)
    assert found.metadata["qat"]["kept"] == "after"
    assert error(found, net, test) < 0.7 * error(start, net, test)
    for name in ("w", "k", "v"):
        encoding = found.encodings[name]
        assert encoding.frozen
        np.testing.assert_array_equal(quantize_dequantize(found.param(name), encoding), found.param(name))


@pytest.mark.parametrize("loss", ["cross_entropy", f"{__name__}:hinge"])
def test_trained_on_labels_it_is_right_more_often(start, net, loss):
    data, test = labelled(net, samples(0, 160)), labelled(net, samples(1, 400))
    found = qat(start, data, net, loss=loss, share=0.2, **FAST)
    assert found.metadata["qat"]["kept"] == "after"
    assert share_right(found, test) > share_right(start, test) + 0.05
    assert likelihood_loss(found, test) < likelihood_loss(start, test)


def test_from_grids_alone_no_float_model_is_needed(net, target):
    calibrated = calibrate(net, samples(0, 160), scheme=W3A8, target=target)
    found, other = (qat(calibrated, samples(0, 160), *given, **{**FAST, "epochs": 1.0}) for given in ((), (net,)))
    for name in found.params:
        np.testing.assert_array_equal(found.param(name), other.param(name))
    assert all(found.encodings[name].frozen for name in ("w", "k", "v"))


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 2.0}, {"share": 0.9}, {"distillation": "kl"}, {"distillation": "kl", "temperature": 4.0},
        {"loss": "distillation", "share": 0.5}, {"share": 0.0}, {"looks": 2, "hold_out": 0.3},
        {"limit": 100}, {"seed": 3},
    ],
)  # fmt: skip
def test_every_option_acts(start, net, options):
    data = labelled(net, samples(0, 120))
    fast = {**FAST, "epochs": 1.0, "loss": "cross_entropy"}
    plain, other = (qat(start, data, net, **{**fast, **each}) for each in ({}, options))
    assert plain.metadata["qat"]["kept"] == "after"
    assert any(not np.array_equal(plain.param(name), other.param(name)) for name in plain.params)


def test_without_an_epoch_the_model_is_what_it_was(start, net):
    for options in ({}, {"range_learning": True}):
        found = qat(start, samples(0, 60), net, epochs=0.0, **options)
        assert all(np.array_equal(found.param(name), start.param(name)) for name in start.params)
        assert all(same_grid(found.encodings[name], encoding) for name, encoding in start.encodings.items())


def test_with_range_learning_zero_points_move_and_0_stays_exact(start, net, target):
    """Ranges that begin twice too wide, and off their middle, come back; symmetric ones have no end that is free."""
    def wide(name, e):
        return e if name in start.params else replace(e, scale=e.scale * 2, zero_point=(e.zero_point + 40) // 2)

    off = start.with_encodings({name: wide(name, e) for name, e in start.encodings.items()})
    data, fast = samples(0, 80), {**FAST, "lr_steps": 2e-2}
    lsq, both = (qat(off, data, net, **fast, range_learning=on) for on in (False, True))
    assert both.metadata["qat"]["kept"] == "after"
    moved = [name for name in ("x", "q", "s") if both.encodings[name].zero_point != off.encodings[name].zero_point]
    assert moved
    for name, e in both.encodings.items():
        assert e.qmin <= e.zero_point.min() <= e.zero_point.max() <= e.qmax
        assert np.array_equal(lsq.encodings[name].zero_point, off.encodings[name].zero_point)
    assert same_grid(both.encodings["r"], both.encodings["m"])  # a MaxPool moves numbers
    assert error(both, net, samples(1, 200)) < error(off, net, samples(1, 200))
    symmetric = calibrate(net, data, scheme=replace(W3A8, activation=TensorScheme(8, True, True)), target=target)
    with pytest.raises(InputError, match="no activation's zero point may move"):
        qat(nearest(symmetric), data, net, range_learning=True)


def test_killed_and_gone_on_it_ends_with_the_same_bits(start, net):
    data, options = samples(0, 120), {**FAST, "epochs": 1.0}
    whole, killed = qat(start, data, net, **options), Kept(most=2)
    with pytest.raises(KeyboardInterrupt):
        qat(start, data, net, **options, ctx=killed)
    killed.most = 10**9
    again = qat(start, data, net, **options, ctx=killed)
    assert again.metadata["qat"] == whole.metadata["qat"]
    for name in whole.params:
        np.testing.assert_array_equal(again.param(name), whole.param(name))
    assert all(same_grid(again.encodings[name], e) for name, e in whole.encodings.items())


def test_what_cannot_be_is_said_in_one_line(start, net):
    data = labelled(net, samples(0, 40))
    with pytest.raises(InputError, match=r"qat\.loss: 'cross_entropy' needs labels, and the data have none"):
        qat(start, samples(0, 40), net, loss="cross_entropy")
    with pytest.raises(InputError, match=r"qat\.float_model: 'w' was tuned before"):
        qat(start, data)
    with pytest.raises(StageError, match="broken failed: KeyError"):
        qat(start, data, net, loss=f"{__name__}:broken")
    with pytest.raises(StageError, match="without a gradient"):
        qat(start, data, net, loss=f"{__name__}:without_gradient", share=0.0)
    with pytest.raises(InputError, match="Label 9 is beyond the 5 classes"):
        qat(start, Samples(data.arrays, np.full(40, 9)), net, loss="cross_entropy")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"share": 0.7}, "there is no task to share with"),
        ({"loss": "cross_entropy", "share": 0.0, "distillation": "kl"}, "nothing is distilled"),
        ({"temperature": 2.0}, "mse has none"),
        ({"range_learning": True, "lr_steps": 0.0}, "no range is learned"),
    ],
)
def test_options_that_could_not_act_are_refused(given, said):
    plain = {"loss": "distillation", "share": 0.5, "distillation": "mse", "temperature": 1.0}
    plain |= {"range_learning": False, "lr_steps": 1e-3}
    refuse_idle(plain)
    with pytest.raises(InputError, match=said):
        refuse_idle({**plain, **given})
