"""`edgepass.optimize`: files in and out, the equality check, the command line."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import edgepass
from edgepass.cli import main
from edgepass.errors import ModelFileError, NumericsError, UsageError
from edgepass.frontends import load_model
from edgepass.frontends.mapped_file import without_weights
from edgepass.ir import wire_format as wire
from edgepass.ir.mapped import MappedTensor
from edgepass.optimizer import Equality
from edgepass.passes.probe import NumericError
from edgepass.targets.onnx_file import serialize, write_onnx
from edgepass.targets.onnxruntime import OrtRunner


def mlp(path: Path, *, external: bool = False) -> Path:
    """x [batch, 64] through two layers of 64 KB weights and what an exporter leaves between."""
    generator = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        mlp (float[batch, 64] x) => (float[batch, 64] y) {
            one = Constant <value = float {1.0}> ()
            a = MatMul(x, w1)
            b = Mul(a, one)
            c = Relu(b)
            d = Identity(c)
            e = MatMul(d, w2)
            y = Add(e, bias)
        }"""
    )
    for name, shape in (("w1", (64, 256)), ("w2", (256, 64)), ("bias", (64,))):
        array = (generator.standard_normal(shape) / 16).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path, save_as_external_data=external, size_threshold=0)
    return path


@pytest.mark.parametrize("external", [False, True])
def test_a_file_is_optimized_into_a_file(tmp_path: Path, external: bool) -> None:
    source = mlp(tmp_path / "m.onnx", external=external)
    before = source.read_bytes()
    found = edgepass.optimize(source, "x86_64", tmp_path / "out.onnx")
    assert found.nodes < found.nodes_before == 6
    assert found.equality.holds
    assert found.equality.feeds == 2  # the batch is free: two sizes
    assert source.read_bytes() == before
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    expected = OrtRunner(source, optimize=False).run({"x": x})["y"]
    actual = OrtRunner(tmp_path / "out.onnx").run({"x": x})["y"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_rewrites_say_rule_and_node(tmp_path: Path) -> None:
    found = edgepass.optimize(mlp(tmp_path / "m.onnx"), "x86_64")
    rules = {item.rule for item in found.rewrites}
    assert {"remove_identity", "remove_neutral"} <= rules
    assert all(item.node for item in found.rewrites)


def test_the_model_itself_is_never_the_output(tmp_path: Path) -> None:
    source = mlp(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="is the model itself"):
        edgepass.optimize(source, "x86_64", source)
    with pytest.raises(UsageError, match="There is no folder"):
        edgepass.optimize(source, "x86_64", tmp_path / "none" / "out.onnx")
    with pytest.raises(UsageError, match="is a folder"):
        edgepass.optimize(source, "x86_64", tmp_path)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    source = mlp(tmp_path / "m.onnx")
    found = edgepass.optimize(source, "x86_64")
    source.write_bytes(source.read_bytes() + b"\0")
    with pytest.raises(ModelFileError, match="changed while its weights were in use"):
        found.save_onnx(tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_absent_weights_are_no_obstacle(tmp_path: Path) -> None:
    source = mlp(tmp_path / "m.onnx", external=True)
    next(p for p in tmp_path.iterdir() if p != source).unlink()
    found = edgepass.optimize(source, "x86_64")
    assert found.nodes < found.nodes_before
    assert found.equality.holds is None
    assert "no data" in found.equality.reason


@dataclasses.dataclass(frozen=True)
class DropRelu(edgepass.RewriteRule):
    """Relu(x) -> x, which is wrong."""

    def pattern(self) -> object:
        return edgepass.op.Relu(edgepass.var("x"))

    def rewrite(self, m: object, build: object) -> object:
        return m["x"]


def test_a_wrong_rule_is_caught(tmp_path: Path) -> None:
    found = edgepass.optimize(mlp(tmp_path / "m.onnx"), "x86_64", passes=[DropRelu()])
    assert found.equality.holds is False
    assert found.equality.error is not None
    assert found.equality.error.relative > 1e-2


PLUGIN = '''
import dataclasses, edgepass

@edgepass.register_pass
@dataclasses.dataclass(frozen=True)
class DropReluPlugin(edgepass.RewriteRule):
    """Relu(x) -> x, which is wrong."""
    def pattern(self): return edgepass.op.Relu(edgepass.var("x"))
    def rewrite(self, m, build): return m["x"]
'''


def test_a_wrong_rule_fails_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    source, recipe = str(mlp(tmp_path / "m.onnx")), "cleanup,drop_relu_plugin"
    code = main(["optimize", source, "-t", "x86_64", "--plugin", str(plugin), "-r", recipe])
    assert code == NumericsError.exit_code
    assert "does not compute what its source does" in capsys.readouterr().err


def test_equality_allows_what_rounding_does_to_the_source_and_no_more() -> None:
    def verdict(error: float, own: float | None = None) -> bool | None:
        other = None if own is None else NumericError(own, 0.0)
        return Equality(NumericError(error, 0.0), 1, own_error=other).holds

    assert verdict(1e-5)
    assert not verdict(2e-5)
    assert verdict(2e-5, own=3e-5)
    assert not verdict(4e-5, own=3e-5)
    assert not verdict(2e-2, own=0.5)  # a chaotic model excuses 1e-2 at most
    assert not verdict(math.inf, own=math.inf)
    assert Equality(None, 0, "no weights").holds is None


# --- files without their weights ---------------------------------------------------------------


def test_weights_stay_in_the_file_until_read(tmp_path: Path) -> None:
    source = mlp(tmp_path / "m.onnx")
    split = without_weights(source)
    assert split is not None
    content, tensors = split
    assert set(tensors) == {"w1", "w2"}  # the bias is small, and read
    assert len(content) < 2000
    whole = onnx.load(source)
    model = load_model(source, map_weights=True)
    for proto in whole.graph.initializer:
        tensor = model.graph.initializers[proto.name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), onnx.numpy_helper.to_array(proto))
        assert isinstance(tensor, MappedTensor) == (proto.name != "bias")
    assert serialize(model) == serialize(load_model(source))


def test_a_damaged_file_is_read_the_ordinary_way(tmp_path: Path) -> None:
    source = mlp(tmp_path / "m.onnx")
    for cut in (10, 1000, source.stat().st_size - 5):
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(source.read_bytes()[:cut])
        assert without_weights(broken) is None
        with pytest.raises(ModelFileError):
            load_model(broken, map_weights=True)


def test_a_graph_in_two_pieces_is_read_whole(tmp_path: Path) -> None:
    """protobuf merges a field that comes twice; then the pieces have to be read together."""
    source = mlp(tmp_path / "m.onnx")
    empty = wire.bytes_field(wire.MODEL_GRAPH, 0)
    (tmp_path / "twice.onnx").write_bytes(source.read_bytes() + empty)
    assert without_weights(tmp_path / "twice.onnx") is None
    assert len(load_model(tmp_path / "twice.onnx", map_weights=True).graph) == 7


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int64", "bool", "float64"])
def test_written_in_pieces_is_written_as_one(tmp_path: Path, dtype: str) -> None:
    array = (np.arange(300_000) % 2).astype(dtype).reshape(300, 1000)
    view = ir.Tensor(array.T, name="w")  # not contiguous
    value = ir.Value(name="w", shape=view.shape, type=ir.TensorType(view.dtype), const_value=view)
    node = ir.Node("", "Identity", [value], num_outputs=1)
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    graph = ir.Graph(
        [], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 20}, name="g"
    )
    model = ir.Model(graph, ir_version=10)
    write_onnx(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == serialize(model)
    np.testing.assert_array_equal(OrtRunner(tmp_path / "m.onnx").run({})["y"], array.T)


def test_varints() -> None:
    for number in (0, 1, 127, 128, 300, 2**31, 2**40 + 5):
        encoded = wire.varint(number)
        assert wire.read_varint(encoded, 0, len(encoded)) == (number, len(encoded))
    with pytest.raises(ValueError, match="no number ends"):
        wire.read_varint(b"\xff\xff", 0, 2)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = mlp(tmp_path / "m.onnx")
    assert main(["optimize", str(source), "--target", "x86_64", "--rules"]) == 0
    text = capsys.readouterr().out
    assert "equal to the source" in text
    assert "remove_identity" in text
    assert (tmp_path / "m.opt.onnx").is_file()
    out = tmp_path / "o.onnx"
    assert main(["optimize", str(source), "-o", str(out), "-t", "x86_64", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["equality"]["holds"] is True
    assert data["nodes"][1] < data["nodes"][0]
    assert out.read_bytes() == (tmp_path / "m.opt.onnx").read_bytes()


def test_every_rewrite_is_certified_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = mlp(tmp_path / "m.onnx")
    found = edgepass.optimize(source, "x86_64", certify=True)
    assert found.certificates is not None
    assert len(found.certificates) == len(found.rewrites) > 1
    assert all(item.holds for item in found.certificates)
    wrong = edgepass.optimize(source, "x86_64", passes=[DropRelu()], certify=True)
    assert [c.rule for c in wrong.certificates or () if c.holds is False] == ["drop_relu"]
    assert edgepass.optimize(source, "x86_64").certificates is None
    assert main(["optimize", str(source), "-t", "x86_64", "--certify"]) == 0
    assert "Certificates" in capsys.readouterr().out


def test_portable_keeps_to_standard_operators(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[1, 3, 8, 8] x, float[4, 3, 3, 3] w) => (float[1, 4, 6, 6] y) {
            a = Conv(x, w)
            y = Relu(a)
        }"""
    )
    own = edgepass.optimize(model, "x86_64")
    assert [node.op_type for node in own.model.graph] == ["FusedConv"]
    portable = edgepass.optimize(model, "x86_64", portable=True)
    assert [node.op_type for node in portable.model.graph] == ["Conv", "Relu"]
    assert set(portable.model.opset_imports) == {""}
