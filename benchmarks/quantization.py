"""Scores, size and time of trained models in 8 bits and fewer, edgepass beside ONNX Runtime.

    python benchmarks/quantization.py [TASK...] [--recipes R...] [--peers] [--stories FOLDER]

Every task of `labelled_tasks`: the float model in ONNX Runtime as it is, edgepass's recipes for
this host, and (`--peers`) ONNX Runtime's own quantizers with their defaults and variants, all with
the same calibration samples. Scores are on the whole test data. Times are those of one feed, one
thread, all candidates of a task in turns in this process, over the float model's. "in 8 bits" is
the share of weights stored in at most 8 bits. Candidates that fail or do not load say why.

`--keep FOLDER` keeps the models and scores; `--only scores` or `--only times` does half of it
there, so that times can be taken when the machine is quiet.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from host import describe_host
from labelled_tasks import NotThere, Run, Task, tasks
from ort_peers import PEERS, quantize

import edgepass
from edgepass.errors import EdgepassError
from edgepass.speed import time_in_turns
from edgepass.targets.onnx_file import write_onnx
from edgepass.targets.onnxruntime import OrtRunner

FLOAT = "float"


@dataclasses.dataclass
class Row:
    """One candidate of a task. `error` where there is none, and why."""

    task: str
    name: str
    file: str = ""
    session: dict[str, str] = dataclasses.field(default_factory=dict)
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    file_bytes: int = 0
    small_weights: float = 0.0
    seconds: float = 0.0
    ms: float | None = None
    ratio: float | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    error: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    parser.add_argument("--recipes", nargs="*", default=["int8"])
    parser.add_argument("--peers", nargs="*", help="all of them, or those whose names contain this")
    parser.add_argument("--stories", type=Path, help="the folder of stories260k")
    parser.add_argument("--keep", type=Path, help="where models and scores are kept")
    parser.add_argument("--only", choices=("scores", "times"))
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing a candidate")
    parser.add_argument("--notes", action="store_true", help="what edgepass says of each model")
    options = parser.parse_args()
    print(f"{describe_host()}\n")
    peers = [] if options.peers is None else _matching(options.peers)
    makers = tasks(options.stories)
    unknown = [name for name in options.tasks if name not in makers]
    if unknown:
        parser.error(f"no task {unknown[0]!r}; there are {', '.join(makers)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        for name in options.tasks or makers:
            try:
                task = makers[name]()
            except NotThere as missing:
                print(f"{name}: left out, {missing}\n")
                continue
            rows = _rows(task, folder / name, options, peers)
            print(table(task, rows), flush=True)
            if options.notes:
                print("\n".join(f"- {r.name}: {note}" for r in rows for note in r.notes), "\n")


def _matching(parts: list[str]) -> list[str]:
    return [name for name in PEERS if not parts or any(part in name for part in parts)]


def _rows(task: Task, folder: Path, options: Any, peers: list[str]) -> list[Row]:
    folder.mkdir(parents=True, exist_ok=True)
    kept = _read(folder)
    wanted = [FLOAT, *options.recipes, *(f"ORT {peer}" for peer in peers)]
    if options.only != "times":
        for name in wanted:
            if name in kept and name.startswith(("ORT", FLOAT)) and not kept[name].error:
                continue  # what does not change with edgepass
            kept[name] = candidate(task, name, folder)
            _write(folder, kept.values())
    rows = [kept[name] for name in wanted if name in kept]
    if options.only != "scores":
        time_rows(task, rows, options.budget)
        _write(folder, kept.values())
    return rows


def candidate(task: Task, name: str, folder: Path) -> Row:
    """A model made, loaded and scored; or why not."""
    row = Row(task.name, name)
    out = folder / f"{name.replace(' ', '-').replace('{', '(').replace('}', ')')}.onnx"
    started = time.perf_counter()
    try:
        if name == FLOAT:
            out = task.model
        elif name.startswith("ORT "):
            quantize(name.removeprefix("ORT "), task.model, out, task.calibration)
        else:
            made = edgepass.compile(task.model, recipe=name, calibration=task.calibration)
            write_onnx(made.model, out)
            row.session = dict(made.session_options)
            row.notes = [*made.notes, *(n for line in made.ledger.rows for n in line.notes)]
        row.seconds = time.perf_counter() - started
        row.file = str(out)
        row.file_bytes = sum(
            file.stat().st_size for file in out.parent.glob(f"{out.name}*") if file.is_file()
        )
        row.small_weights = small_weights(out)
        row.scores = task.score(runner(row))
    except EdgepassError as error:
        row.error = " ".join(str(error).split())
    except Exception as error:  # a peer raises anything
        row.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return row


def runner(row: Row) -> Run:
    """A session of a candidate, one thread."""
    made = OrtRunner(Path(row.file), session_options=row.session)
    return made.run


def small_weights(path: Path) -> float:
    """The share of weights (elements of constants with two axes or more) in at most 8 bits.

    Subgraphs count. A block-quantized weight packs two or more elements in a byte: counted as
    twice its bytes.
    """
    import onnx

    small = total = 0
    for tensor in _constants(onnx.load(path).graph):
        count = 1
        for dim in tensor.dims:
            count *= dim
        if len(tensor.dims) < 2 or count < 64:
            continue
        kind = tensor.data_type
        if kind in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8):
            count *= 2 if len(tensor.dims) == 3 and kind == onnx.TensorProto.UINT8 else 1
            small += count
        elif kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
            small += count
        elif kind not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            continue
        total += count
    return small / total if total else 0.0


def _constants(graph: Any) -> Iterable[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield attribute.t
            if attribute.HasField("g"):
                yield from _constants(attribute.g)


def time_rows(task: Task, rows: list[Row], budget_s: float) -> None:
    """Times all candidates in turns; the first is the float model."""
    there = [row for row in rows if not row.error]
    sessions = [runner(row) for row in there]
    calls = [lambda run=run: run(task.timing) for run in sessions]
    for row, ms in zip(there, time_in_turns(calls, budget_s=budget_s), strict=True):
        row.ms = ms
    base = next((row.ms for row in there if row.name == FLOAT), None)
    for row in there:
        row.ratio = row.ms / base if base and row.ms else None


def table(task: Task, rows: list[Row]) -> str:
    """Markdown: a line a candidate, scores with their differences to float."""
    base = next((row.scores for row in rows if row.name == FLOAT), {})
    names = list(base)
    lines = [
        f"| {task.name} | {' | '.join(names)} | size, MB | in 8 bits | ms | time / float |",
        f"|---|{'---|' * (len(names) + 4)}",
    ]
    for row in rows:
        if row.error:
            lines.append(f"| {row.name} | {row.error[:240]} |{' |' * (len(names) + 3)}")
            continue
        cells = [_score(row.scores, base, name) for name in names]
        times = ["", ""] if row.ms is None else [f"{row.ms:.2f}", f"{row.ratio or 0:.2f}"]
        cells += [f"{row.file_bytes / 1e6:.2f}", f"{row.small_weights:.0%}", *times]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _score(scores: Mapping[str, float], base: Mapping[str, float], name: str) -> str:
    difference = scores[name] - base[name]
    return f"{scores[name]:.4f}" + (f" ({difference:+.4f})" if scores is not base else "")


def _read(folder: Path) -> dict[str, Row]:
    path = folder / "rows.json"
    if not path.exists():
        return {}
    rows = [Row(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    return {row.name: row for row in rows}


def _write(folder: Path, rows: Iterable[Row]) -> None:
    text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
    (folder / "rows.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
