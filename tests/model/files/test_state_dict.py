"""Weights from files: what is read, what is never run, and what does not fit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qpipe.errors import InputError
from qpipe.model.files.state_dict import fill, read_weights, shortened


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)
        self.head = nn.Linear(4, 3, bias=False)
        self.head.weight = self.table.weight
        self.norm = nn.BatchNorm1d(3)


def state() -> dict[str, torch.Tensor]:
    return {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in Tied().state_dict().items()}


@pytest.mark.parametrize("wrap", ["", "state_dict", "model_state_dict", "model"])
def test_a_state_dict_is_found_where_it_usually_lies(tmp_path: Path, wrap: str) -> None:
    wanted = state()
    torch.save({wrap: wanted, "epoch": 3} if wrap else wanted, tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors")["a"].tolist() == [1, 1]


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_file_of_weights_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": Bomb(tmp_path / "ran")}, tmp_path / "w.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), 2))
    for name in ("w.pt", "plain.pt"):
        with pytest.raises(InputError, match="cannot be read"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_what_holds_no_tensors_by_name_is_refused(tmp_path: Path) -> None:
    torch.save({"a": 3}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="holds no state dict"):
        read_weights(tmp_path / "w.pt")
    with pytest.raises(InputError, match="There is no file of weights"):
        read_weights(tmp_path / "none.pt")


@pytest.mark.parametrize("change", [lambda w: w, lambda w: {f"module.{n}": t for n, t in w.items()}])
def test_weights_are_loaded_with_and_without_the_prefix_of_dataparallel(change: Any) -> None:
    module, weights = Tied(), state()
    weights["head.weight"] = weights["table.weight"]
    fill(module, change(weights), "w.pt")
    assert torch.equal(module.table.weight, weights["table.weight"])


def test_a_tied_parameter_under_one_of_its_names_is_enough() -> None:
    module, weights = Tied(), state()
    del weights["head.weight"], weights["norm.num_batches_tracked"]
    fill(module, weights, "w.pt")
    assert torch.equal(module.head.weight, weights["table.weight"])


def test_all_that_does_not_fit_is_one_sentence() -> None:
    weights = {**state(), "table.weight": torch.ones(5, 4), "other": torch.ones(1)}
    del weights["norm.bias"], weights["head.weight"]
    message = (
        r"^The weights w\.pt do not fit Tied: of another shape: table\.weight \(5, 4\) instead of \(3, 4\); "
        r"missing: norm\.bias; unexpected: other\.$"
    )
    with pytest.raises(InputError, match=message):
        fill(Tied(), weights, "w.pt")


def test_a_long_list_of_names_ends_with_how_many_more() -> None:
    assert shortened(["a", "b", "c"], 2) == "a, b and 1 more"
    assert shortened(["a", "b"], 2) == "a, b"
