"""The built-in data come out the same everywhere; the built-in network is what its docstring says."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from qpipe.demo import MODEL_PATH, data

FLOAT_ACCURACY = 98.6  # percent on the evaluation split; qpipe/demo/train.py printed it


@pytest.fixture(scope="module")
def splits() -> dict[str, dict[str, np.ndarray]]:
    return {name: data.load(name) for name in ("calibration", "evaluation")}


@pytest.fixture(scope="module")
def graph() -> onnx.GraphProto:
    return onnx.load(MODEL_PATH).graph


def test_the_drawn_bytes_are_the_golden_ones() -> None:
    codes, labels = data.draw(seed=3, start=0, count=16)
    assert labels.tolist() == [0, 2, 8, 5, 0, 4, 4, 1, 7, 1, 3, 5, 4, 5, 7, 9]
    assert hashlib.sha256(codes.tobytes()).hexdigest() == (
        "7e3cd4ce2b57e3e4594569d149dbb6258ccc1a403ae3b8ac7b2c064805bc7986"
    )


def test_an_image_is_whole_numbers_of_one_255th(splits: dict[str, dict[str, np.ndarray]]) -> None:
    for arrays in splits.values():
        image = arrays["image"]
        assert image.dtype == np.float32
        assert image.min() >= 0.0
        assert image.max() <= 1.0
        codes = np.rint(image[:100] * 255)
        assert np.array_equal(codes.astype(np.float32) / np.float32(255), image[:100])


@pytest.mark.parametrize(("split", "count"), [("calibration", 1000), ("evaluation", 2000)])
def test_a_split_holds_every_class_about_equally_often(
    splits: dict[str, dict[str, np.ndarray]], split: str, count: int
) -> None:
    arrays = splits[split]
    assert arrays["image"].shape == (count, 3, 32, 32)
    assert arrays["labels"].dtype == np.int64
    assert np.bincount(arrays["labels"], minlength=10).min() >= 0.07 * count


def test_a_split_is_the_same_when_drawn_again(splits: dict[str, dict[str, np.ndarray]]) -> None:
    again = data.load("calibration")
    assert np.array_equal(again["image"], splits["calibration"]["image"])
    assert np.array_equal(again["labels"], splits["calibration"]["labels"])


def test_the_splits_share_no_image(splits: dict[str, dict[str, np.ndarray]]) -> None:
    everything = [*splits.values(), data.load("training")]
    digests = [hashlib.sha256(image.tobytes()).digest() for arrays in everything for image in arrays["image"]]
    assert len(set(digests)) == len(digests) == 19000


def test_an_unknown_split_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"no split 'test'\. Splits: training, calibration, evaluation"):
        data.load("test")


def test_the_data_need_numpy_alone() -> None:
    program = "import sys, qpipe.demo.data; print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_file_is_small_and_names_no_path() -> None:
    content = MODEL_PATH.read_bytes()
    assert len(content) < 2_000_000
    assert b"stack_trace" not in content
    assert b".py" not in content


def test_the_network_keeps_batchnorm_depthwise_convolutions_and_relu6(graph: onnx.GraphProto) -> None:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    depthwise = [
        node
        for node in graph.node
        if node.op_type == "Conv"
        and any(a.name == "group" and a.i == len(constants[node.input[1]]) > 1 for a in node.attribute)
    ]
    clips = [node for node in graph.node if node.op_type == "Clip"]
    bounds = {tuple(float(constants[name]) for name in node.input[1:]) for node in clips}
    assert len(depthwise) == 9
    assert sum(node.op_type == "BatchNormalization" for node in graph.node) == 28
    assert len(clips) == 19
    assert bounds == {(0.0, 6.0)}
    assert [graph.input[0].name, graph.output[0].name] == ["image", "logits"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def accuracy(model: onnx.ModelProto, arrays: dict[str, np.ndarray]) -> float:
    """Percent of `arrays` that the model names rightly, in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(None, {"image": arrays["image"]})
    return 100 * float(np.mean(logits.argmax(1) == arrays["labels"]))


def rounded(per_channel: bool) -> onnx.ModelProto:
    """The network with the convolutions' weights, as they are once BatchNorm is folded, rounded to 8 bits."""
    model = onnx.load(MODEL_PATH)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    params = {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items()}
    for name in [name for name in params if name.endswith(".0.weight")]:
        norm = name.removesuffix("0.weight") + "1."
        factor = (params[norm + "weight"] / np.sqrt(params[norm + "running_var"] + 1e-5)).reshape(-1, 1, 1, 1)
        folded = params[name] * factor
        scale = np.abs(folded).max(axis=(1, 2, 3) if per_channel else None, keepdims=True) / 127
        weight = np.rint(folded / scale) * scale / factor
        tensors[name].CopyFrom(numpy_helper.from_array(weight.astype(np.float32), name))
    return model


def test_float_accuracy_is_the_recorded_one(splits: dict[str, dict[str, np.ndarray]]) -> None:
    assert accuracy(onnx.load(MODEL_PATH), splits["evaluation"]) == pytest.approx(FLOAT_ACCURACY, abs=0.2)


def test_eight_bits_per_tensor_cost_20_points_and_per_channel_less_than_one(
    splits: dict[str, dict[str, np.ndarray]],
) -> None:
    assert accuracy(rounded(per_channel=False), splits["evaluation"]) < FLOAT_ACCURACY - 20
    assert accuracy(rounded(per_channel=True), splits["evaluation"]) > FLOAT_ACCURACY - 1
