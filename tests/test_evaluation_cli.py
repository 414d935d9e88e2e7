"""`edgepass evaluate`: metrics from a file, gates, exit codes, the report on disk."""

import json

import numpy as np
import onnx_ir as ir
import pytest

import edgepass
from edgepass.cli import main
from edgepass.errors import RegressionError

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[N, 2] x) => (float[N, 1] score) <float[2, 1] w = {%s}> { score = MatMul(x, w) }
"""
METRICS = """
from sklearn.metrics import roc_auc_score
import numpy as np

def auc(predictions, labels):
    return roc_auc_score(labels, predictions[:, 0])

def loud(feed, label, index):
    return float(np.abs(feed["x"]).mean())

def flipped(outputs):
    return -outputs["score"]

def samples():
    for i in range(20):
        yield np.array([i % 2, 0], np.float32), i % 2
"""
REGRESSION = RegressionError.exit_code


@pytest.fixture
def place(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    x = (labels[:, None] + rng.normal(size=(300, 2))).astype(np.float32)
    np.savez("test.npz", x=x, labels=labels, speaker=np.arange(300) % 5)
    (tmp_path / "my_metrics.py").write_text(METRICS)
    for name, weights in (("original", "1.0, 1.0"), ("good", "1.0, 0.99"), ("bad", "1.0, -1.0")):
        ir.save(ir.from_onnx_text(TEXT % weights), f"{name}.onnx")
    (tmp_path / "limits.toml").write_text("[limits]\nauc = -0.01\n")
    return tmp_path


BASE = ["evaluate", "original.onnx", "good.onnx", "--data", "test.npz"]


def test_the_line_of_the_documentation(place, capsys):
    pytest.importorskip("matplotlib")
    edgepass.compile("good.onnx", "x86_64", time_budget_s=0).save("out")
    code = main(
        [
            *("evaluate", "original.onnx", "out/", "bad.onnx", "--data", "test.npz"),
            *("--metric", "my_metrics:auc", "--slice", "loudness=my_metrics:loud"),
            *("--slice", "speaker", "--gate", "limits.toml"),
            *("--json", "report.json", "--plots", "folder"),
        ]
    )
    assert code == REGRESSION == 29
    shown = capsys.readouterr()
    assert "exceeds" in shown.out
    assert "bad.onnx: auc -0.01, exceeds" in shown.err
    report = edgepass.Report.from_dict(json.loads((place / "report.json").read_text()))
    assert report.verdict("out") == "within"
    assert report.verdict("bad.onnx") == "exceeds"
    assert {row.slice for row in report["out"].slices} == {"loudness", "speaker"}
    assert report["bad.onnx"].harmed
    assert {path.name for path in (place / "folder").iterdir()} == {
        "metrics.png",
        "slices.png",
        "size_auc.png",
    }


def test_exit_codes(place, capsys):
    assert main([*BASE, "--metric", "auc", "--limit", "auc=-0.01"]) == 0
    assert main([*BASE, "--metric", "auc", "--limit", "auc>=0.99"]) == REGRESSION
    assert main([*BASE, "--metric", "auc", "--limit", "auc=-1%"]) == 0
    assert main([*BASE, "--metric", "auc"]) == 0
    assert main(["evaluate", "original.onnx", "bad.onnx", "--data", "test.npz"]) == 0
    assert main([*BASE, "--metric", "nothing"]) == 2
    assert main([*BASE, "--metric", "my_metrics:nothing"]) == 2
    assert main([*BASE, "--limit", "auc~1"]) == 2
    assert main([*BASE, "--gate", "none.toml"]) == 2
    assert main([*BASE, "--gate", "my_metrics.py"]) == 2
    assert main(["evaluate", "original.onnx", "none.onnx", "--data", "test.npz"]) == 10
    capsys.readouterr()


def test_json_on_stdout_and_confidence(place, capsys):
    (place / "strict.toml").write_text('confident = true\n[limits]\naccuracy = "-0.0001%"\n')
    code = main([*BASE, "--metric", "accuracy", "--gate", "strict.toml", "--json", "-"])
    report = edgepass.Report.from_dict(json.loads(capsys.readouterr().out))
    verdict = report.verdict("good.onnx")
    assert verdict in ("cannot tell", "exceeds", "within")
    assert code == (0 if verdict == "within" else REGRESSION)


def test_labels_names_and_functions(place, capsys):
    np.save("labels.npy", np.load("test.npz")["labels"])
    (place / "labels.txt").write_text("\n".join(map(str, np.load("test.npz")["labels"])))
    for labels in ("labels.npy", "labels.txt", "labels", "speaker"):
        command = [*BASE, "--labels", labels, "--metric", "a=spearman", "--json", "-"]
        assert main(command) == 0
        value = json.loads(capsys.readouterr().out)["rungs"][0]["metrics"]["a"]["value"]["value"]
        assert (value > 0.4) == (labels != "speaker")
    command = ["evaluate", "original.onnx", "mine=good.onnx", "--data", "my_metrics.py:samples"]
    assert (
        main([*command, "--predict", "my_metrics:flipped", "--metric", "auc", "--json", "-"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert [rung["name"] for rung in report["rungs"]] == ["original", "mine"]
    assert report["rungs"][0]["metrics"]["auc"]["value"]["value"] == 0


def test_a_folder_of_models(place, capsys):
    folder = place / "models"
    folder.mkdir()
    for name in ("good", "bad"):
        (place / f"{name}.onnx").rename(folder / f"{name}.onnx")
    assert main(["evaluate", "original.onnx", "models", "--data", "test.npz", "--json", "-"]) == 0
    names = [rung["name"] for rung in json.loads(capsys.readouterr().out)["rungs"]]
    assert names == ["original", "models/bad.onnx", "models/good.onnx"]
