"""torch modules: every parameter keeps its name and value, and the model computes what the module does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qpipe.errors import InputError
from qpipe.methods.comparison.compare import relative_error
from qpipe.model import Model
from qpipe.model.files.onnx_writer import torch_weights
from tests.model.nets import Mobile, Oddities, UNet, op_types, randomized

TOLERANCE = 2e-6
"""torch and onnxruntime sum in different orders."""


def checked(module: nn.Module, example: dict[str, torch.Tensor]) -> Model:
    """The imported model, after a comparison at another batch size."""
    module.train()
    model = Model.from_torch(module, example)
    assert module.training
    module.eval()
    larger = {name: torch.cat([value, value, value.flip(0)]) for name, value in example.items()}
    with torch.no_grad():
        result = module(**larger)
    wanted = result if isinstance(result, torch.Tensor) else result[0]
    found = model.session().run(None, {name: value.numpy() for name, value in larger.items()})[0]
    assert relative_error(wanted.numpy(), found) < TOLERANCE
    with torch.no_grad():
        replayed = model.to_torch(quantized=False)(*(larger[spec.name] for spec in model.inputs))
    assert relative_error(wanted.numpy(), replayed.numpy()) < TOLERANCE
    return model


def assert_parameters_kept(module: nn.Module, model: Model) -> None:
    weights = torch_weights(model)
    for name, value in module.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert np.array_equal(weights[name], value.numpy()), name


@pytest.fixture(scope="module")
def mobile() -> tuple[nn.Module, Model]:
    module = randomized(Mobile())
    return module, checked(module, {"x": torch.randn(1, 3, 32, 32)})


def test_a_mobilenet_keeps_its_batch_norms_and_names(mobile: tuple[nn.Module, Model]) -> None:
    module, model = mobile
    assert_parameters_kept(module, model)
    assert op_types(model).count("BatchNormalization") == 7
    assert model.inputs[0].name == "x"
    assert model.inputs[0].shape == ("batch", 3, 32, 32)
    assert model.outputs[0].name == "output"
    assert not model.metadata
    names = [node.name for node in model.graph]
    assert names[:3] == ["features.0", "features.1", "features.2"]
    assert "features.3.conv.3" in names
    assert "features.3.Add" in names
    assert [layer.name for layer in model.layers()][-1] == "classifier.1"
    depthwise = next(layer for layer in model.layers() if layer.name == "features.3.conv.3")
    assert depthwise.depthwise
    assert model.param("features.2.max") == 6


def test_nothing_of_the_machine_is_in_the_bytes(mobile: tuple[nn.Module, Model]) -> None:
    graph = bytes(mobile[1].pack()[1]["graph"])
    for trace in (b"stack_trace", b".py", b"site-packages", b"pytorch", b"fx_node"):
        assert trace not in graph


def test_the_module_may_go_on_training(mobile: tuple[nn.Module, Model]) -> None:
    module, model = mobile
    before = model.param("features.0.weight").copy()
    with torch.no_grad():
        module.get_parameter("features.0.weight").add_(1)
    assert np.array_equal(model.param("features.0.weight"), before)
    with torch.no_grad():
        module.get_parameter("features.0.weight").sub_(1)


def test_a_unet() -> None:
    module = randomized(UNet())
    model = checked(module, {"x": torch.randn(2, 3, 16, 16)})
    assert_parameters_kept(module, model)
    layers = {layer.name: layer for layer in model.layers()}
    assert layers["up"].op_type == "ConvTranspose"
    assert layers["merge.0"].activation == ("merge.1.Sigmoid", "merge.1.Mul")
    assert layers["down.0"].activation == ("down.1",)


def test_oddities() -> None:
    module = randomized(Oddities())
    conv: Any = module.get_submodule("conv")
    model = checked(module, {"x": torch.randn(2, 4, 9), "ids": torch.randint(0, 5, (2, 7))})
    weights = torch_weights(model)
    assert np.allclose(weights["conv.weight"], conv.weight.detach().numpy(), atol=1e-7)
    assert "'conv.weight' is what the model computes from" in model.metadata["notes"][0]
    assert set(model.facts.tied.items()) & {
        ("table.weight", "head.weight"),
        ("head.weight", "table.weight"),
    }
    assert np.array_equal(weights["table.weight"], weights["head.weight"])
    assert model.param("slope.weight").shape == (1, 8, 1)
    assert weights["slope.weight"].shape == (8,)
    for name in ("first.weight", "first.bias", "second.weight", "second.bias"):  # all equal, none merged
        assert name in model.params
    assert op_types(model).count("PRelu") == 1


def test_a_vision_transformer_has_no_detours_around_attention() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    )
    module = transformers.ViTForImageClassification(config).eval()
    model = checked(module, {"pixel_values": torch.randn(1, 3, 16, 16)})
    assert_parameters_kept(module, model)
    kinds = op_types(model)
    assert kinds.count("Softmax") == 2
    assert kinds.count("Gelu") == 2
    assert kinds.count("LayerNormalization") == 5
    assert not {"IsNaN", "Where", "Identity", "Dropout", "Constant"} & set(kinds)
    assert len(model.layers()) == 1 + 2 * 6 + 1
    linear = next(layer for layer in model.layers() if layer.op_type == "MatMul")
    assert linear.bias is not None
    assert linear.add is not None


@pytest.mark.slow
def test_a_bert_with_a_mask_that_is_an_input() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50
    )
    module = transformers.BertForSequenceClassification(config).eval()
    example = {
        "input_ids": torch.randint(0, 50, (2, 12)),
        "attention_mask": torch.ones(2, 12, dtype=torch.int64),
    }
    example["attention_mask"][0, 9:] = 0
    model = checked(module, example)
    assert_parameters_kept(module, model)
    assert len(model.layers()) == 2 * 6 + 2


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y.view(4, 3)


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Eigenvalues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.linalg.eigvals(x).real
        return y


def test_a_module_that_refuses_an_open_batch_gets_a_fixed_one_and_a_note() -> None:
    model = Model.from_torch(Fixed(), torch.randn(4, 3))
    assert model.inputs[0].shape == (4, 3)
    assert "batch size is fixed to 4" in model.metadata["notes"][0]


def test_what_torch_cannot_export_is_told_with_the_place() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential(Branch()))
    with pytest.raises(
        InputError, match=r"^Sequential decides by the values of a tensor in its part '1\.0' at `return x if"
    ):
        Model.from_torch(module, torch.randn(2, 3))
    with pytest.raises(InputError, match="linalg_eig"):
        Model.from_torch(Eigenvalues(), torch.randn(2, 3, 3))


def test_half_precision_becomes_float32() -> None:
    module = nn.Linear(3, 3).half()
    model = Model.from_torch(module, torch.randn(2, 3).half())
    assert model.inputs[0].dtype == "float32"
    assert "float16" in model.metadata["notes"][0]
    assert np.array_equal(model.param("weight"), module.weight.detach().float().numpy())


def test_names_and_dynamic_dimensions_can_be_given() -> None:
    length = torch.export.Dim("length")
    arguments: dict[str, Any] = {"dynamic_shapes": ({1: length},), "input_names": ["signal"]}
    model = Model.from_torch(nn.Conv1d(2, 3, 3), np.zeros((1, 2, 9), np.float32)[0], **arguments)
    assert model.inputs[0].name == "signal"
    assert model.inputs[0].shape == (2, "length")
    with pytest.raises(InputError, match=r"need 1 different names, got \['a', 'b'\]"):
        Model.from_torch(nn.ReLU(), torch.randn(2, 3), input_names=["a", "b"])
