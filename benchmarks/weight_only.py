"""Perplexity and file size of a language model under weight-only recipes.

    python benchmarks/weight_only.py MODEL.onnx TOKENS.npz [--recipes ...] [--samples 24]

MODEL takes token ids int64 [1, L] and gives logits [1, L, V]; TOKENS holds `tokens` int64 [n, L],
padded with -1. Perplexity is exp(mean negative log-likelihood of tokens 1.. given those before) of
all rows together. Calibration text is sampled from the model itself, never taken from TOKENS.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from host import describe_host

import edgepass
from edgepass.errors import EdgepassError
from edgepass.frontends import load_supported
from edgepass.measuring import apply_recipe, saved_bytes
from edgepass.passes.base import Context
from edgepass.targets.onnxruntime import OrtRunner

RECIPES = (
    "fp32",
    "int8-weights",
    "weight_only{bits=4,block=32,method=minmax}",
    "int4-weights",
    "weight_only{bits=4,block=32,zero_points=true}",
    "weight_only{bits=4,block=32,method=hqq}",
    "weight_only{bits=4,block=32,method=awq}",
    "weight_only{bits=4,block=32,method=gptq}",
    "weight_only{bits=4,block=32,method=gptq,act_order=true}",
    "weight_only{bits=4,block=32,method=gptq,sequential=true}",
    "weight_only{bits=4,block=32,method=awq-gptq}",
    "weight_only{bits=4,block=16,method=gptq}",
    "weight_only{bits=4,block=32,method=gptq,tables=4}",
    "weight_only{bits=3,block=32,method=gptq}",
    "weight_only{bits=3,block=32,method=awq-gptq}",
    "weight_only{bits=2,block=16,method=awq-gptq}",
    "weight_only{average_bits=5,method=gptq}",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--target", default="host")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(describe_host())
    rows = [row[row >= 0] for row in np.load(options.tokens)["tokens"]]
    model = load_supported(options.model)
    calibration = generated(model, rows[0][0], options.samples, options.length, options.seed)
    print(f"{len(calibration)} texts of {options.length} tokens sampled from the model")
    context = Context(edgepass.get_target(options.target), calibration)
    for recipe in options.recipes:
        start = time.perf_counter()
        try:
            changed = apply_recipe(model.clone(), recipe, context)
        except EdgepassError as error:
            print(f"{recipe:58} {error.diagnostic.what}", flush=True)
            continue
        seconds = time.perf_counter() - start
        size = saved_bytes(changed)
        found = perplexity(changed, rows)
        print(
            f"{recipe:58} perplexity {found:8.4f}  {size / 1e3:8.1f} kB  {seconds:5.1f} s",
            flush=True,
        )


def perplexity(model: ir.Model, rows: Sequence[np.ndarray]) -> float:
    """exp of the mean over every token but each row's first."""
    name = model.graph.inputs[0].name or ""
    found = []
    with OrtRunner(model, threads=1) as runner:
        for row in rows:
            logits = next(iter(runner.run({name: row[None]}).values()))[0, :-1].astype(np.float64)
            top = logits.max(axis=-1, keepdims=True)
            total = top[:, 0] + np.log(np.exp(logits - top).sum(axis=-1))
            found.append(total - logits[np.arange(len(logits)), row[1:]])
    return float(np.exp(np.concatenate(found).mean()))


def generated(
    model: ir.Model, first: int, samples: int, length: int, seed: int
) -> list[Mapping[str, np.ndarray]]:
    """Texts that the model writes itself, each token drawn from its probabilities."""
    rng = np.random.default_rng(seed)
    name = model.graph.inputs[0].name or ""
    texts: list[Mapping[str, np.ndarray]] = []
    with OrtRunner(model, threads=1) as runner:
        for _ in range(samples):
            ids = np.array([[first]], np.int64)
            while ids.shape[1] < length:
                logits = next(iter(runner.run({name: ids}).values()))[0, -1].astype(np.float64)
                chances = np.exp(logits - logits.max())
                token = rng.choice(len(chances), p=chances / chances.sum())
                ids = np.concatenate([ids, [[token]]], axis=1)
            texts.append({name: ids})
    return texts


if __name__ == "__main__":
    main()
