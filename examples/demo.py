"""What edgepass is for, in a minute: will it fit, make it fit, is it still right.

Run by `make demo`. Real data, true labels; arm64 is run where the emulated machine is there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from digits import DigitsNet, build, data, train
from rich.console import Console

import edgepass
from edgepass.errors import MissingDependencyError
from edgepass.targets.emulator import EmulatedJob, find_emulator

console = Console()


def main() -> None:
    console.rule("1. Will it fit? An architecture without weights")
    with torch.device("meta"):
        wide = DigitsNet(width=256)
    estimate = edgepass.estimate(
        wide,
        target="arm64",
        recipes=["fp32", "fp16", "int8"],
        input_shapes={"image": "1x1x8x8"},
    )
    console.print(estimate.table())

    console.rule("2. Make it fit: a trained model, int8 for arm64")
    net = train()
    training, test, _, labels = data()
    example = build()[1]
    float32 = edgepass.compile(net, target="arm64", example_inputs=example)
    int8 = edgepass.compile(
        net,
        target="arm64",
        recipe="int8",
        example_inputs=example,
        calibration=[{"image": image[None]} for image in training[:200]],
    )
    console.print(int8.ledger.table())
    console.print(int8.placement.table())

    console.rule(f"3. Is it still right? {len(labels)} held-out images, true labels")
    folder = Path(tempfile.mkdtemp(prefix="edgepass-demo-"))
    artifacts = {
        name: edgepass.load(compiled.save(folder / name))
        for name, compiled in (("float32", float32), ("int8", int8))
    }
    samples = [{"image": image[None]} for image in test]
    result = edgepass.evaluate(
        net,
        artifacts,
        samples,
        labels,
        slices={"digit": lambda feed, label: label},
        limits={"accuracy": -0.01, "harmed_slices": "<= 0"},
    )
    console.print(result.table())
    for name, rung in ((rung.name, rung) for rung in result.rungs[1:]):
        size = sum(file.stat().st_size for file in (folder / name).glob("model.*"))
        accuracy = rung.metrics["accuracy"].value.value
        console.print(f"host      {name:8} {size:9,} bytes  accuracy {accuracy:.4f}")
    emulated(folder, test, labels)
    console.print(f"\nArtifacts are in {folder}; try: edgepass run {folder}/int8 --emulate arm64")


def emulated(folder: Path, test: np.ndarray, labels: np.ndarray) -> None:
    """The same artifacts on the emulated arm64 machine, where it is set up."""
    try:
        machine = find_emulator("arm64")
    except MissingDependencyError as error:
        console.print(f"arm64     not run: {error.diagnostic.what}. {error.diagnostic.fix}")
        return
    feeds = [{"image": image[None]} for image in test]
    jobs = [
        EmulatedJob(
            name=name,
            model=folder / name / "model.onnx",
            feeds=feeds,
            session_config=dict(edgepass.load(folder / name).manifest["session_options"]),
        )
        for name in ("float32", "int8")
    ]
    for result in machine.run_jobs(jobs):
        outputs = [next(iter(step.values())) for step in result.outputs]
        share = float(np.mean([np.argmax(o) == y for o, y in zip(outputs, labels, strict=True)]))
        console.print(f"emulated  {result.job.name:8} arm64            accuracy {share:.4f}")


if __name__ == "__main__":
    main()
