"""blocks(): module lists and articulation points give the same layers, and block after block computes the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from qpipe.model import Model
from qpipe.model.network.naming import SCOPE
from qpipe.model.structure.blocks import Block
from tests import architectures
from tests.model.nets import Mobile, normal, parsed
from tests.zoo import ZOO, built, samples

DECODER = ["model.model.layers.0", "model.model.layers.1"]
STAGES = [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)]
"""(stage, layer) of networks with depths 1, 1, 2, 1."""
LISTS = {
    "resnet": [f"model.resnet.encoder.stages.{s}.layers.0" for s in range(2)],
    "mobilenet_v2": [f"model.mobilenet_v2.layer.{i}" for i in range(16)],
    "convnext": [f"model.convnext.encoder.stages.{s}.layers.{i}" for s, i in STAGES],
    "regnet": [f"model.regnet.encoder.stages.{s}.layers.{i}" for s, i in STAGES],
    "swin": [f"model.swin.encoder.layers.{s}.blocks.{i}" for s in range(2) for i in range(2)],
    "vit": [f"model.vit.layers.{i}" for i in range(2)],
    "deit": [f"model.deit.layers.{i}" for i in range(2)],
    "bert": [f"model.bert.encoder.layer.{i}" for i in range(2)],
    "t5": [f"model.encoder.block.{i}" for i in range(2)],
    "whisper": [f"model.layers.{i}" for i in range(2)],
    **dict.fromkeys(["llama", "qwen2", "qwen3", "gemma", "gemma2"], DECODER),
}
"""By network: the blocks that its module lists name, all of them."""
ALONE = {
    "resnet": 2, "mobilenet_v2": 5, "convnext": 5, "regnet": 2, "swin": 3, "vit": 2, "deit": 2, "bert": 2, "t5": 0,
    "whisper": 2, "llama": 1, "qwen2": 1, "qwen3": 1, "gemma": 0, "gemma2": 0, "lstm": 3, "gru": 3, "audio": 3,
    "volume": 4,
}  # fmt: skip
"""By network: how many layers in front of them, between them and behind them are blocks of their own: stems,
downsampling, heads. What shares its weight with an embedding, as the heads of T5 and Gemma do, is no layer."""
QUICK = {"resnet", "bert", "llama", "audio"}
NETS = [net if net in QUICK else pytest.param(net, marks=pytest.mark.slow) for net in ZOO if net in ALONE]


Imported = Callable[[str], Model]


def assert_chain(model: Model, blocks: tuple[Block, ...]) -> None:
    """Contiguous, disjoint, in order, every layer in one."""
    position = {str(node.name): i for i, node in enumerate(model.graph)}
    for before, after in itertools.pairwise(blocks):
        assert before.output == after.input
    members = [name for block in blocks for name in block.nodes]
    assert len(members) == len(set(members))
    assert {layer.name for layer in model.layers()} <= set(members)
    for block in blocks:
        assert [position[name] for name in block.nodes] == sorted(position[name] for name in block.nodes)


@pytest.mark.parametrize("net", NETS)
def test_the_blocks_are_the_layers_that_the_module_lists_name(imported: Imported, net: str) -> None:
    model = imported(net)
    blocks = model.blocks()
    assert_chain(model, blocks)
    listed = LISTS.get(net, [])
    assert [block.name for block in blocks if block.name in listed] == listed
    assert len(blocks) == len(listed) + ALONE[net]
    for block in blocks:
        if block.name in listed:
            scopes = {str(node.name): f"{node.metadata_props.get(SCOPE)}." for node in model.graph}
            inside = {layer.name for layer in model.layers() if scopes[layer.name].startswith(f"{block.name}.")}
            assert inside
            assert inside <= set(block.nodes)


@pytest.mark.parametrize("net", NETS)
def test_without_names_the_articulation_points_give_the_same_blocks(imported: Imported, net: str) -> None:
    model = imported(net)
    editor = model.edit()
    for node in editor.graph:
        node.metadata_props.pop(SCOPE, None)
    nameless = editor.model().blocks()
    assert nameless == model.blocks(by_name=False)
    assert_chain(model, nameless)
    if net == "mobilenet_v2":  # a block without a residual falls into its layers
        wanted = {block.output for block in model.blocks()}
        assert wanted <= {block.output for block in nameless}
    else:
        assert [block.nodes for block in nameless] == [block.nodes for block in model.blocks()]
        assert [block.output for block in nameless] == [block.output for block in model.blocks()]


@pytest.mark.parametrize("net", NETS)
def test_block_after_block_computes_the_whole_model(imported: Imported, net: str) -> None:
    model = imported(net)
    _, example = built(net)
    fed = {model.inputs[0].name: samples(example, 3, seed=2).numpy()}
    assert_same_one_by_one(model, fed)


def assert_same_one_by_one(model: Model, fed: dict[str, np.ndarray]) -> None:
    """The blocks, each as a model of its own, fed with what the one in front gave and the model's side values."""
    blocks = model.blocks()
    given = sorted({blocks[0].input, *(name for block in blocks for name in block.side_inputs)} - set(fed))
    known = dict(zip(given, model.session(outputs=given).run(None, fed), strict=True)) if given else {}
    known |= fed
    current = known[blocks[0].input]
    for block in blocks:
        part = model.block([block.input, *block.side_inputs], [block.output])
        assert {str(node.name) for node in part.graph} == set(block.nodes)
        assert set(block.weights) <= set(part.params)
        side = {name: known[name] for name in block.side_inputs}
        (current,) = part.session().run(None, {block.input: current, **side})
    (wanted,) = model.session(outputs=[blocks[-1].output]).run(None, fed)
    # Cut elsewhere, other operators fuse, which changes the last bits alone.
    np.testing.assert_allclose(current, wanted, rtol=1e-4, atol=1e-5 * float(np.abs(wanted).max()))


def test_masks_and_positions_are_side_inputs() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    from tests.zoo import ENCODER

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertForSequenceClassification(BertConfig(vocab_size=100, **ENCODER))

        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.bert(input_ids=tokens, attention_mask=mask).logits
            return logits

    torch.manual_seed(0)
    tokens = torch.randint(0, 90, (2, 16))
    model = Model.from_torch(Masked().eval(), (tokens, torch.ones(2, 16, dtype=torch.int64)))
    blocks = model.blocks()
    assert_chain(model, blocks)
    assert [block.name for block in blocks][:2] == [f"bert.bert.encoder.layer.{i}" for i in range(2)]
    assert blocks[0].side_inputs
    assert blocks[0].side_inputs == blocks[1].side_inputs
    mask = np.ones((3, 16), np.int64)
    mask[:, 9:] = 0
    assert_same_one_by_one(model, {"tokens": tokens[:1].repeat(3, 1).numpy(), "mask": mask})


def test_what_a_skip_connection_spans_is_one_block() -> None:
    example = torch.randn(2, 3, 32, 32)
    model = Model.from_torch(architectures.built("unet"), (example,))
    blocks = model.blocks()
    assert_chain(model, blocks)
    assert [sum(layer.name in block.nodes for layer in model.layers()) for block in blocks][-1] == 1  # the head
    assert max(len(block.nodes) for block in blocks) > model.graph.num_nodes() / 2
    assert_same_one_by_one(model, {model.inputs[0].name: example.numpy()})


def test_a_list_of_unlike_children_is_divided_at_articulation_points() -> None:
    model = Model.from_torch(Mobile().eval(), (torch.randn(2, 3, 16, 16),))
    blocks = model.blocks()
    assert_chain(model, blocks)
    assert [block.nodes for block in blocks] == [block.nodes for block in model.blocks(by_name=False)]
    assert_same_one_by_one(model, {model.inputs[0].name: normal(2, 3, 16, 16)})


def test_side_branches_and_models_without_weights_have_no_block() -> None:
    text = """net (float[N,4] x) => (float[N,4] y, float[N,4] z) {
        a = MatMul(x, w)  b = Relu(a)  z = MatMul(b, v)  y = MatMul(b, u) }"""
    forked = Model.from_proto(parsed(text, w=normal(4, 4), v=normal(4, 4), u=normal(4, 4)))
    assert [block.nodes for block in forked.blocks()] == [("a", "b"), ("y",)]
    plain = Model.from_proto(parsed("net (float[N,4] x) => (float[N,4] y) { y = Relu(x) }"))
    assert plain.blocks() == ()
