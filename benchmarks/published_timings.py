"""Latency fitted to published whole-model timings, and its error on families never seen.

    python benchmarks/published_timings.py --table TIMINGS.csv --zoo FOLDER --device NAME
        [--write PROFILE.json] [--ten-models 20 --prior PROFILE.json]

The table has columns base, img_size (or infer_img_size), latency_ms, family and, for several
devices, device; architectures are FOLDER/BASE@SIZE.onnx, without weights, taken as they are. Every
model is predicted by a fit that left its family out. `--ten-models N`: instead, N draws of ten
models to fit on, starting from the prior, and all others to predict.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import pickle
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from host import describe_host

import edgepass
from edgepass.cost.features import Features
from edgepass.cost.profile import Profile, load_profile
from edgepass.cost.timings import TimedModel, fit_timings, hold_out
from edgepass.timing_tables import fit_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--device", default="", help="a part of the device's name in the table")
    parser.add_argument("--name", default="fitted", help="the profile's name")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--target", default="arm64", help="whose kernels are priced")
    parser.add_argument("--note", action="append", default=[], help="said in the profile")
    parser.add_argument("--write", type=Path, help="save the profile fitted on all models")
    parser.add_argument("--ten-models", type=int, default=0, metavar="DRAWS")
    parser.add_argument("--prior", type=Path)
    parser.add_argument("--cache", type=Path, help="keep the architectures' kernels in this file")
    options = parser.parse_args()
    print(describe_host())
    samples, device = _samples(options)
    families = len({sample.family for sample in samples})
    print(f"{device}: {len(samples)} models of {families} families, from {options.table.name}")
    truth = np.array([sample.ms for sample in samples])
    prior = load_profile(options.prior) if options.prior else None
    if options.ten_models:
        _ten_models(samples, prior, options)
        return
    predicted = hold_out(samples, prior)
    print(f"left-out families: {figures(predicted, truth)}")
    if options.write:
        profile = fit_timings(
            samples,
            name=options.name,
            device=device,
            runtime=options.runtime,
            target=options.target,
            source=f"{len(samples)} published timings of classifiers, threads not stated",
            prior=prior,
        )
        profile = dataclasses.replace(profile, notes=(*profile.notes, *options.note))
        seen = [profile.predict(sample.kernels).ms for sample in samples]
        print(f"models it was fitted on: {figures(np.array(seen), truth)}")
        proof = profile.settings[0].held_out[""]
        print(f"saved {profile.save(options.write)}: {proof}")
        print(f"80 % intervals, of other families, contain {proof.coverage:.1%}")


def figures(predicted: np.ndarray, truth: np.ndarray) -> str:
    """Median absolute error, and the shares within 10 and 20 %."""
    error = np.abs(predicted / truth - 1)
    return (
        f"median error {np.median(error):.2%}, within 10 %: {(error <= 0.1).mean():.1%}, "
        f"within 20 %: {(error <= 0.2).mean():.1%}"
    )


def _ten_models(
    samples: Sequence[TimedModel], prior: Profile | None, options: argparse.Namespace
) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(options.ten_models):
        drawn = set(rng.choice(len(samples), 10, replace=False).tolist())
        facts = {"name": "ten models", "device": "", "runtime": options.runtime}
        profile = fit_models([samples[i] for i in sorted(drawn)], prior, facts)
        others = [sample for i, sample in enumerate(samples) if i not in drawn]
        predicted = np.array([profile.predict(sample.kernels).ms for sample in others])
        error = np.abs(predicted / np.array([sample.ms for sample in others]) - 1)
        rows.append((np.median(error), (error <= 0.1).mean(), (error <= 0.2).mean()))
    median, ten, twenty = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"ten models, median of {len(rows)} draws: median error {median:.2%}, within 10 %: "
        f"{ten:.1%}, within 20 %: {twenty:.1%}"
    )


def _samples(options: argparse.Namespace) -> tuple[list[TimedModel], str]:
    timed: dict[str, list[tuple[float, str]]] = {}
    device = options.table.stem
    with options.table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            named = row.get("device") or row.get("hw") or ""
            if options.device not in named:
                continue
            device = named
            model = f"{row['base']}@{row.get('img_size') or row['infer_img_size']}"
            timed.setdefault(model, []).append((float(row["latency_ms"]), row["family"]))
    cached: dict[str, list[Features]] = {}
    if options.cache and options.cache.is_file():
        cached = pickle.loads(options.cache.read_bytes())
    samples = []
    for model, found in sorted(timed.items()):
        path = options.zoo / f"{model}.onnx"
        if not path.is_file():
            continue
        if model not in cached:
            cached[model] = [
                _plain(f) for f in edgepass.Architecture(path).launches(options.target)
            ]
        ms = statistics.median(value for value, _ in found)
        samples.append(TimedModel(model, cached[model], ms, found[0][1]))
    if options.cache:
        options.cache.write_bytes(pickle.dumps(cached))
    return samples, device


def _plain(features: Features) -> Features:
    return Features(
        features.family,
        features.type,
        features.dtype,
        dict(features.amounts),
        dict(features.coordinates),
    )


if __name__ == "__main__":
    main()
