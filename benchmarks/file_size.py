"""Bytes predicted without weights against the files that edgepass then writes, for every recipe.

    python benchmarks/file_size.py [--recipes ...] MODEL.onnx ...

The prediction is `edgepass.estimate` of the architecture, weights absent; the truth is the same
recipe applied to the model (absent weights random, calibration one random sample) and saved.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from host import describe_host

import edgepass
from edgepass.errors import EdgepassError
from edgepass.ir.random_weights import fill_random_weights
from edgepass.measuring import apply_recipe, saved_bytes
from edgepass.passes.base import Context
from edgepass.passes.probe import working_sample

RECIPES = (
    "fp32,fp16,bf16,int8,dynamic-int8,int8-weights,int4-weights,prune50+int8,"
    "int4-gptq,int3-weights,palette4,fp8-weights"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--recipes", default=RECIPES)
    parser.add_argument("--target", default="x86_64-avx512")
    options = parser.parse_args()
    print(describe_host())
    recipes = options.recipes.split(",")
    errors: dict[str, list[float]] = {recipe: [] for recipe in recipes}
    for path in options.models:
        try:
            line = _compare(path, options.target, recipes, errors)
        except EdgepassError as error:
            line = f"not run: {error.diagnostic.what}"
        print(f"{path.stem[:40]:40} {line}", flush=True)
    for recipe, found in errors.items():
        if found:
            within = sum(error <= 0.01 for error in found)
            print(
                f"{recipe:14} median error {statistics.median(found):.4%}, largest "
                f"{max(found):.3%}, within 1 %: {within} of {len(found)} models"
            )


def _compare(path: Path, target: str, recipes: list[str], errors: dict[str, list[float]]) -> str:
    net = edgepass.Architecture(path)
    predicted = net.estimate(target, recipes)
    model = net.graph.clone()
    fill_random_weights(model)
    sample = working_sample(model)
    context = Context(edgepass.get_target(target), [sample.feed], sample.dims)
    cells = []
    for recipe in recipes:
        if recipe in predicted.failed:
            cells.append(f"{recipe} refused")
            continue
        try:
            saved = saved_bytes(apply_recipe(model, recipe, context))
        except EdgepassError as error:
            cells.append(f"{recipe} not applied ({error.diagnostic.what})")
            continue
        error = predicted[recipe].file_bytes / saved - 1
        errors[recipe].append(abs(error))
        cells.append(f"{recipe} {error:+.3%}")
    return "  ".join(cells)


if __name__ == "__main__":
    main()
