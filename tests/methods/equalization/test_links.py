"""Pairs of layers that may be rescaled against each other, and the bounds between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qpipe.methods.equalization.links import along, bounds, chains, find_links, rescale_bounds
from qpipe.model import Model
from qpipe.model.structure.layers import find_layers
from tests.model.nets import normal, op_types, parsed

WEIGHTS = {"w": (4, 3, 1, 1), "v": (2, 4, 1, 1), "d": (4, 1, 3, 3), "e": (8, 1, 3, 3), "u": (2, 8, 1, 1)}


def net(body: str, **more: Any) -> Model:
    """Convolutions on (N, 3, 6, 6); what `body` reads of the known names are constants."""
    tensors: dict[str, Any] = {name: normal(*shape) for name, shape in WEIGHTS.items()}
    tensors |= {"zero": np.float32(0), "six": np.float32(6), "below": np.float32(-1), **more}
    used = {name: array for name, array in tensors.items() if f", {name})" in body or f", {name}," in body}
    return Model.from_proto(parsed(f"m (float[N,3,6,6] x) => (float[a,b,c,f] y) {{ {body} }}", **used))


def linked(model: Model) -> tuple[Any, dict[str, Any], dict[str, str], Any]:
    editor = model.edit()
    layers = {layer.name: layer for layer in find_layers(model)}
    return editor, *find_links(editor, layers), layers


def test_layers_that_only_homogeneous_nodes_separate_are_a_pair() -> None:
    _, links, refused, _ = linked(net("s = Conv(x, w)  t = LeakyRelu(s)  y = Conv(t, v)"))
    (link,) = links.values()
    assert [step.node.op_type for step in link.way.steps] == ["LeakyRelu"]
    assert list(refused.values()) == ["'y' is an output of the model"]


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("t = Sigmoid(s)", "(Sigmoid) is not homogeneous"),
        ("t = Pad(s, pads, six)", "pads with something else than zero"),
        ("t = Min(s, six, zero)", "compares more than two values"),
        ("m = ReduceMax<keepdims=0>(x)  t = Clip(s, , m)", "bounds that are computed in the graph"),
        ('t = Resize<coordinate_transformation_mode="tf_crop_and_resize">(s, roi, f)', "fills in a constant"),
    ],
)
def test_what_is_not_homogeneous_is_refused_by_name(between: str, reason: str) -> None:
    constants: dict[str, Any] = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "roi": np.ones(8, np.float32)}
    constants["f"] = np.array([1, 1, 2, 2], np.float32)
    _, links, refused, _ = linked(net(f"s = Conv(x, w)  {between}  y = Conv(t, v)", **constants))
    assert links == {}
    assert any(reason in why for why in refused.values()), refused


def test_a_depthwise_layer_joins_two_pairs_into_a_row_where_it_has_one_filter_a_channel() -> None:
    _, links, _, layers = linked(net("s = Conv(x, w)  t = Conv<group=4>(s, d)  y = Conv(t, v)"))
    assert [len(row) for row in chains(links, layers)] == [2]
    _, links, _, layers = linked(net("s = Conv(x, w)  t = Conv<group=4>(s, e)  y = Conv(t, u)"))
    assert [len(row) for row in chains(links, layers)] == [1, 1]


def test_bounds_are_what_a_node_cuts_off_and_infinite_ones_are_none() -> None:
    far, never = np.full((3, 1, 1), 9, np.float32), np.full((3, 1, 1), np.inf, np.float32)
    body = "a = Clip(x, below, six)  b = Neg(a)  c = Min(b, far)  d = Neg(c)  y = Max(d, never)"
    model = net(body, far=far, never=-never)
    found = [bounds(node) for node in model.graph if node.op_type != "Neg"]
    assert (float(found[0][0]), float(found[0][1])) == (-1, 6)  # type: ignore[arg-type]  # both are there
    assert found[1][0] is None
    np.testing.assert_array_equal(found[1][1], far)
    assert found[2] == (None, None)


@pytest.mark.parametrize(
    ("clip", "unused", "ops"),
    [
        ("Clip(s, zero, six)", False, ["Relu", "Min"]),
        ("Clip(s, zero, six)", True, ["Relu"]),
        ("Clip(s, below, six)", False, ["Max", "Min"]),
        ("Min(s, six)", False, ["Min"]),
    ],
)
def test_bounds_by_channel_cut_off_what_they_did(clip: str, unused: bool, ops: list[str]) -> None:
    six = np.full((4, 1, 1), 6, np.float32) if clip.startswith("Min") else np.float32(6)
    model = net(f"s = Conv(x, w)  t = {clip}  y = Conv(t, v)", six=six)
    editor, links, _, _ = linked(model)
    (link,) = links.values()
    scale = np.array([1.0, 2.0, 0.5, 4.0])
    (step,) = link.way.steps
    np.testing.assert_array_equal(along(step, scale), scale.reshape(4, 1, 1))
    rescale_bounds(editor, step, scale, unused)
    editor.set_param("w", model.param("w") / scale.reshape(4, 1, 1, 1))
    editor.set_param("v", model.param("v") * scale.reshape(1, 4, 1, 1))
    rescaled = editor.model()
    assert [op for op in op_types(rescaled) if op != "Conv"] == ops
    x = {"x": normal(2, 3, 6, 6) * (0.1 if unused else 9)}
    before, after = (each.session(quantized=False).run(None, x)[0] for each in (model, rescaled))
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)


def test_one_scale_for_all_channels_leaves_a_clip_a_clip() -> None:
    editor, links, _, _ = linked(net("s = Conv(x, w)  t = Clip(s, zero, six)  y = Conv(t, v)"))
    (link,) = links.values()
    rescale_bounds(editor, link.way.steps[0], np.full(4, 2.0), False)
    rescaled = editor.model()
    assert op_types(rescaled) == ["Conv", "Clip", "Conv"]
    assert float(bounds(rescaled.graph[1])[1]) == 3.0  # type: ignore[arg-type]  # it is there
