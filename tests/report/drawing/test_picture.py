from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qpipe.report.drawing.picture import colours, draw_graph, svg_graph
from tests.report.conftest import EDGES, ORDER

SVG = "{http://www.w3.org/2000/svg}"
NODES = {name: {"stage": stage, "verdict": verdict, "label": ""} for name, stage, verdict in ORDER}


def test_the_svg_holds_every_node_with_its_verdict_colour() -> None:
    root = ElementTree.fromstring(svg_graph(NODES, EDGES))
    drawn = {group[2].text: group[1].attrib["fill"] for group in root.iter(f"{SVG}g")}
    assert drawn == {name: colours(node["verdict"])[0] for name, node in NODES.items()}


def test_what_first_within_may_not_ask_for_is_dashed() -> None:
    root = ElementTree.fromstring(svg_graph(NODES, EDGES))
    dashed = [path for path in root.iter(f"{SVG}path") if "stroke-dasharray" in path.attrib]
    assert len(dashed) >= 4
    plain = ElementTree.fromstring(svg_graph(NODES | {"choice": {"stage": "best"}}, EDGES))
    assert not [path for path in plain.iter(f"{SVG}path") if "stroke-dasharray" in path.attrib]


def test_hostile_names_stay_text() -> None:
    name = '</text><script>alert("x")</script>\x00\x1b'
    root = ElementTree.fromstring(svg_graph({name: {"stage": "<b>", "verdict": '"><i>'}}, []))
    assert {element.tag for element in root.iter()} == {
        f"{SVG}{tag}" for tag in ("svg", "g", "title", "rect", "text")
    }


@pytest.mark.parametrize(("suffix", "magic"), [(".svg", b"<svg"), (".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_each_format_is_written(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"graph{suffix}"
    draw_graph(NODES, EDGES, path)
    assert path.read_bytes().startswith(magic)


def test_the_png_shows_each_verdict_colour(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    draw_graph(NODES, EDGES, tmp_path / "graph.png")
    pixels = (image.imread(tmp_path / "graph.png")[..., :3] * 255).round().astype(int).reshape(-1, 3)
    found = {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in pixels[::7].tolist()}
    assert {colours(verdict)[0] for _, _, verdict in ORDER} <= found


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="docx"):
        draw_graph(NODES, EDGES, tmp_path / "graph.docx")


def test_a_chain_of_a_thousand_with_shared_data_is_quick() -> None:
    nodes = {f"n{i}": {"stage": "cle", "verdict": "run"} for i in range(1000)} | {
        "data": {"stage": "load_data"}
    }
    edges = [(f"n{i}", f"n{i + 1}", "model") for i in range(999)] + [
        ("data", f"n{i}", "data") for i in range(1000)
    ]
    began = time.perf_counter()
    assert svg_graph(nodes, edges).count("<rect") == 1001
    assert time.perf_counter() - began < 10


def test_an_svg_needs_no_matplotlib(tmp_path: Path) -> None:
    code = f"""
import sys
from qpipe.report.drawing.picture import draw_graph
draw_graph({{"a": {{"stage": "cle"}}}}, [], {str(tmp_path / "a.svg")!r})
print("matplotlib" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "False\n"
