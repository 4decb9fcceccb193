"""Modules that people have: each is taken, or one line says what is wrong, where, and what to do."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxscript
import pytest
import torch
from torch import Tensor, nn

from qpipe.errors import InputError
from qpipe.model import Model
from qpipe.model.torch_export.fidelity import check as held

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Part(nn.Module):
    """A function as a module inside another one."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def inside(function: Callable[[nn.Module, Tensor], Any], **attributes: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(Part(function, **attributes)))


@dataclasses.dataclass
class Result:
    logits: Tensor


def until_small(_: nn.Module, x: Tensor) -> Tensor:
    while x.abs().max() > 0.1:
        x = x / 2
    return x


def refusing(_: nn.Module, x: Tensor) -> Tensor:
    raise ValueError("pixels must be bytes")


def refused(module: nn.Module, example: Any = X) -> str:
    with pytest.raises(InputError) as caught:
        Model.from_torch(module, example)
    return str(caught.value)


REFUSED: dict[str, tuple[nn.Module, Any, list[str]]] = {
    "values decide": (
        inside(until_small), X,
        ["Sequential decides by the values of a tensor in its part '1.0' at `while x.abs().max() > 0.1",
         "Use torch.where or torch.cond", "(torch says "]
    ),
    "no operator": (
        inside(lambda _, x: torch.linalg.svd(x)[1]), X,
        ["ONNX has no operator for linalg_svd, which Sequential calls in its part '1.0' at `return self.function",
         "Replace it by others"]
    ),
    "too many inputs": (
        nn.Linear(4, 4), (X, X), ["does not run on its example", "forward takes input", "has float32 (2, 4), float32"]
    ),
    "another name": (nn.Linear(4, 4), {"y": X}, ["unexpected keyword argument 'y'", "the example has y: float32"]),
    "another shape": (inside(lambda s, x: s.linear(x), linear=nn.Linear(5, 3)), X,
                      ["cannot be multiplied (2x4 and 5x3) in its part '1.0.linear'"]),
    "another type": (nn.Embedding(10, 4), X, ["Embedding does not run", "Long, Int"]),
    "its own error": (inside(refusing), X, ["ValueError: pixels must be bytes in its part '1.0' at `raise ValueError"]),
    "a dataclass": (inside(lambda _, x: Result(x)), X, ["returns an object of Result", "tuple, list or dict"]),
    "a number": (inside(lambda _, x: (x, 3)), X, ["returns an object of int"]),
    "nothing": (inside(lambda _, x: None), X, ["Sequential returns no tensor"]),
    "scripted": (torch.jit.script(nn.Linear(4, 4)), X, ["is a ScriptModule. Give the nn.Module"]),  # type: ignore[no-untyped-call]
    "without data": (nn.Linear(4, 4, device="meta"), X, ["2 tensors without data (device meta), such as 'weight'"]),
    "always dropout": (inside(lambda _, x: nn.functional.dropout(x)), X, ["it is in training mode"]),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_one_line_names_the_part_and_the_way_out(what: str) -> None:
    module, example, said = REFUSED[what]
    message = refused(module, example)
    for words in said:
        assert words in message
    assert what not in ("values decide", "no operator") or message.startswith(said[0])
    assert "No ONNX function found" not in message
    assert "IndexError" not in message


def in_place(_: nn.Module, x: Tensor) -> Tensor:
    return x.mul_(2)


def counting(module: Any, x: Tensor) -> Tensor:
    module.seen += 1
    return x + module.table


class Doubling(nn.Module):
    """It writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x.mul_(2)
        return {"logits": self.linear(x), "hidden": (x + 1,), "loss": None}


class Modal(nn.Module):
    """One of its inputs is a word."""

    def forward(self, x: Tensor, mode: str) -> Tensor:
        return x + 1 if mode == "up" else x - 1


class AnyNumber(nn.Module):
    """As many inputs as are given."""

    def forward(self, *tensors: Tensor) -> Tensor:
        return sum(tensors, torch.zeros(()))


class Containers(nn.Module):
    """Its inputs lie in a list and in a dict."""

    def forward(self, pair: list[Tensor], more: dict[str, Tensor]) -> dict[str, Any]:
        return {"sum": pair[0] + 2 * pair[1], "more": (more["a"] * 2, None)}


TAKEN: dict[str, tuple[nn.Module, Any]] = {
    "any number of inputs": (AnyNumber(), (X, 2 * X, 3 * X)),
    "inputs in containers": (Containers(), ([X, 2 * X], {"a": 3 * X})),
    "one sample": (inside(lambda _, x: x), X[:1]),
    "in place": (Doubling(), X),
    "in place inside": (inside(in_place), X),
    "side effects": (inside(counting, seen=0, table=torch.ones(4)), X),
    "a number of a value": (inside(lambda _, x: x * x.max().item()), X),
    "training mode": (inside(lambda s, x: x * 2 if s.training else x * 3).train(), X),
    "float16": (inside(lambda _, x: x).half(), X.half()),
    "bfloat16": (inside(lambda _, x: x).bfloat16(), X.bfloat16()),
    "float64": (inside(lambda _, x: x).double(), X.double()),
    "a word": (Modal(), (X, "up")),
    "wrapped": (nn.DataParallel(inside(lambda _, x: x)), X),
}


@pytest.mark.parametrize("what", TAKEN)
def test_what_can_be_taken_is_and_computes_the_same(what: str) -> None:
    module, example = TAKEN[what]
    before = [v.clone() for v in torch.utils._pytree.tree_leaves(example) if isinstance(v, Tensor)]
    model = Model.from_torch(module, example)
    error = held(module, example, model, deployed=True)
    assert error is not None
    assert error < 1e-5
    after = [v for v in torch.utils._pytree.tree_leaves(example) if isinstance(v, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert {entry.shape[0] for entry in model.inputs} == {"batch"}


def test_a_compiled_module_is_the_module_that_was_compiled() -> None:
    module = inside(lambda _, x: x)
    compiled = Model.from_torch(torch.compile(module), X)  # type: ignore[arg-type]
    assert compiled.pack()[1] == Model.from_torch(module, X).pack()[1]


def test_a_module_that_torch_quantized_is_refused() -> None:
    quantized = nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(4, 4))  # type: ignore[no-untyped-call]
    assert "is quantized by torch already, in its part '0'" in refused(quantized)


@pytest.mark.parametrize("folder", ["qpipe", "my qpipe models", "torch", "site-packages"])
def test_the_line_at_fault_is_told_wherever_its_file_lies(tmp_path: Path, folder: str) -> None:
    file = tmp_path / folder / "zq_nets.py"
    file.parent.mkdir()
    file.write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        while x.abs().max() > 0.1:\n"
        "            x = x / 2\n"
        "        return x\n"
    )
    namespace = runpy.run_path(str(file))
    assert "at `while x.abs().max() > 0.1" in refused(namespace["Net"](), X)


def test_an_onnxscript_that_does_not_go_with_torch_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*_: Any, **__: Any) -> None:
        try:
            import onnxscript.of_another_time  # type: ignore[import-not-found]  # noqa: F401
        except ImportError as error:
            raise RuntimeError("Failed to decompose") from error

    monkeypatch.setattr(torch.onnx, "export", export)
    message = refused(nn.Linear(4, 4))
    assert f"the installed onnxscript {onnxscript.__version__} lacks onnxscript.of_another_time" in message
    assert "pip install --upgrade onnxscript" in message
