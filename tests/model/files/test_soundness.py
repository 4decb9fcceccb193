"""Graphs that are none: every defect is listed, in one error, and good graphs pass."""

from __future__ import annotations

import pytest

from qpipe.errors import InputError
from qpipe.model import Model
from qpipe.model.files.soundness import broken
from tests.model.nets import normal, parsed

HEADER = "net (float[N,4] x) => (float[N,4] y)"
BROKEN = {
    "y = Add(x, nowhere)": "node 0 (op Add) reads 'nowhere', which nothing produces",
    "[n] a = Relu(x)  [m] a = Exp(x)  y = Add(a, a)": "value 'a' is produced twice, the second time by node 'm'",
    "[n] a = Add(x, b)  [m] b = Relu(a)  y = Add(a, b)": "a cycle runs through, or leads to, node 'n' (op Add)",
    "z = Relu(x)": "nothing produces the output 'y'",
    "[n] y = Relu(x, x, x)": "node 'n' (op Relu) has 3 inputs, 1 are allowed",
    "[n] y = Relu<foo=3>(x)": "node 'n' (op Relu) has the attribute 'foo', which its operator does not know",
    "[n] y = Concat(x, x)": "node 'n' (op Concat) lacks the attribute 'axis'",
}


@pytest.mark.parametrize(("body", "clause"), BROKEN.items())
def test_a_defect_is_told_in_a_clause(body: str, clause: str) -> None:
    (found,) = broken(parsed(f"{HEADER} {{ {body} }}"))
    assert found.startswith(clause)


def test_all_defects_are_listed_at_once() -> None:
    with pytest.raises(InputError, match="broken in 3 places") as caught:
        Model.from_proto(parsed(f"{HEADER} {{ a = Add(x, p)  b = Add(x, q)  y = Concat(a, b) }}"))
    assert str(caught.value).count("\n") == 3


def test_an_output_listed_twice() -> None:
    proto = parsed(f"{HEADER} {{ y = Relu(x) }}")
    proto.graph.output.append(proto.graph.output[0])
    assert broken(proto) == ["the output 'y' is listed twice"]


def test_order_optional_inputs_and_outer_values_are_no_defects() -> None:
    proto = parsed(
        f"""{HEADER} {{
        c = Constant<value=bool {{1}}>()  y = Add(z, k)  k = Clip(x, , w)
        z = If (c) <then_branch = yes () => (float[N,4] t) {{ t = Mul(x, w) }},
                    else_branch = no () => (float[N,4] e) {{ e = Relu(x) }}> }}""",
        w=normal(),
    )
    assert broken(proto) == []


def test_what_is_left_out_on_both_sides_is_no_cycle() -> None:
    """A recurrent node without a first state and without the output for the last one: both are called ""."""
    text = "net (float[T,N,4] x) => (float[T,D,N,3] y) { y, , c = LSTM<hidden_size=3>(x, w, r, , , , c0) }"
    proto = parsed(text, w=normal(1, 12, 4), r=normal(1, 12, 3), c0=normal(1, 2, 3))
    assert broken(proto) == []
    Model.from_proto(proto)
