"""How long estimates take: all recipes of a ResNet-50, and what-ifs on an imported one.

    python benchmarks/estimate_speed.py [MODEL.onnx]

Without a file, a ResNet-50 is built with torch on the meta device and exported (needs torch), its
batch a symbol. What-ifs are asked of one `Architecture` after its first estimate: each recipe, then
other threads, targets, batch sizes and a profile. Wall time; imports of modules are not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from host import describe_host

import edgepass

RECIPES = (
    *("fp32", "fp16", "bf16", "int8", "dynamic-int8"),
    *("int8-weights", "int4-weights", "prune50+int8"),
)
TARGETS = ("x86_64-avx512", "x86_64", "arm64")
LIMIT_MS = 100.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--repeat", type=int, default=3, help="the median of so many is given")
    options = parser.parse_args()
    print(describe_host())
    source = options.model if options.model is not None else exported()
    edgepass.estimate(source, TARGETS[0], RECIPES)  # imports what is imported when first needed
    spent = seconds(lambda: edgepass.estimate(source, TARGETS[0], RECIPES))
    print(f"{spent:.2f} s: {len(RECIPES)} recipes for one target, the import of the graph included")
    rows: dict[str, list[float]] = {}
    for _ in range(options.repeat):
        for label, ms in what_ifs(edgepass.Architecture(source)):
            rows.setdefault(label, []).append(ms)
    for label, found in rows.items():
        print(f"{statistics.median(found):7.1f} ms  {label}")
    worst = max(statistics.median(found) for found in rows.values())
    over = sum(statistics.median(found) > LIMIT_MS for found in rows.values())
    print(f"{len(rows)} what-ifs, slowest {worst:.0f} ms, {over} above {LIMIT_MS:.0f} ms")


def what_ifs(net: edgepass.Architecture) -> list[tuple[str, float]]:
    """Label and milliseconds of questions to one architecture after a first."""
    net.estimate(TARGETS[0], ["fp32"])
    asked: list[tuple[str, tuple[str, str], dict[str, Any]]] = [
        (f"recipe {name}", (TARGETS[0], name), {}) for name in RECIPES[1:]
    ]
    asked += [(f"2 threads, {name}", (TARGETS[0], name), {"threads": 2}) for name in RECIPES]
    asked += [(f"{t}, {n}", (t, n), {}) for t in TARGETS[1:] for n in RECIPES]
    if any(not isinstance(d, int) for v in net.graph.graph.inputs for d in v.shape or ()):
        symbol = next(
            d.value for v in net.graph.graph.inputs for d in v.shape or () if not isinstance(d, int)
        )
        asked += [
            (f"{symbol}={size}, {name}", (TARGETS[0], name), {"dims": {symbol: size}})
            for size in (4, 8)
            for name in ("fp32", "int8", "int4-weights")
        ]
    return [
        (label, 1e3 * seconds(lambda w=where, m=more: net.estimate(w[0], [w[1]], **m)))
        for label, where, more in asked
    ]


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def exported() -> Any:
    """The graph of a ResNet-50, weights absent."""
    import torch
    from own_nets import resnet50

    from edgepass.frontends import load_model

    with torch.device("meta"):
        net = resnet50().eval()
        image = torch.empty(2, 3, 224, 224)
    batch = torch.export.Dim("batch", min=1, max=64)
    return load_model(
        net, example_inputs=(image,), dynamic_shapes=({0: batch},), weights_required=False
    )


if __name__ == "__main__":
    main()
