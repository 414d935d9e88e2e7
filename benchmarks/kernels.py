"""Predicted kernels against those that ONNX Runtime runs: equal by operator and output shape?

    python benchmarks/kernels.py [--recipe fp32|int8] [--raw] [--arm64] MODEL.onnx ...

A model goes through the recipe without its weights, its kernels are predicted, weights are filled
with random numbers, and a session optimizes and runs it. What ran, with its shapes, is read from
the session's profile, the operators' domains from the optimized graph that it saved. Agreement is
the size of the multisets' intersection over the larger of the two; views are left out of both.
`--raw` takes the file as it is. With `--arm64` the emulated machine optimizes the model, and the
graph that it saved is run here, as it stands, for its shapes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from host import describe_host

from edgepass.cost.kernels import kernels
from edgepass.frontends import load_model
from edgepass.frontends.opset import to_supported_opset
from edgepass.ir.random_weights import fill_random_weights
from edgepass.ir.shapes import infer_shapes
from edgepass.passes.base import Context, Stage
from edgepass.passes.driver import run_passes
from edgepass.pipelines import epilogue, parse_recipe
from edgepass.targets.onnx_file import write_onnx
from edgepass.targets.registry import get_target
from edgepass.targets.target import Target

Launch = tuple[str, str, tuple[int, ...]]
"""Domain, operator, shape of the first output."""
_VIEWS = {"Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--recipe", default="fp32")
    parser.add_argument("--raw", action="store_true", help="no passes: the file as it is")
    parser.add_argument("--arm64", action="store_true", help="on the emulated arm64 machine")
    parser.add_argument("--verbose", action="store_true", help="every difference")
    options = parser.parse_args()
    print(describe_host())
    target = get_target("arm64" if options.arm64 else "host")
    same = total = agreeing = 0
    missing: Counter[tuple[str, str]] = Counter()
    extra: Counter[tuple[str, str]] = Counter()
    for path in options.models:
        model = prepared(path, target, None if options.raw else options.recipe)
        ours = predicted(model, target)
        truth = executed(model, target, emulated=options.arm64)
        common = (ours & truth).total()
        larger = max(ours.total(), truth.total())
        same, total = same + common, total + larger
        agreeing += common >= 0.97 * larger
        print(f"{path.stem[:44]:44} {larger:5} kernels {common / larger:8.2%}", flush=True)
        for found, counts in ((truth - ours, missing), (ours - truth, extra)):
            for (domain, op, shape), count in sorted(found.items()):
                counts[domain, op] += count
                if options.verbose:
                    who = "runtime" if counts is missing else "predicted"
                    print(f"    only {who}: {count} {domain}.{op} {list(shape)}")
    print(
        f"all: {same / total:.2%} of {total} kernels; {agreeing} of {len(options.models)} >= 97 %"
    )
    for what, counts in (("only the runtime", missing), ("only predicted", extra)):
        print(f"{what}:", ", ".join(f"{n} {d}.{op}" for (d, op), n in counts.most_common(12)))


def prepared(path: Path, target: Target, recipe: str | None) -> ir.Model:
    """The model after a recipe's passes, its weights still absent."""
    model = load_model(path, weights_required=False)
    to_supported_opset(model)
    if recipe is None:
        infer_shapes(model, strict=False)
        return model
    context = Context(target)
    chosen = [*parse_recipe(recipe), *epilogue()]
    free = [item for item in chosen if not item.needs_weights]
    # as when a model is compiled: quantization sees the graph before the runtime's own forms
    model, _ = run_passes(model, [i for i in free if i.stage <= Stage.QUANTIZE], context)
    for item in chosen:
        if item.needs_weights:
            model = item.preview(model, context).model
    model, _ = run_passes(model, [i for i in free if i.stage > Stage.QUANTIZE], context)
    return model


def predicted(model: ir.Model, target: Target) -> Counter[Launch]:
    """The kernels as the cost model sees them."""
    return Counter(
        (kernel.domain, kernel.type, kernel.outputs[0].shape or ())
        for kernel in kernels(model, target)
        if kernel.outputs and kernel.type not in _VIEWS
    )


def executed(model: ir.Model, target: Target, *, emulated: bool = False) -> Counter[Launch]:
    """What a session ran. Fills the model's absent weights."""
    fill_random_weights(model)
    config = target.scheme.session_options if target.scheme else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_onnx(model, folder / "model.onnx")
        if emulated:
            _emulate(folder, model, config)
            return profiled(folder / "saved.onnx", folder, config, optimize=False)
        return profiled(folder / "model.onnx", folder, config)


def profiled(
    path: Path, folder: Path, config: Mapping[str, str], *, optimize: bool = True
) -> Counter[Launch]:
    """Operators with the shapes of their first outputs, from one run's profile."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    saved = path
    if optimize:
        saved = folder / "saved.onnx"
        options.optimized_model_filepath = str(saved)
    else:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in {**config, **_EXTERNAL}.items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {i.name: _zeros(i.shape, i.type) for i in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    graph = onnx.load(saved, load_external_data=False).graph
    domains = {(node.name, node.op_type): node.domain for node in graph.node}
    # even unoptimized, a session gives each reader a DequantizeLinear of its own
    added = set() if optimize else {key for key in _named(events) if key not in domains}
    added = {(name, op) for name, op in added if ("", op) not in domains}
    counts: Counter[Launch] = Counter()
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        op = event["args"]["op_name"]
        if op in _VIEWS or (event["name"].removesuffix("_kernel_time"), op) in added:
            continue
        shapes = event["args"]["output_type_shape"]
        shape = tuple(next(iter(shapes[0].values()))) if shapes else ()
        domain = domains.get((event["name"].removesuffix("_kernel_time"), op), "")
        counts["" if domain == "ai.onnx" else domain, op, shape] += 1
    return counts


def _named(events: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Names and operators of the kernels that ran."""
    return {
        (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }


_EXTERNAL = {
    "session.optimized_model_external_initializers_file_name": "saved.data",
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}
_DTYPES = {"tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def _zeros(shape: list[int | str | None], kind: str) -> np.ndarray:
    dims = [d if isinstance(d, int) else 1 for d in shape]
    return np.zeros(dims, _DTYPES.get(kind, np.float32))


def _emulate(folder: Path, model: ir.Model, config: Mapping[str, str]) -> None:
    from edgepass.targets.emulator import EmulatedJob, find_emulator

    job = EmulatedJob(
        name="kernels",
        model=folder / "model.onnx",
        feeds=[],
        session_config=dict(config),
        save_optimized=folder / "saved.onnx",
    )
    find_emulator().run_jobs([job], timeout=1800.0)


if __name__ == "__main__":
    main()
