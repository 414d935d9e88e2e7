"""Structured pruning of architectures with random weights: how far it reaches, whether it is right.

    python benchmarks/prune_zoo.py FOLDER|FILE... [--models N] [--ratios 0.3 0.5] [--tvm]
                                   [--compile] [--heads auto] [--widths] [--largest 60]

Each model is cleaned and gets random weights. In every group that can be pruned, units drawn at
random get zero weights; then they leave, in two ways: the units themselves (`remove`), and what the
pass `prune{importance=l1,multiple=1}` takes (units of zeros have no norm), with `--compile` in
`edgepass.compile` too. Errors are the largest difference of an output over its largest
value. `reach` is the share of parameters in groups that can be pruned. MACs and bytes are those
left, over those before: as the ledger of the pass announces them, and as counted here from the
written file by onnx's own shape inference (convolutions and products). Every result is verified,
keeps its interface and runs in ONNX Runtime, with `--tvm` in TVM too. Below the table: medians, and
all reasons for which groups are blocked.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from host import describe_host
from random_weights import with_random_weights

import edgepass
from edgepass.errors import EdgepassError
from edgepass.ir.verify import interface, verify
from edgepass.passes.base import Context
from edgepass.passes.driver import run_passes
from edgepass.passes.probe import working_sample
from edgepass.passes.prune.groups import Group, Groups, find_groups, parameter_tracks
from edgepass.passes.prune.remove import remove
from edgepass.passes.prune.structured import StructuredPrune
from edgepass.pipelines import GROUPS
from edgepass.targets.onnx_file import write_onnx
from edgepass.targets.onnxruntime import OrtRunner

ALLOWED = 1e-5


@dataclasses.dataclass
class Row:
    """What was found of one model at one ratio; shares are of what was there before."""

    model: str
    ratio: float
    reach: float = 0.0
    free: int = 0
    blocked: int = 0
    error: float = math.nan
    pass_error: float = math.nan
    macs_announced: float = math.nan
    macs_counted: float = math.nan
    bytes_announced: float = math.nan
    bytes_counted: float = math.nan
    seconds: float = 0.0
    failed: str = ""

    @property
    def right(self) -> bool:
        """Whether all that must be true is."""
        same = abs(self.macs_announced - self.macs_counted) < 0.02
        return not self.failed and max(self.error, self.pass_error) <= ALLOWED and same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="folders or files")
    parser.add_argument("--models", dest="count", type=int, default=60, help="so many, evenly")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--heads", default="auto")
    parser.add_argument("--widths", action="store_true")
    parser.add_argument("--largest", type=float, default=60, help="million parameters; 0: any")
    parser.add_argument("--tvm", action="store_true")
    parser.add_argument("--compile", action="store_true", help="the pass in edgepass.compile")
    options = parser.parse_args()
    print(f"{describe_host()}\n")
    print(
        "| model | ratio | reach | groups, blocked | MACs announced, counted | bytes | "
        "error, by the pass | s | |\n|---|---|---|---|---|---|---|---|---|"
    )
    rows: list[Row] = []
    reasons: collections.Counter[str] = collections.Counter()
    for path in _files(options.models, options.largest, options.count):
        for ratio in options.ratios:
            row = measured(path, ratio, options, reasons)
            rows.append(row)
            print(shown(row), flush=True)
    _summary(rows, reasons)
    return sum(not row.right for row in rows)


def _files(given: Sequence[Path], largest: float, count: int) -> list[Path]:
    paths = [p for g in given for p in (sorted(g.glob("*.onnx")) if g.is_dir() else [g])]
    if largest:
        paths = [p for p in paths if _parameters(p) <= largest * 1e6]
    if len(paths) <= count:
        return paths
    return [paths[int(i * len(paths) / count)] for i in range(count)]


def _parameters(path: Path) -> int:
    proto = onnx.load(str(path), load_external_data=False)
    return sum(math.prod(t.dims) for t in proto.graph.initializer)


def measured(
    path: Path,
    ratio: float,
    options: argparse.Namespace,
    reasons: collections.Counter[str],
) -> Row:
    """Everything about one model at one ratio."""
    row, start = Row(path.stem, ratio), time.perf_counter()
    try:
        model = with_random_weights(path)
        model, _ = run_passes(model, [make() for make in GROUPS["cleanup"]], Context())
        feed = working_sample(model).feed
        groups = find_groups(model, heads=options.heads, widths=options.widths)
        row.reach, row.free = groups.reach, len(groups.free)
        row.blocked = len(groups) - row.free
        reasons.update(group.blocked for group in groups if group.blocked)
        chosen = chosen_units(groups, ratio)
        zero(groups, chosen)
        before, signature = outputs(model, feed), _signatures(model)
        _through_the_pass(row, model, feed, before, options)
        remove(model, groups, chosen)
        verify(model)
        if _signatures(model) != signature:
            raise EdgepassError("another interface")
        row.error = error(before, outputs(model, feed))
        if options.tvm:
            row.error = max(row.error, error(before, _tvm_outputs(model, feed)))
    except EdgepassError as problem:
        row.failed = str(problem).splitlines()[0]
    row.seconds = time.perf_counter() - start
    return row


def _through_the_pass(
    row: Row,
    model: ir.Model,
    feed: Mapping[str, np.ndarray],
    before: Sequence[np.ndarray],
    options: argparse.Namespace,
) -> None:
    prune = StructuredPrune(
        ratio=row.ratio,
        importance="l1",
        repair=False,
        multiple=1,
        heads=options.heads,
        widths=options.widths,
    )
    size = counted(model)
    pruned, ledger = run_passes(model.clone(), [prune], Context())
    (line,) = ledger.rows
    row.macs_announced = (line.after.macs or 0) / (line.before.macs or 1)
    row.bytes_announced = line.after.weight_bytes / line.before.weight_bytes
    after = counted(pruned)
    row.macs_counted, row.bytes_counted = after[0] / size[0], after[1] / size[1]
    row.pass_error = error(before, outputs(pruned, feed))
    if options.compile:
        made = edgepass.compile(model.clone(), "host", passes=[prune], check_numerics=False)
        row.pass_error = max(row.pass_error, error(before, outputs(made.model, feed)))


# --- units of zeros ------------------------------------------------------------------------------


def chosen_units(groups: Groups, ratio: float) -> dict[Group, list[int]]:
    """That share of the units of each row, at random; as many of all rows of a cluster."""
    rng = np.random.default_rng(0)
    chosen: dict[Group, list[int]] = {}
    for group in groups.free:
        size = group.size // (int(group.rows.max()) + 1)
        count = min(math.ceil(ratio * size), size - 1)
        for row in range(int(group.rows.max()) + 1 if count else 0):
            units = rng.choice(np.flatnonzero(group.rows == row), count, replace=False)
            chosen.setdefault(group, []).extend(units.tolist())
    return chosen


def zero(groups: Groups, chosen: Mapping[Group, Sequence[int]]) -> None:
    """Zero all weights that the units run through."""
    gone = groups.labels_of(chosen)
    for value, shape, tracks in parameter_tracks(groups.flow):
        array = value.const_value.numpy().reshape(shape)
        for track in tracks:
            mask = gone[track.ids].transpose(np.argsort(track.axes))
            missing = tuple(a for a in range(len(shape)) if a not in track.axes)
            array = np.where(np.expand_dims(mask, missing), np.zeros((), array.dtype), array)
        array = np.ascontiguousarray(array.reshape(value.const_value.shape.numpy()))
        value.const_value = ir.Tensor(array, dtype=value.dtype, name=value.name)


# --- what comes out ------------------------------------------------------------------------------


def _signatures(model: ir.Model) -> tuple[object, ...]:
    return interface(model.graph.inputs), interface(model.graph.outputs)


def outputs(model: ir.Model, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """By ONNX Runtime."""
    with OrtRunner(model) as runner:
        return list(runner.run(feed).values())


def _tvm_outputs(model: ir.Model, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    from edgepass.targets.tvm import TvmRunner, TvmTarget, emit
    from edgepass.targets.tvm.schedules import X86_64_AVX2

    with tempfile.TemporaryDirectory() as folder:
        report = emit(model, TvmTarget(cpu=X86_64_AVX2), Path(folder) / "model.so")
        return list(TvmRunner(report.library).run(feed).values())


def error(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> float:
    """The largest difference of any output over its largest value; infinite for other shapes."""
    worst = 0.0
    for x, y in zip(before, after, strict=True):
        if x.shape != y.shape or not np.isfinite(y).all():
            return math.inf
        scale = float(np.abs(x).max(initial=0)) or 1.0
        worst = max(worst, float(np.abs(x.astype(np.float64) - y).max(initial=0)) / scale)
    return worst


def counted(model: ir.Model) -> tuple[int, int]:
    """MACs of convolutions and products, and bytes of weights, of the model as a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_onnx(model, Path(folder) / "model.onnx", external_data=True)[0]
        proto = onnx.load(str(path), load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(proto)
    shapes = {t.name: tuple(t.dims) for t in inferred.graph.initializer}
    for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    size = sum(math.prod(t.dims) * _width(t.data_type) for t in inferred.graph.initializer)
    return sum(_macs(node, shapes) for node in inferred.graph.node), size


def _width(dtype: int) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(dtype).itemsize)


def _macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum"):
        return 0
    result = math.prod(shapes[node.output[0]])
    if node.op_type == "Conv":
        return result * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "ConvTranspose":
        return math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "Einsum":
        equation = next(a.s.decode() for a in node.attribute if a.name == "equation")
        terms = equation.replace(" ", "").split("->")[0].split(",")
        sizes = {
            n: d
            for term, value in zip(terms, node.input, strict=True)
            for n, d in zip(term, shapes[value], strict=True)
        }
        return math.prod(sizes.values())
    turned = any(a.name == "transA" and a.i for a in node.attribute)
    return result * shapes[node.input[0]][-2 if turned else -1]


# --- the table -----------------------------------------------------------------------------------


def shown(row: Row) -> str:
    """A line of the table."""
    return (
        f"| {row.model} | {row.ratio:.0%} | {row.reach:.3f} | {row.free}, {row.blocked} | "
        f"{row.macs_announced:.3f}, {row.macs_counted:.3f} | "
        f"{row.bytes_announced:.3f}, {row.bytes_counted:.3f} | "
        f"{row.error:.0e}, {row.pass_error:.0e} | {row.seconds:.0f} | "
        f"{row.failed or ('' if row.right else 'WRONG')} |"
    )


def _summary(rows: Sequence[Row], reasons: collections.Counter[str]) -> None:
    ratios = sorted({row.ratio for row in rows})
    print()
    for ratio in ratios:
        some = [row for row in rows if row.ratio == ratio and not row.failed]
        if not some:
            continue
        median = {
            name: statistics.median(getattr(row, name) for row in some)
            for name in ("reach", "macs_announced", "macs_counted", "bytes_counted", "seconds")
        }
        print(
            f"{ratio:.0%}, {len(some)} models, {sum(r.right for r in some)} right: "
            f"reach median {median['reach']:.3f}, least {min(r.reach for r in some):.3f}; "
            f"MACs left {median['macs_announced']:.3f} announced, "
            f"{median['macs_counted']:.3f} counted; bytes left {median['bytes_counted']:.3f}; "
            f"largest error {max(r.error for r in some):.1e}, "
            f"by the pass {max(r.pass_error for r in some):.1e}"
        )
    print(f"{sum(bool(row.failed) for row in rows)} failed\n\nwhy groups are blocked:")
    kinds: collections.Counter[str] = collections.Counter()
    for reason, times in reasons.items():
        kinds[_without_names(reason)] += times
    for reason, times in kinds.most_common(12):
        print(f"- {times} times: {reason}")


def _without_names(reason: str) -> str:
    """A reason with the names of nodes and values left out."""
    parts = reason.split("'")
    return "".join(parts[::2]).replace("  ", " ")


if __name__ == "__main__":
    raise SystemExit(main())
