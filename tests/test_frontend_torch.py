"""Torch modules, architectures and exported programs as graphs."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgepass.errors import ArchitectureError, UsageError, WeightsAbsentError
from edgepass.frontends import load_model, load_notes, to_supported_opset
from edgepass.ir.graph import absent_weights, is_absent

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
nn = torch.nn


class Net(nn.Module):
    """Convolution, normalization, a constant made in forward, a buffer that isn't saved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.register_buffer("offset", torch.arange(8.0).reshape(1, 8), persistent=False)

    def forward(self, image):
        features = torch.relu(self.norm(self.conv(image))).mean((2, 3))
        return self.head(features + torch.ones(8) + self.offset)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.out = nn.Linear(4, 10, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids, mask=None):
        rows = self.table(ids)
        return self.out(rows if mask is None else rows * mask[..., None])


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the line that the error must name
            return x
        return -x


class Talkative(nn.Module):
    def forward(self, x):
        print("hello from forward")
        warnings.warn("careful", stacklevel=1)
        return x + 1


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)


def dims(value: ir.Value) -> list[int | str | None]:
    return [d if isinstance(d, int) else d.value for d in value.shape.dims]


def test_dynamic_batch_and_values() -> None:
    module = tiny()
    image = torch.randn(1, 3, 16, 16)
    model = load_model(module, example_inputs=(image,), dynamic_shapes={"image": {0: "batch"}})
    assert dims(model.graph.inputs[0]) == ["batch", 3, 16, 16]
    assert dims(model.graph.outputs[0]) == ["batch", 5]
    assert any("batch=2" in note for note in load_notes(model))
    images = torch.randn(4, 3, 16, 16)
    expected = module(images).detach().numpy()
    np.testing.assert_allclose(run(model, image=images.numpy())[0], expected, atol=1e-5)
    to_supported_opset(model)
    np.testing.assert_allclose(run(model, image=images.numpy())[0], expected, atol=1e-5)


def test_names_of_dimensions_in_a_row_and_in_expressions() -> None:
    model = load_model(
        tiny(),
        example_inputs={"image": np.zeros((2, 3, 16, 16), np.float32)},
        dynamic_shapes={"image": ("batch", 3, "height", "width")},
    )
    assert dims(model.graph.inputs[0]) == ["batch", 3, "height", "width"]
    pool = nn.Sequential(nn.MaxPool2d(2))
    model = load_model(pool, input_shapes="2x3x16x16", dynamic_shapes=({0: "batch", 2: "height"},))
    assert dims(model.graph.outputs[0])[0] == "batch"
    assert "height" in str(dims(model.graph.outputs[0])[2])


def test_dynamic_shapes_as_torch_export_takes_them() -> None:
    size = torch.export.Dim("n", min=2, max=64)
    for spec in ({"image": {0: size}}, ({0: size},)):
        model = load_model(tiny(), input_shapes=["2x3x8x8"], dynamic_shapes=spec)
        assert dims(model.graph.inputs[0]) == ["n", 3, 8, 8]


def test_inputs_by_name_and_shared_weights() -> None:
    module = Two().eval()
    ids = torch.arange(6).reshape(2, 3)
    mask = torch.ones(2, 3)
    model = load_model(
        module,
        example_inputs={"ids": ids, "mask": mask},
        dynamic_shapes={"ids": {0: "batch"}, "mask": {0: "batch"}},
    )
    assert [value.name for value in model.graph.inputs] == ["ids", "mask"]
    assert [dims(value) for value in model.graph.inputs] == [["batch", 3], ["batch", 3]]
    weights = [v for v in model.graph.initializers.values() if v.const_value.size == 40]
    assert len(weights) == 1
    expected = module(ids, mask).detach().numpy()
    got = run(model, ids=ids.numpy(), mask=mask.numpy())[0]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_shapes_as_text() -> None:
    model = load_model(Two(), input_shapes={"ids": "2x3:int64"})
    assert model.graph.inputs[0].dtype == ir.DataType.INT64
    for wrong in ("2xthree", "2x3:int65", "2x3:nn"):
        with pytest.raises(UsageError, match="not an input shape"):
            load_model(Two(), input_shapes=[wrong])
    with pytest.raises(UsageError, match="both given"):
        load_model(Two(), example_inputs=(torch.zeros(1),), input_shapes=["1"])


def test_the_module_is_left_as_it_was() -> None:
    module = Net()
    module.norm.eval()
    state = copy.deepcopy(module.state_dict())
    model = load_model(module, input_shapes=["1x3x8x8"])
    assert module.training
    assert module.conv.training
    assert not module.norm.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert "BatchNormalization" in [node.op_type for node in model.graph]
    assert any("training mode" in note for note in load_notes(model))
    assert load_notes(load_model(tiny(), input_shapes=["1x3x8x8"])) == []


def test_exported_and_onnx_programs() -> None:
    module, image = tiny(), torch.randn(1, 3, 8, 8)
    program = torch.export.export(module, (image,))
    expected = module(image).detach().numpy()
    model = load_model(program)
    np.testing.assert_allclose(run(model, image=image.numpy())[0], expected, atol=1e-5)
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    model = load_model(exported)
    np.testing.assert_allclose(run(model, image=image.numpy())[0], expected, atol=1e-5)
    model.graph.inputs[0].name = "changed"
    assert exported.model.graph.inputs[0].name == "image"
    with pytest.raises(UsageError, match="ExportedProgram"):
        load_model(program, example_inputs=(image,))


def test_an_architecture_on_the_meta_device() -> None:
    with torch.device("meta"):
        module = Net()
    with pytest.raises(WeightsAbsentError, match="meta device"):
        load_model(module, input_shapes=["1x3x8x8"])
    model = load_model(
        module,
        input_shapes=["1x3x8x8"],
        dynamic_shapes={"image": {0: "batch"}},
        weights_required=False,
    )
    assert dims(model.graph.outputs[0]) == ["batch", 5]
    assert set(absent_weights(model)) == set(model.graph.initializers)
    assert module.conv.weight.is_meta
    real = load_model(tiny(), input_shapes=["2x3x8x8"], dynamic_shapes={"image": {0: "batch"}})
    assert [n.op_type for n in model.graph] == [n.op_type for n in real.graph]


def test_real_buffers_of_an_architecture_keep_their_data() -> None:
    with torch.device("meta"):
        module = Net()
    module.offset = torch.arange(8.0).reshape(1, 8)
    model = load_model(module, input_shapes=["1x3x8x8"], weights_required=False)
    assert is_absent(model.graph.initializers["conv.weight"].const_value)
    offset = model.graph.initializers["offset"].const_value.numpy()
    np.testing.assert_array_equal(offset, np.arange(8.0, dtype=np.float32).reshape(1, 8))


def test_callables() -> None:
    model = load_model(lambda: (Net(), (torch.zeros(1, 3, 8, 8),)), weights_required=False)
    assert absent_weights(model)
    model = load_model(lambda: (Net(), (torch.zeros(1, 3, 8, 8),)))
    assert not absent_weights(model)
    model = load_model(Net, input_shapes=["1x3x8x8"])
    assert not absent_weights(model)
    with pytest.raises(ArchitectureError, match="returned a int"):
        load_model(lambda: 3)


def test_a_builder_that_reads_its_own_tensors() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rates = torch.linspace(0, 1, 4).tolist()  # fails on the meta device
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) * self.rates[2]

    model = load_model(lambda: (Table(), (torch.zeros(1, 4),)), weights_required=False)
    assert "layer.weight" in absent_weights(model)
    assert not absent_weights(load_model(Table, input_shapes=["1x4"]))


def test_text_names_a_callable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_architectures.py").write_text(
        "import torch\n"
        "class Zoo:\n"
        "    @staticmethod\n"
        "    def build():\n"
        "        return torch.nn.Linear(4, 2), (torch.zeros(1, 4),)\n"
        "def broken():\n"
        "    raise ValueError('no config')\n"
    )
    monkeypatch.chdir(tmp_path)
    model = load_model("my_architectures:Zoo.build", weights_required=False)
    assert set(absent_weights(model)) == set(model.graph.initializers)
    assert str(tmp_path) not in sys.path
    with pytest.raises(ArchitectureError, match="no config") as error:
        load_model("my_architectures:broken")
    assert "my_architectures.py:7 in broken" in error.value.diagnostic.where
    for text in ("my_architectures:nothing", "no_such_module:build"):
        with pytest.raises(ArchitectureError, match="can't be imported"):
            load_model(text)
    model = load_model("torch.nn:Identity", input_shapes=["1x4"])
    assert dims(model.graph.outputs[0]) == [1, 4]


def test_control_flow_on_data_names_the_line() -> None:
    with pytest.raises(ArchitectureError, match="Branching can't be exported") as error:
        load_model(Branching(), input_shapes=["2x3"])
    assert error.value.__cause__ is not None
    where = error.value.diagnostic.where
    assert Path(__file__).name in where
    assert "if x.sum() > 0" in where
    assert "torch.where" in error.value.diagnostic.fix


def test_a_dimension_that_the_module_fixes_is_explained() -> None:
    class Unrolled(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, i] * i for i in range(x.shape[1])], 1)

    with pytest.raises(ArchitectureError, match="specialized it to be a constant") as error:
        load_model(Unrolled(), input_shapes=["2x5"], dynamic_shapes={"x": {1: "steps"}})
    assert "dynamic_shapes" in error.value.diagnostic.fix


def test_an_operation_that_onnx_lacks_names_the_line() -> None:
    class Eigen(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x)

    with pytest.raises(ArchitectureError, match=r"(?s)translated to ONNX.*linalg_eig") as error:
        load_model(Eigen(), input_shapes=["3x3"])
    assert "torch.linalg.eigvals" in error.value.diagnostic.where


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ArchitectureError, "no example inputs"),
        ({"input_shapes": ["1x3x8x8", "1"]}, ArchitectureError, "don't fit Net.forward"),
        ({"input_shapes": {"picture": "1x3x8x8"}}, ArchitectureError, "don't fit Net.forward"),
        ({"input_shapes": ["1x4x8x8"]}, ArchitectureError, "can't be exported"),
        ({"example_inputs": "1x3x8x8"}, UsageError, "is a str"),
        (
            {"input_shapes": ["1x3x8x8"], "dynamic_shapes": {"picture": {0: "n"}}},
            UsageError,
            "names 'picture'",
        ),
        (
            {"input_shapes": ["1x3x8x8"], "dynamic_shapes": {"image": {4: "n"}}},
            UsageError,
            "names dimension 4",
        ),
        (
            {"input_shapes": ["1x3x8x8"], "dynamic_shapes": {"image": ("n", 4, 8, 8)}},
            UsageError,
            "says 4 for dimension 1",
        ),
        (
            {"input_shapes": ["1x3x8x8"], "dynamic_shapes": {"image": ("n", 3)}},
            UsageError,
            "2 entries for 4",
        ),
    ],
)
def test_inputs_that_do_not_fit(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_model(tiny(), **arguments)


def test_torchscript_is_refused_with_the_way_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ArchitectureError, match=r"(?s)TorchScript.*original nn.Module"):
        load_model(script, input_shapes=["1x2"])


def test_exporting_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_model(Talkative(), input_shapes=["2"])
    out, err = capfd.readouterr()
    assert (out, err, caught) == ("", "", [])


def test_reading_onnx_does_not_load_torch() -> None:
    code = (
        "import sys, edgepass.frontends;print('torch' in sys.modules, 'onnxruntime' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


@pytest.mark.slow
def test_llama_of_a_billion_parameters_without_weights() -> None:
    pytest.importorskip("transformers")
    code = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from edgepass.frontends import load_model
def build():
    config = LlamaConfig(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, intermediate_size=8192, vocab_size=128256, use_cache=False,
        tie_word_embeddings=True)
    return LlamaForCausalLM(config), (torch.zeros(1, 128, dtype=torch.int64),)
model = load_model(build, weights_required=False)
print(sum(v.const_value.size for v in model.graph.initializers.values()))
# not ru_maxrss: a process starts with that of the one it was forked from
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parameters, peak_kilobytes = map(int, found.stdout.split()[-2:])
    assert 1.235e9 < parameters < 1.237e9
    assert peak_kilobytes < 1.3e6
