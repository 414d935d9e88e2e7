"""Running time of optimized models against their sources, in ONNX Runtime on this machine.

    python benchmarks/runtime_speed.py MODEL.onnx [...] [--trained] [--budget 4] [--threads 1]
        [--target host] [--rounds 7]

Both are run as a user would: a session with all of the runtime's own optimizations on, the source
untouched, the result as `edgepass.optimize` writes it. Runs of the two alternate in one process, in
rounds of several runs each. The ratio (result / source; below 1 is faster) is that of the least
times; in brackets stands the median of the ratios of the rounds, which a busy machine moves less.
Absent weights are filled with random numbers, inputs are random. A transformer is a model whose
result has an attention operator, or Softmax and a layer or RMS norm. Model files that are not
there are an error; a model that a step refuses is listed with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from host import describe_host
from random_weights import with_random_weights

import edgepass
from edgepass.errors import EdgepassError
from edgepass.frontends import load_model
from edgepass.ir.graph import all_nodes, node_count
from edgepass.passes.probe import working_sample

_ATTENTION = {"Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention"}
_NORMS = {
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}


@dataclasses.dataclass(frozen=True)
class Timing:
    """One model: seconds of the source and of the result, least and by round."""

    name: str
    source: float
    result: float
    rounds: tuple[float, ...]
    nodes: tuple[int, int]
    is_transformer: bool

    @property
    def ratio(self) -> float:
        """Least time of the result over that of the source."""
        return self.result / self.source

    @property
    def typical(self) -> float:
        """The median over rounds of the ratio of their least times."""
        return statistics.median(self.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--trained", action="store_true", help="the models that the tests use, too")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of running a model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", default="host")
    arguments = parser.parse_args()
    print(describe_host())
    print(f"{arguments.threads} thread(s), {arguments.budget:g} s a model\n")
    timings = []
    for name, source in _models(arguments.models, trained=arguments.trained):
        try:
            timing = _time(name, source, arguments)
        except (EdgepassError, RuntimeError, ValueError) as error:
            print(f"{name:44} not measured: {str(error).splitlines()[0]}", flush=True)
            continue
        timings.append(timing)
        print(_line(timing), flush=True)
    _summary(timings)


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


def _time(name: str, source: Any, arguments: argparse.Namespace) -> Timing:
    with tempfile.TemporaryDirectory(prefix="edgepass-speed-") as folder:
        before, after = Path(folder) / "source.onnx", Path(folder) / "result.onnx"
        model = with_random_weights(source) if isinstance(source, Path) else load_model(source)
        ir.save(model, before)
        sample = working_sample(model)
        if not sample.runs:
            raise ValueError("no inputs that the source runs on were found")
        feed = {key: np.asarray(value) for key, value in sample.feed.items()}
        edgepass.optimize(before, arguments.target).save_onnx(after)
        sessions = [_session(path, arguments.threads) for path in (before, after)]
        result = ir.load(after)
        least, rounds = _alternate(sessions, feed, arguments.budget, arguments.rounds)
    return Timing(
        name=name,
        source=least[0],
        result=least[1],
        rounds=tuple(rounds),
        nodes=(node_count(model), node_count(result)),
        is_transformer=_is_transformer(result),
    )


def _session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _alternate(
    sessions: Sequence[ort.InferenceSession],
    feed: Mapping[str, np.ndarray],
    budget: float,
    rounds: int,
) -> tuple[list[float], list[float]]:
    """Least seconds of each session, and the ratio of the second to the first in each round.

    Single runs alternate and change places, so that neither always follows the other's caches.
    """
    least = [_run(session, feed) for session in sessions]  # the first run allocates
    least = [min(a, _run(s, feed)) for a, s in zip(least, sessions, strict=True)]
    runs = max(2, int(budget / rounds / sum(least)))
    ratios = []
    for _ in range(rounds):
        best = [math.inf, math.inf]
        for i in range(runs):
            for which in (0, 1) if i % 2 else (1, 0):
                best[which] = min(best[which], _run(sessions[which], feed))
        ratios.append(best[1] / best[0])
        least = [min(a, b) for a, b in zip(least, best, strict=True)]
    return least, ratios


def _run(session: ort.InferenceSession, feed: Mapping[str, np.ndarray]) -> float:
    started = time.perf_counter()
    session.run(None, feed)
    return time.perf_counter() - started


def _is_transformer(model: ir.Model) -> bool:
    kinds = {node.op_type for node in all_nodes(model)}
    return bool(kinds & _ATTENTION) or ("Softmax" in kinds and bool(kinds & _NORMS))


def _line(timing: Timing) -> str:
    slower = "   <-- SLOWER" if min(timing.ratio, timing.typical) > 1.02 else ""
    kind = "transformer" if timing.is_transformer else ""
    return (
        f"{timing.name:44} {timing.nodes[0]:5} -> {timing.nodes[1]:4} nodes "
        f"{timing.source * 1e3:9.3f} -> {timing.result * 1e3:9.3f} ms  "
        f"{timing.ratio:.3f} ({timing.typical:.3f}) {kind}{slower}"
    )


def _summary(timings: Sequence[Timing]) -> None:
    if not timings:
        print("nothing was measured")
        return
    groups = {
        "all models": list(timings),
        "transformers": [t for t in timings if t.is_transformer],
        "other models": [t for t in timings if not t.is_transformer],
    }
    print()
    for name, group in groups.items():
        if not group:
            continue
        mean = statistics.geometric_mean(1 / t.ratio for t in group)
        typical = statistics.geometric_mean(1 / t.typical for t in group)
        worst = max(group, key=lambda t: min(t.ratio, t.typical))
        print(
            f"{name} ({len(group)}): {mean:.3f}x as fast ({typical:.3f}x by rounds) in the "
            f"geometric mean; worst {worst.ratio:.3f} ({worst.typical:.3f}), {worst.name}"
        )


if __name__ == "__main__":
    main()
