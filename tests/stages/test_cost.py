"""cost: counted by hand on a graph of known size, and lower where more runs on integers."""

from __future__ import annotations

import numpy as np
import pytest

from qpipe.errors import StageError
from qpipe.methods.running_cost import PER_ELEMENT_NS, PER_PRODUCT_NS, START_NS
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.stage import Context, Samples
from qpipe.stages.calibrate import calibrate
from qpipe.stages.cle import cle
from qpipe.stages.cost import cost

DATA = Samples({"x": np.random.default_rng(2).random((8, 8, 16, 16), np.float32)})


@pytest.fixture
def model(network):
    return network(
        """n (float[N,8,16,16] x) => (float[N,16,16,16] y) {
            s = Conv<pads=[1,1,1,1]>(x, w)  t = Clip(s, zero, six)  y = Conv<pads=[1,1,1,1]>(t, v) }""",
        {
            "w": (32, 8, 3, 3), "v": (16, 32, 3, 3), "zero": np.array(0, np.float32), "six": np.array(6, np.float32),
        },
    )  # fmt: skip


def scheme(weight: int, activation: int | None) -> Scheme:
    found = None if activation is None else TensorScheme(activation, False, False)
    return Scheme(TensorScheme(weight, True, True, "per_channel"), found)


def test_float_is_counted_by_its_multiplications_elements_and_nodes(model):
    values = cost(model, model, DATA).values
    assert values["cost"] == values["size"] == values["bitops"] == 1.0
    products = 256 * (32 * 8 * 9 + 16 * 32 * 9)
    elements = 256 * (32 + 16)  # the bound goes into the first convolution
    counted = 2 * START_NS + products * PER_PRODUCT_NS["float"] + elements * PER_ELEMENT_NS["float"]
    assert values["time_us"] == pytest.approx(counted / 1000)
    assert (values["on_integers"], values["conversions"]) == (0.0, 0)


def test_integers_cost_less_and_what_stays_in_float_between_roundings_more(model, target):
    found = {
        bits: cost(calibrate(model, DATA, scheme=scheme(*bits), target=target), model, DATA).values
        for bits in ((8, 8), (4, 8), (8, 16))
    }
    assert found[8, 8]["cost"] < 0.6
    assert found[8, 8]["on_integers"] == 1.0
    assert found[8, 8]["conversions"] == 2  # in and out
    for wide in ((4, 8), (8, 16)):  # no kernels of 4 and of 16 bits
        assert found[wide]["cost"] > 1.0
        assert found[wide]["on_integers"] == 0.0
        assert found[wide]["conversions"] > 2
    assert found[4, 8]["size"] < found[8, 8]["size"] < 0.5
    for (weight, activation), values in found.items():  # every layer takes quantized values
        assert values["bitops"] == weight * activation / 32**2


def test_a_bound_for_each_channel_costs_a_node_and_one_scale_for_each_nothing(model, target):
    plain = calibrate(model, DATA, scheme=scheme(8, 8), target=target)
    tensor = Scheme(TensorScheme(8, True, True), TensorScheme(8, False, False))
    coarse = calibrate(model, DATA, scheme=tensor, target=target)
    equalized = calibrate(cle(model, DATA), DATA, scheme=scheme(8, 8), target=target)
    values = [cost(each, model, DATA).values for each in (plain, coarse, equalized)]
    assert values[0]["cost"] == values[1]["cost"]
    one_more = START_NS + 256 * 32 * PER_ELEMENT_NS["integer"]
    assert values[2]["time_us"] - values[0]["time_us"] == pytest.approx(one_more / 1000)


def test_what_onnxruntime_does_not_run_has_no_cost_and_a_note_says_why(model):
    class Notes(Context):
        told = ""

        def note(self, sentence):
            self.told += sentence

    context = Notes()
    narrow = Samples({"x": DATA.arrays["x"][:, :7]})
    assert cost(model, model, narrow, ctx=context).values == {"cost": None}
    assert context.told.startswith("Cost unknown: ")


def test_want_of_memory_is_no_answer(network):
    """More than a process can have addresses for, whatever the machine promises."""
    large = network(
        "n (float[N,8,16,16] x) => (float[N] y) { e = Expand(x, far)  y = ReduceMax<keepdims=0>(e, but_first) }",
        {"far": np.array([1 << 36, 1, 8, 16, 16]), "but_first": np.array([0, 2, 3, 4])},
    )
    with pytest.raises(StageError, match=r"(?s)could not be seen: .*allocate memory.*Run again, or leave 'cost' out"):
        cost(large, large, DATA)
