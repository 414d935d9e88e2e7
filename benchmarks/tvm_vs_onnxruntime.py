"""TVM with edgepass's CPU schedules against ONNX Runtime, one thread each, in one process.

    python benchmarks/tvm_vs_onnxruntime.py MODEL.onnx... [--builtin] [--kernels] [--runs N]

For each model: the largest difference of any output relative to its range, the best time of each
of many interleaved runs, and their ratio (below 1: TVM is faster). Weights that are not in the
file are filled with random ones, scaled so that activations stay finite. `--builtin` adds
MobileNetV2 at 224x224 and a six-layer BERT encoder of MiniLM's size at 128 tokens, both with
random weights, built with torch and transformers. Fixed symbolic dimensions: `--dim NAME=SIZE`.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TVM_NUM_THREADS"] = "1"

import numpy as np
import onnx
import onnxruntime

from edgepass.targets.tvm.schedules import ARM64_NEON_DOTPROD, X86_64_AVX2, X86_64_AVX512, CpuSpec


def host_spec() -> CpuSpec:
    """The described CPU that this machine comes closest to."""
    if platform.machine() in ("aarch64", "arm64"):
        return ARM64_NEON_DOTPROD
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return X86_64_AVX512 if "avx512_vnni" in flags else X86_64_AVX2


def fill_weights(model: onnx.ModelProto, seed: int = 0) -> None:
    """Random values for every initializer whose data is elsewhere, kaiming-scaled by fan-in."""
    rng = np.random.default_rng(seed)
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        dims = tuple(tensor.dims)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if len(dims) >= 2:
            fan_in = int(np.prod(dims[1:])) if len(dims) > 2 else dims[0]
            values = rng.standard_normal(dims) * (1.0 / max(fan_in, 1)) ** 0.5
        elif any(part in tensor.name for part in ("weight", "gamma", "var")):
            values = 1.0 + 0.1 * np.abs(rng.standard_normal(dims))
        else:
            values = 0.1 * rng.standard_normal(dims)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(dtype), tensor.name))


def fix_dims(model: onnx.ModelProto, sizes: dict[str, int]) -> None:
    """Give symbolic dimensions of the inputs a size (1 where none is named)."""
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = sizes.get(dim.dim_param, 1)


def random_feeds(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray[Any, Any]]:
    """Standard normal floats; token ids below 1000; ones for masks."""
    rng = np.random.default_rng(0)
    feeds = {}
    for value in session.get_inputs():
        if "float" in value.type:
            feeds[value.name] = rng.standard_normal(value.shape).astype(np.float32)
        elif "mask" in value.name:
            feeds[value.name] = np.ones(value.shape, np.int64)
        else:
            high = 2 if "type" in value.name else 1000
            feeds[value.name] = rng.integers(0, high, value.shape).astype(np.int64)
    return feeds


def mobilenet_v2() -> Any:
    """MobileNetV2 (Sandler et al. 2018, table 2) as a torch module with random weights."""
    from torch import nn

    def block(c_in: int, c_out: int, kernel: int, stride: int, groups: int, act: bool) -> list[Any]:
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(c_out), *([nn.ReLU6()] if act else [])]

    class Bottleneck(nn.Module):
        def __init__(self, c_in: int, c_out: int, stride: int, expand: int) -> None:
            super().__init__()
            hidden = c_in * expand
            layers = block(c_in, hidden, 1, 1, 1, True) if expand != 1 else []
            layers += block(hidden, hidden, 3, stride, hidden, True)
            layers += block(hidden, c_out, 1, 1, 1, False)
            self.layers = nn.Sequential(*layers)
            self.residual = stride == 1 and c_in == c_out

        def forward(self, x: Any) -> Any:
            return x + self.layers(x) if self.residual else self.layers(x)

    layers: list[Any] = block(3, 32, 3, 2, 1, True)
    channels = 32
    for expand, out, count, stride in [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]:
        for index in range(count):
            layers.append(Bottleneck(channels, out, stride if index == 0 else 1, expand))
            channels = out
    layers += [*block(channels, 1280, 1, 1, 1, True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1280, 1000)).eval()


def builtin_models(folder: Path) -> list[Path]:
    """Export the two built-in models."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    network = mobilenet_v2()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.1, 0.5)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel(config).eval()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch.randint(0, 1000, (1, 128))
    cases = {
        "mobilenetv2": (network, (torch.randn(1, 3, 224, 224),), ["x"]),
        "bert_6x384@128": (Encoder(), (ids, torch.ones_like(ids)), ["ids", "mask"]),
    }
    paths = []
    for name, (module, args, names) in cases.items():
        path = folder / f"{name}.onnx"
        torch.onnx.export(
            module, args, str(path), dynamo=True, input_names=names, verbose=False,
            external_data=False,
        )  # fmt: skip
        paths.append(path)
    return paths


def compile_model(model: onnx.ModelProto, spec: CpuSpec) -> tuple[Any, Any, float]:
    """`(executable, schedule report, seconds)`."""
    import tvm
    from tvm.relax.frontend.onnx import from_onnx

    from edgepass.targets.tvm.schedules import schedule_module

    started = time.perf_counter()
    module = from_onnx(model, keep_params_in_input=False)
    module, report = schedule_module(module, spec)
    with tvm.transform.PassContext(opt_level=3):
        executable = tvm.compile(module, target=spec.tvm_target())
    return executable, report, time.perf_counter() - started


def outputs_of(result: Any) -> list[np.ndarray[Any, Any]]:
    """The arrays of what the virtual machine returned."""
    return [result.numpy()] if hasattr(result, "numpy") else [item.numpy() for item in result]


def print_kernels(machine: Any, report: Any, runs: int) -> None:
    """Each function's rule, calls per run, and the least time all its calls of a run took."""
    rules = {record.name: f"{record.kind}: {record.rule}" for record in report.kernels}
    best: dict[str, tuple[float, int]] = {}
    for _ in range(runs):
        times: dict[str, list[float]] = {}
        started: list[float] = []

        def instrument(_: Any, name: str, before: bool, *rest: Any) -> None:
            if before:
                started.append(time.perf_counter())  # noqa: B023
            else:
                times.setdefault(name, []).append(time.perf_counter() - started.pop())  # noqa: B023

        machine.set_instrument(instrument)
        machine.invoke_stateful("main")
        for name, found in times.items():
            entry = (sum(found), len(found))
            best[name] = min(best.get(name, entry), entry)
    for name, (seconds, calls) in sorted(best.items(), key=lambda item: -item[1][0]):
        print(f"  {seconds * 1e6:9.1f} us {calls:4} x {name:34} {rules.get(name, '')}")


def compare(path: Path, spec: CpuSpec, args: argparse.Namespace) -> None:
    """Compile, check and time one model; print a line."""
    import tvm
    from tvm import relax

    model = onnx.load(str(path), load_external_data=False)
    fill_weights(model)
    fix_dims(model, dict(args.dim))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = random_feeds(session)
    expected = session.run(None, feeds)
    executable, report, seconds = compile_model(model, spec)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    names = [value.name for value in session.get_inputs()]
    inputs = [tvm.runtime.tensor(feeds[name]) for name in names]
    results = outputs_of(machine["main"](*inputs))
    error = max(
        float(np.abs(got - want).max() / max(float(np.ptp(want)), 1e-30))
        for got, want in zip(results, expected, strict=True)
    )
    machine.set_input("main", *inputs)
    ours = theirs = float("inf")
    for _ in range(args.runs):
        started = time.perf_counter()
        machine.invoke_stateful("main")
        middle = time.perf_counter()
        session.run(None, feeds)
        ours = min(ours, middle - started)
        theirs = min(theirs, time.perf_counter() - middle)
    print(
        f"{path.stem:36} tvm {ours * 1e3:9.2f} ms   onnxruntime {theirs * 1e3:9.2f} ms   "
        f"ratio {ours / theirs:6.2f}   error {error:.1e}   compile {seconds:5.1f} s   "
        f"kernels {len(report.kernels):3}   unscheduled {len(report.unscheduled)}",
        flush=True,
    )
    if args.kernels:
        print_kernels(machine, report, args.runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument(
        "--builtin",
        action="store_true",
        help="MobileNetV2 and a BERT encoder; also where no model is given",
    )
    parser.add_argument("--kernels", action="store_true", help="rules and times of each kernel")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument(
        "--dim",
        action="append",
        default=[],
        metavar="NAME=SIZE",
        type=lambda text: (text.split("=")[0], int(text.split("=")[1])),
    )
    args = parser.parse_args()
    import tvm

    spec = host_spec()
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    print(
        f"{cpu}, one thread; tvm {tvm.__version__}, onnxruntime {onnxruntime.__version__}; "
        f"code for {spec.triple} {spec.mcpu}"
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = builtin_models(Path(folder)) if args.builtin or not args.models else []
        for path in [*paths, *args.models]:
            try:
                compare(path, spec, args)
            except Exception as error:  # one model's failure must not hide the others
                lines = str(error).strip().splitlines() or [type(error).__name__]
                print(f"{path.stem:36} failed: {lines[-1][:150]}", flush=True)


if __name__ == "__main__":
    main()
