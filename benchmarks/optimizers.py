"""Nodes, wall time and memory of edgepass's optimizer and its peers, model by model.

    python benchmarks/optimizers.py MODEL.onnx [...] [--trained] [--tools edgepass,onnxslim]
        [--cache rows.jsonl] [--target host]

Peers: onnxsim, onnxslim, onnxscript.optimizer, and ONNX Runtime at BASIC and EXTENDED (one thread
each, default options, functions inlined first). Every tool gets the same file, in a process of its
own that times load, optimization and save, imports excluded. Nodes are those of all graphs,
Constant nodes not counted. Memory is the peak resident size of the process less what it was after
the imports. Absent weights are filled with random numbers. `--cache` keeps rows and skips
what is there already; `--trained` adds the models that the tests use.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PEERS = ("onnxsim", "onnxslim", "onnxscript", "ort_basic", "ort_extended")
TOOLS = (*PEERS, "edgepass")
TIMEOUT_S = 600


@dataclasses.dataclass(frozen=True)
class Row:
    """What one tool made of one model. Memory in bytes; `error` where it failed.

    `equality` is edgepass's own check against the source, as `Equality.as_dict` gives it.
    """

    model: str
    tool: str
    nodes: int = -1
    seconds: float = 0.0
    memory: int = 0
    weights: int = 0
    error: str = ""
    equality: dict[str, Any] = dataclasses.field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--target", default="host")
    parser.add_argument("--child", nargs=3, metavar=("TOOL", "IN", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_measure(*arguments.child, target=arguments.target)))
        return
    from host import describe_host

    print(describe_host())
    tools = arguments.tools.split(",")
    rows = _cached(arguments.cache)
    for name, source in _models(arguments.models, trained=arguments.trained):
        missing = [tool for tool in tools if (name, tool) not in rows]
        if missing:
            with tempfile.TemporaryDirectory(prefix="edgepass-optimizers-") as folder:
                try:
                    path, count, weights = _prepare(source, Path(folder))
                except Exception as error:
                    print(f"{name}: {error}", flush=True)
                    continue
                rows[name, "raw"] = Row(name, "raw", count, weights=weights)
                for tool in missing:
                    rows[name, tool] = _run(name, tool, path, weights, arguments.target)
                    _keep(arguments.cache, rows[name, tool])
                _keep(arguments.cache, rows[name, "raw"])
        print(_line(name, rows, tools), flush=True)
    _summary(rows, tools)


# --- one tool on one model, in a process of its own ---------------------------------------------


def _measure(tool: str, source: str, result: str, *, target: str) -> dict[str, Any]:
    call = _tool(tool, target)
    base = _resident()
    peak = [base]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    found = call(source, result)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    row = {"nodes": _count(result), "seconds": seconds, "memory": peak[0] - base}
    if tool == "edgepass":
        row["equality"] = found.equality.as_dict()
    return row


def _resident() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _count(path: str) -> int:
    import onnx

    def inside(graph: Any) -> int:
        total = 0
        for node in graph.node:
            total += node.op_type != "Constant"
            for attribute in node.attribute:
                graphs = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
                total += sum(inside(inner) for inner in graphs)
        return total

    return inside(onnx.load(path, load_external_data=False).graph)


def _tool(name: str, target: str) -> Any:
    """The call (source, result) of a tool, everything that it needs imported."""
    if name == "edgepass":
        import onnxruntime  # noqa: F401 - imported before the clock starts, as for the peers

        import edgepass
        import edgepass.api

        return lambda a, b: edgepass.optimize(a, target, b)
    if name == "onnxslim":
        import onnxslim

        return lambda a, b: onnxslim.slim(a, b)
    if name == "onnxsim":
        import onnx
        import onnxsim

        def simplify(a: str, b: str) -> None:
            model, _ = onnxsim.simplify(onnx.load(a))
            onnx.save(model, b)

        return simplify
    if name == "onnxscript":
        import onnx
        import onnxscript.optimizer

        return lambda a, b: onnx.save(onnxscript.optimizer.optimize(onnx.load(a)), b)
    import onnxruntime as ort

    def session(a: str, b: str) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(
            ort.GraphOptimizationLevel, f"ORT_ENABLE_{name.removeprefix('ort_').upper()}"
        )
        options.optimized_model_filepath = b
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        ort.InferenceSession(a, options, providers=["CPUExecutionProvider"])

    return session


def _run(name: str, tool: str, path: Path, weights: int, target: str) -> Row:
    out = path.with_name(f"{tool}.onnx")
    command = [sys.executable, __file__, "--target", target, "--child", tool, str(path), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return Row(name, tool, weights=weights, error=f"over {TIMEOUT_S} s")
    finally:
        out.unlink(missing_ok=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Row(name, tool, weights=weights, error=lines[-1][:300])
    return Row(name, tool, weights=weights, **json.loads(done.stdout.strip().splitlines()[-1]))


# --- models -------------------------------------------------------------------------------------


def _models(paths: Iterable[Path], *, trained: bool) -> Iterator[tuple[str, Any]]:
    for path in paths:
        yield f"{path.parent.name}/{path.stem}", path
    if trained:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
        from real_models import LOADERS, NotInstalled, graph_source

        for name in LOADERS:
            try:
                yield f"trained/{name}", graph_source(name)
            except NotInstalled as error:
                print(f"{name}: {error}")


def _prepare(source: Any, folder: Path) -> tuple[Path, int, int]:
    """The file that every tool gets, its nodes and the bytes of its weights."""
    import onnx_ir as ir
    from random_weights import with_random_weights

    model = with_random_weights(source) if isinstance(source, Path) else source
    if model.functions:
        import onnx_ir.passes.common as common

        common.InlinePass()(model)
    path = folder / "model.onnx"
    ir.save(model, path)
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    return path, _count(str(path)), weights


# --- the table ----------------------------------------------------------------------------------


def _cached(path: Path | None) -> dict[tuple[str, str], Row]:
    if path is None or not path.exists():
        return {}
    rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()]
    return {(row.model, row.tool): row for row in rows}


def _keep(path: Path | None, row: Row) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def _line(name: str, rows: dict[tuple[str, str], Row], tools: Iterable[str]) -> str:
    cells = []
    for tool in ("raw", *tools):
        row = rows.get((name, tool))
        if row is None:
            continue
        text = f"{row.nodes}" if not row.error else "failed"
        cells.append(f"{tool} {text}" + (f" ({row.seconds:.1f}s)" if row.seconds else ""))
    best = _best_peer(name, rows)
    ours = rows.get((name, "edgepass"))
    more = ours is not None and best is not None and (ours.error or ours.nodes > best)
    return f"{name:48} {'  '.join(cells)}{'   <-- MORE NODES' if more else ''}"


def _best_peer(name: str, rows: dict[tuple[str, str], Row]) -> int | None:
    counts = [
        rows[name, peer].nodes
        for peer in PEERS
        if (name, peer) in rows and not rows[name, peer].error
    ]
    return min(counts, default=None)


def _summary(rows: dict[tuple[str, str], Row], tools: Iterable[str]) -> None:
    names = sorted({name for name, tool in rows if tool == "edgepass"})
    if not names or "edgepass" not in tools:
        return
    ours = {name: rows[name, "edgepass"] for name in names}
    failed = [name for name in names if ours[name].error]
    compared = [(n, best) for n in names if (best := _best_peer(n, rows)) is not None]
    fewer = sum(ours[n].nodes < best and not ours[n].error for n, best in compared)
    more = [n for n, best in compared if ours[n].nodes > best or ours[n].error]
    print(f"\n{len(names)} models, {len(failed)} failed {failed or ''}")
    print(f"nodes: fewer than every peer on {fewer}, as few on {len(compared) - fewer - len(more)}")
    print(f"       more than the best peer on {len(more)}: {', '.join(more) or 'none'}")
    for peer in PEERS:
        pairs = [
            (ours[n].seconds / rows[n, peer].seconds, n)
            for n in names
            if (n, peer) in rows
            and not rows[n, peer].error
            and not ours[n].error
            and rows[n, "raw"].nodes > 200
        ]
        if pairs:
            middle = statistics.median(ratio for ratio, _ in pairs)
            worst = max(pairs)
            print(
                f"time:  {middle:.2f}x of {peer} in the median of {len(pairs)} models over 200 "
                f"nodes, at most {worst[0]:.2f}x ({worst[1]})"
            )
    errors = [
        (e, n, ours[n].equality)
        for n in names
        if (e := ours[n].equality.get("error", math.inf)) is not None
    ]
    over = [(n, e, q.get("own_error")) for e, n, q in errors if e > 1e-5]
    print(f"equal to the source to 1e-5 of the output's range: {len(errors) - len(over)}")
    for name, error, own in over:
        print(f"       {name}: {error:.1e}; the runtime's own optimizations: {own}")
    heavy = [(ours[n].memory / ours[n].weights, n) for n in names if ours[n].weights > 20e6]
    if heavy:
        middle, worst = statistics.median(r for r, _ in heavy), max(heavy)
        print(
            f"memory: {middle:.2f}x the weights in the median of {len(heavy)} models over 20 MB, "
            f"at most {worst[0]:.2f}x ({worst[1]})"
        )


if __name__ == "__main__":
    main()
