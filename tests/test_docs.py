"""The code in README and docs/ runs as printed; links lead to files that are there."""

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgepass

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[2] input) => (float[2] y) <float two = {2.0}> { a = Div(input, two)  y = Relu(a) }
"""


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_first_example_of_the_readme(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="the example prices a torch module")
    monkeypatch.chdir(tmp_path)
    ir.save(ir.from_onnx_text(TEXT), "model.onnx")
    Path("mymodels.py").write_text(
        "import torch\n\n\n"
        "def build_net():\n    return torch.nn.Linear(2, 2), (torch.ones(1, 2),)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    x = np.ones(2, np.float32)
    exec(blocks("README.md")[0], {"samples": [{"input": x}], "x": x})
    assert Path("out/manifest.json").is_file()


@pytest.mark.parametrize(
    ("page", "index", "name"),
    [
        ("README.md", 1, "ReluToClip"),
        ("docs/passes.md", 0, "DropTraining"),
        ("docs/passes.md", 1, "DivToMul"),
    ],
)
def test_passes_and_rules_of_the_docs(page, index, name):
    code = blocks(page)[index]
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    namespace: dict = {"__name__": "documented"}
    exec(code, namespace)
    compiled = edgepass.compile(
        ir.from_onnx_text(TEXT), "x86_64", passes=[namespace[name]()], time_budget_s=0
    )
    ops = [node.op_type for node in compiled.model.graph]
    expected = {"ReluToClip": ["Div", "Clip"], "DropTraining": ["Div", "Relu"]}
    assert ops == expected.get(name, ["Mul", "Relu"])


def test_the_board_of_the_docs():
    namespace = {"model": ir.from_onnx_text(TEXT)}
    exec(blocks("docs/targets.md")[0], namespace)
    assert edgepass.get_target("my-board").hardware.cores == 2


def test_the_estimate_of_the_docs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ir.save(ir.from_onnx_text(TEXT), "model.onnx")
    exec(blocks("docs/cost.md")[0], {"edgepass": edgepass})
    assert "calibrated" in capsys.readouterr().out


def test_the_evaluation_of_the_docs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = TEXT.replace("float[2] input", "float[N, 2] x").replace("float[2] y", "float[N, 2] y")
    model = ir.from_onnx_text(text.replace("input", "x"))
    ir.save(model, "model.onnx")
    test = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    compiled = edgepass.compile(model, time_budget_s=0)
    names = {"test": test, "labels": test.argmax(1), "compiled": compiled}
    exec(blocks("docs/evaluation.md")[0], names)
    assert names["report"].verdict("int8") == "within"
    assert "accuracy change: +0.0000" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link
