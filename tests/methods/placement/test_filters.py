"""Node filters: by name, operator, module and place in the graph; one that matches nothing is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from qpipe.errors import InputError
from qpipe.methods.placement.placement import Placement, place
from qpipe.methods.placement.target import Nodes
from qpipe.model import Model
from tests.model.nets import normal, parsed
from tests.model.quantized import ONNXRUNTIME, scheme

CHAIN = """net (float[N,4] x) => (float[N,4] y) {
    [first] a = MatMul(x, w1)  [act] r = Sigmoid(a)  [second] b = MatMul(r, w2)  [third] y = MatMul(b, w3) }"""


def placed(model: Model, exclude: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> Placement:
    return place(model, replace(ONNXRUNTIME, nodes=Nodes(exclude, only)), scheme())


def chain() -> Model:
    return Model.from_proto(parsed(CHAIN, **{f"w{i}": normal(4, 4, seed=i) for i in (1, 2, 3)}))


class Nested(nn.Module):
    """Two blocks under names with dots."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()) for _ in range(11))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


FILTERS = {
    "a name": (("second",), {"w1", "w3"}),
    "a name, said so": (("name:sec.*",), {"w1", "w3"}),
    "a weight": (("w2",), {"w1", "w3"}),
    "an operator": (("type:MatMul",), set()),
    "a part": (("between:r..b",), {"w1", "w3"}),
    "the end": (("between:r..",), {"w1"}),
    "the front": (("between:..r",), {"w2", "w3"}),
    "two": (("first", "third"), {"w2"}),
}


@pytest.mark.parametrize("name", FILTERS)
def test_excluded_nodes_stay_in_float(name: str) -> None:
    exclude, weights = FILTERS[name]
    assert set(placed(chain(), exclude).weights) == weights


@pytest.mark.parametrize("name", FILTERS)
def test_only_is_the_other_way_round(name: str) -> None:
    only, others = FILTERS[name]
    assert set(placed(chain(), only=only).weights) == {"w1", "w2", "w3"} - others


def test_values_between_excluded_nodes_have_no_grid() -> None:
    found = placed(chain(), ("between:r..y",)).activations
    assert set(found) == {"x", "a", "r"}  # r: the Sigmoid's output
    assert set(placed(chain(), ("r",)).activations) == {"x", "a", "b", "y"}


def test_both_together() -> None:
    assert set(placed(chain(), exclude=("third",), only=("type:MatMul",)).weights) == {"w1", "w2"}
    assert set(placed(chain(), only=("type:MatMul",)).activations) == {"x", "a", "r", "b", "y"}


def test_a_module_and_what_is_below_it() -> None:
    model = Model.from_torch(Nested(), torch.zeros(2, 4))
    left = placed(model, ("scope:blocks.1",)).weights
    assert len(left) == 10  # not blocks.10
    assert "blocks.1.0.weight" not in left
    assert set(placed(model, only=("scope:blocks.1",)).weights) == {"blocks.1.0.weight"}
    assert not placed(model, ("scope:blocks",)).weights


SLIPS = {
    "secnod": r"exclude: 'secnod' matches nothing in the model\. Did you mean 'second'",
    "type:Matmul": r"'type:Matmul' matches nothing in the model\. Did you mean 'MatMul'",
    "module:encoder": "matches nothing.* A filter is a regular expression of names, or one of name:",
    "scope:encoder": r"'scope:encoder' matches nothing in the model \(its nodes say no modules\)",
    "between:r..bb": "'between:r..bb' names no value of the model: 'bb'",
    "between:y..x": "'between:y..x' matches nothing",
}


@pytest.mark.parametrize("text", SLIPS)
def test_a_filter_that_matches_nothing_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=SLIPS[text]):
        placed(chain(), (text,))


@pytest.mark.parametrize("text", ["(", "name:*", "between:a", "between:a..b..c"])
def test_a_filter_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"nodes\.exclude: .*(no regular expression|between:first\.\.last)"):
        Nodes((text,))
