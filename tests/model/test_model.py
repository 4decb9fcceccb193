"""Model: immutable, edited by copy, taken apart and put together without loss."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest

from qpipe.errors import InputError
from qpipe.model import Model, ValueSpec
from qpipe.numerics.grid import Encoding
from tests.model.nets import normal, op_types, parsed

TEXT = """net (float[N,3,8,8] x) => (float[N,8,8,8] y) {
    c = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(c)  y = Mul(r, two) }"""


@pytest.fixture
def model() -> Model:
    return Model.from_proto(parsed(TEXT, w=normal(8, 3, 3, 3), b=normal(8), two=np.float32(2)))


def grid(scale: float) -> Encoding:
    return Encoding(8, True, False, np.array(scale, np.float32), np.array(3, np.int32))


def test_inputs_and_outputs_say_their_types_and_dynamic_dimensions(model: Model) -> None:
    assert model.inputs == (ValueSpec("x", "float32", ("N", 3, 8, 8)),)
    assert model.outputs == (ValueSpec("y", "float32", ("N", 8, 8, 8)),)


def test_parameters_are_read_only(model: Model) -> None:
    assert set(model.params) == {"w", "b", "two"}
    with pytest.raises(ValueError, match="read-only"):
        model.param("w")[0] = 0
    with pytest.raises(KeyError, match="no parameter 'v'"):
        model.param("v")


def test_an_edit_leaves_the_model_as_it_was_and_shares_what_it_did_not_touch(model: Model) -> None:
    before = model.pack()[1]
    editor = model.edit()
    array = np.zeros((8, 3, 3, 3))
    editor.set_param("w", array)
    editor.node("c").name = "renamed"
    changed = editor.model()
    array += 1
    assert not changed.param("w").any()
    assert changed.graph.node("renamed").op_type == "Conv"
    assert model.pack()[1] == before
    assert changed.ir.graph.initializers["b"].const_value is model.ir.graph.initializers["b"].const_value


def test_an_editor_goes_on_after_it_gave_a_model(model: Model) -> None:
    editor = model.edit()
    first = editor.model()
    editor.set_param("b", np.zeros(8))
    assert first.param("b").any()
    assert not editor.model().param("b").any()


def test_an_edit_that_breaks_the_graph_is_refused(model: Model) -> None:
    editor = model.edit()
    editor.node("r").replace_input_with(0, ir.Value(name="nowhere"))
    with pytest.raises(ValueError, match="'r' reads 'nowhere', which nothing produces"):
        editor.model()


def test_what_an_edit_leaves_behind_goes_with_its_encodings(model: Model) -> None:
    quantized = model.with_encodings({"w": grid(0.1), "c": grid(0.2), "r": grid(0.3)})
    editor = quantized.edit()
    editor.value("r").replace_all_uses_with(editor.value("x"))
    edited = editor.model()
    assert op_types(edited) == ["Mul"]
    assert set(edited.params) == {"two"}
    assert not edited.encodings


def test_new_nodes_get_names_places_and_shapes(model: Model) -> None:
    editor = model.edit()
    bound = editor.add_param("two", np.float32(1))
    clip = ir.node("Min", [editor.value("r"), bound])
    editor.graph.append(clip)  # after its reader: order is the editor's business
    editor.node("y").replace_input_with(0, clip.outputs[0])
    edited = editor.model()
    assert op_types(edited) == ["Conv", "Relu", "Min", "Mul"]
    names = [value.name for node in edited.graph for value in node.outputs]
    assert all(names)
    assert len(set(names)) == 4
    assert bound.name == "two_1"
    assert str(clip.outputs[0].shape) == "[N,8,8,8]"


def test_encodings_must_name_values(model: Model) -> None:
    with pytest.raises(ValueError, match="no value named 'q'"):
        model.with_encodings({"q": grid(1)})
    editor = model.edit()
    editor.encodings["q"] = grid(1)
    with pytest.raises(ValueError, match="'q'"):
        editor.model()


def test_metadata_is_copied_and_must_be_json(model: Model) -> None:
    entries = {"list": [1, 2]}
    told = model.with_metadata(entries)
    entries["list"].append(3)
    assert told.metadata["list"] == [1, 2]
    with pytest.raises(TypeError):
        model.with_metadata({"array": np.zeros(2)})


def test_the_python_package_offers_its_names_lazily() -> None:
    import qpipe.model

    assert qpipe.model.Model is Model
    with pytest.raises(AttributeError, match="Nothing"):
        qpipe.model.Nothing  # noqa: B018


def test_input_errors_pass_through_load(tmp_path: object) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Model.load(f"{tmp_path}/none.onnx")


def test_the_face_loads_what_a_method_needs_when_it_is_called() -> None:
    program = "import sys, qpipe.model.model; assert not {'torch', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
