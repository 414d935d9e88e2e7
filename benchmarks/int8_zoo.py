"""Speed of int8 on architectures with random weights: edgepass beside float and its peers.

    python benchmarks/int8_zoo.py [--keep FILE.jsonl] MODEL.onnx ...

For each model, weights drawn at random and one random calibration sample: the file as it is and
edgepass's default recipe in float, edgepass's int8, ONNX Runtime's `quantize_static` with its
defaults after its own preprocessing, and NNCF's quantization run by OpenVINO where both are
installed. All in turns in one process, one thread. The last lines say by how much int8 is faster
than float and than the peer (geometric means) and which models are slower than float by over 3 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from host import describe_host
from ort_peers import STATIC, quantize, quiet
from random_weights import with_random_weights

import edgepass
from edgepass.passes.probe import working_sample
from edgepass.speed import time_in_turns
from edgepass.targets.onnx_file import write_onnx
from edgepass.targets.onnxruntime import OrtRunner

Feed = Mapping[str, np.ndarray]
ORIGINAL, FLOAT, INT8 = "original", "edgepass float", "edgepass int8"
ORT, OPENVINO = "ORT static", "OpenVINO NNCF"
_SLACK = 1.03


@dataclasses.dataclass
class Row:
    """Milliseconds of each candidate of one model, and why others have none."""

    model: str
    ms: dict[str, float] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def ratio(self, other: str) -> float | None:
        """Time of edgepass's int8 over another's; None where either is missing."""
        if INT8 not in self.ms or other not in self.ms:
            return None
        return self.ms[INT8] / self.ms[other]

    @property
    def against_float(self) -> float | None:
        """Over the faster of the file as it is and edgepass's float."""
        found = [r for other in (ORIGINAL, FLOAT) if (r := self.ratio(other)) is not None]
        return max(found, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--keep", type=Path, help="rows are added here, and not measured again")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing a candidate")
    options = parser.parse_args()
    print(f"{describe_host()}\n")
    print(
        "| model | float | edgepass float | edgepass int8 | ORT static | OpenVINO | int8 / float |"
    )
    print("|---|---|---|---|---|---|---|")
    rows = _read(options.keep)
    for path in options.models:
        if path.stem not in rows:
            rows[path.stem] = measured(path, options.budget)
            if options.keep is not None:
                with options.keep.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(dataclasses.asdict(rows[path.stem])) + "\n")
        print(_line(rows[path.stem]), flush=True)
    print(summary([rows[path.stem] for path in options.models]))


def measured(path: Path, budget_s: float) -> Row:
    """One model, all candidates."""
    row = Row(path.stem)
    model = with_random_weights(path)
    feed = working_sample(model).feed
    calls: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "model.onnx"
        write_onnx(model, source)
        makers: dict[str, Callable[[], Callable[[], object]]] = {
            ORIGINAL: lambda: _ort(OrtRunner(model), feed),
            FLOAT: lambda: _edgepass(model, "default", feed, row),
            INT8: lambda: _edgepass(model, "int8", feed, row),
            ORT: lambda: _peer(source, folder, feed),
        }
        if all(importlib.util.find_spec(package) for package in ("openvino", "nncf")):
            makers[OPENVINO] = lambda: _openvino(source, feed)
        for candidate, make in makers.items():
            try:
                calls[candidate] = make()
                calls[candidate]()
            except Exception as error:  # peers raise anything
                calls.pop(candidate, None)
                row.failed[candidate] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        times = time_in_turns(list(calls.values()), budget_s=budget_s)
    row.ms = dict(zip(calls, times, strict=True))
    return row


def _ort(runner: OrtRunner, feed: Feed) -> Callable[[], object]:
    return lambda: runner.run(feed)


def _edgepass(model: Any, recipe: str, feed: Feed, row: Row) -> Callable[[], object]:
    calibration = [feed] if recipe == "int8" else None
    made = edgepass.compile(model, recipe=recipe, calibration=calibration, check_numerics=False)
    row.notes += [f"{recipe}: {note}" for note in made.notes]
    return _ort(OrtRunner(made.model, session_options=made.session_options), feed)


def _peer(source: Path, folder: Path, feed: Feed) -> Callable[[], object]:
    out = folder / "static.onnx"
    quantize(STATIC, source, out, [feed])
    return _ort(OrtRunner(out), feed)


def _openvino(source: Path, feed: Feed) -> Callable[[], object]:
    import nncf
    import openvino

    core = openvino.Core()
    core.set_property({"INFERENCE_NUM_THREADS": 1})
    with quiet():
        made = nncf.quantize(core.read_model(source), nncf.Dataset([dict(feed)]))
    options = {"INFERENCE_NUM_THREADS": "1", "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(made, "CPU", options)
    request = compiled.create_infer_request()
    return lambda: request.infer(dict(feed))


def _line(row: Row) -> str:
    columns = (ORIGINAL, FLOAT, INT8, ORT, OPENVINO)
    cells = [
        f"{row.ms[c]:.2f}" if c in row.ms else ("failed" if c in row.failed else "")
        for c in columns
    ]
    ratio = row.against_float
    cells.append("" if ratio is None else f"{ratio:.2f}{' SLOWER' if ratio > _SLACK else ''}")
    return f"| {row.model} | {' | '.join(cells)} |"


def summary(rows: Sequence[Row]) -> str:
    """Geometric means, the models slower than float, and what failed."""
    lines = [""]
    for other in (ORIGINAL, FLOAT, ORT, OPENVINO):
        ratios = [r for row in rows if (r := row.ratio(other)) is not None]
        if ratios:
            mean = math.exp(-sum(map(math.log, ratios)) / len(ratios))
            lines.append(
                f"edgepass int8 is {mean:.2f}x as fast as {other} (geometric mean of "
                f"{len(ratios)}, {sum(r > _SLACK for r in ratios)} slower by over 3 %)"
            )
    slower = [(r, row.model) for row in rows if (r := row.against_float or 0) > _SLACK]
    text = ", ".join(f"{model} {ratio:.2f}" for ratio, model in sorted(slower, reverse=True))
    lines.append(f"slower than the faster float by over 3 %: {text or 'none'}")
    lines += [
        f"- {row.model}, {candidate}: {why}"
        for row in rows
        for candidate, why in row.failed.items()
    ]
    return "\n".join(lines)


def _read(path: Path | None) -> dict[str, Row]:
    if path is None or not path.exists():
        return {}
    rows = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row.model: row for row in rows}


if __name__ == "__main__":
    main()
