"""A generated decoder of any size, as one ONNX file with external data: what a run over a large model takes.

    python benchmarks/large_decoder.py FOLDER [--gigabytes 4] [--width 2048]

writes FOLDER/decoder.onnx (and its data), calibration.npz and evaluation.npz. Blocks as Llama has them (RMSNorm,
attention without positions, gated MLP), float32, random but seeded; tensors are written one after another,
so that making the file takes no memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper

HEADS, VOCABULARY, LENGTH = 16, 1024, 16


class Writer:
    """Initializers of a model, appended to one data file as they are made."""

    def __init__(self, data: BinaryIO, location: str) -> None:
        self.data, self.location = data, location
        self.tensors: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)

    def add(self, name: str, *shape: int, spread: float) -> str:
        """A random tensor under `name`."""
        array = self.rng.standard_normal(shape, np.float32) * np.float32(spread)
        offset = self.data.tell()
        self.data.write(array.tobytes())
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        return name

    def constant(self, name: str, array: np.ndarray) -> str:
        """A small tensor inside the file itself."""
        self.tensors.append(onnx.numpy_helper.from_array(array, name))
        return name


def hidden_width(width: int) -> int:
    """Of the MLP: 5632 behind 2048."""
    return width * 11 // 4


def block(writer: Writer, name: str, x: str, nodes: list[onnx.NodeProto], width: int) -> str:
    """The nodes of one block behind `x`; the name of its output."""
    hidden = hidden_width(width)

    def node(op: str, *inputs: str, **attributes: object) -> str:
        output = f"{name}/{op}_{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def linear(part: str, value: str, rows: int, columns: int) -> str:
        weight = writer.add(f"{name}.{part}.weight", rows, columns, spread=rows**-0.5)
        return node("MatMul", value, weight)

    def norm(value: str) -> str:
        square = node("ReduceMean", node("Mul", value, value), "last_axis")
        return node("Div", value, node("Sqrt", node("Add", square, "epsilon")))

    def heads(value: str) -> str:
        return node("Transpose", node("Reshape", value, "split_heads"), perm=[0, 2, 1, 3])

    normed = norm(x)
    q, k, v = (heads(linear(part, normed, width, width)) for part in ("q", "k", "v"))
    scores = node("Mul", node("MatMul", q, node("Transpose", k, perm=[0, 1, 3, 2])), "scale")
    mixed = node("MatMul", node("Softmax", scores, axis=-1), v)
    joined = node("Reshape", node("Transpose", mixed, perm=[0, 2, 1, 3]), "join_heads")
    x = node("Add", x, linear("o", joined, width, width))
    normed = norm(x)
    gate = linear("gate", normed, width, hidden)
    gated = node("Mul", node("Mul", gate, node("Sigmoid", gate)), linear("up", normed, width, hidden))
    return node("Add", x, linear("down", gated, hidden, width))


def write(folder: Path, gigabytes: float, width: int = 2048) -> Path:
    """The model's file; beside it the samples."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes: list[onnx.NodeProto] = []
    per_block = 4 * (4 * width * width + 3 * width * hidden_width(width))
    with open(folder / "decoder.onnx.data", "wb") as data:
        writer = Writer(data, "decoder.onnx.data")
        writer.constant("last_axis", np.array([-1]))
        writer.constant("epsilon", np.float32(1e-6))
        writer.constant("scale", np.float32((width // HEADS) ** -0.5))
        writer.constant("split_heads", np.array([0, 0, HEADS, width // HEADS]))
        writer.constant("join_heads", np.array([0, 0, width]))
        table = writer.add("embedding.weight", VOCABULARY, width, spread=1.0)
        nodes.append(helper.make_node("Gather", [table, "tokens"], ["embedded"], name="embedding"))
        x = "embedded"
        for i in range(max(round(gigabytes * 1e9 / per_block), 1)):
            x = block(writer, f"layers.{i}", x, nodes, width)
        head = writer.add("head.weight", width, VOCABULARY, spread=width**-0.5)
        nodes.append(helper.make_node("MatMul", [x, head], ["logits"], name="head"))
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", LENGTH])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", LENGTH, VOCABULARY])],
        writer.tensors,
    )
    path = folder / "decoder.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    rng = np.random.default_rng(1)
    for name, count in (("calibration", 8), ("evaluation", 8)):
        np.savez(folder / f"{name}.npz", tokens=rng.integers(0, VOCABULARY, (count, LENGTH)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--width", type=int, default=2048)
    arguments = parser.parse_args()
    path = write(arguments.folder, arguments.gigabytes, arguments.width)
    size = (arguments.folder / "decoder.onnx.data").stat().st_size
    print(f"{path}: {size / 1e9:.2f} GB of tensors")


if __name__ == "__main__":
    main()
