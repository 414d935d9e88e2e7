"""Trained models with labelled data: what quantization is judged on.

    python benchmarks/labelled_tasks.py [--stories FOLDER] [TASK...]     # the float models' scores

Here: `Task` (a model's file, calibration samples, a score on test data, a feed to time), the table
of tasks, and the two small networks trained on scikit-learn's data. Audio tasks are in
`labelled_audio`, those of text in `labelled_text`, that of files in `labelled_files`.

Models and data come out of installed wheels (requirements-models.txt) or are made here from seeds;
stories260k is given by path. Calibration samples are never test data. Exported models and the list
of files that magika is judged on are kept in `$EDGEPASS_BENCHMARKS`, or else in
`~/.cache/edgepass/benchmarks`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np

Feed = Mapping[str, np.ndarray]
Run = Callable[[Feed], Mapping[str, np.ndarray]]
"""Runs a model once: feed by input name, outputs by output name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A trained model and how well it does.

    `model` is the float ONNX file, `score(run)` the metrics on the test data of any model with the
    same interface, by name; `better` says of each whether more is better. `timing` is the feed
    that is timed.
    """

    name: str
    model: Path
    calibration: Sequence[Feed]
    score: Callable[[Run], dict[str, float]]
    timing: Feed
    better: Mapping[str, int] = dataclasses.field(default_factory=dict)


class NotThere(Exception):  # noqa: N818 - it is a state, no error
    """A wheel or file that a task needs is missing; the message says which."""


def cache() -> Path:
    """The folder for exported models and lists of files."""
    home = os.environ.get("EDGEPASS_BENCHMARKS") or "~/.cache/edgepass/benchmarks"
    folder = Path(home).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def in_wheel(distribution: str, path: str) -> Path:
    """A file of an installed distribution, without importing it.

    Raises:
        NotThere: it is not installed.
    """
    try:
        found = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        raise NotThere(
            f"{distribution} is not installed: see requirements-models.txt, or the docstring"
        ) from None
    if not found.is_file():
        raise NotThere(f"this version of {distribution} has no {path}")
    return found


def session(model: Path) -> Run:
    """The float model in ONNX Runtime, one thread, default optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    made = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in made.get_outputs()]
    return lambda feed: dict(zip(names, made.run(names, dict(feed)), strict=True))


def export(module: Any, name: str, inputs: Sequence[Any], dynamic: Sequence[Any]) -> Path:
    """A torch module as an ONNX file of the cache, by torch's exporter with its optimizations."""
    import torch

    path = cache() / f"{name}-torch{torch.__version__.split('+')[0]}.onnx"
    if not path.exists():
        partial = path.with_suffix(".partial")
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs),
            dynamo=True,
            optimize=True,
            dynamic_shapes=tuple(dynamic),
            verbose=False,
        )
        program.save(partial)
        partial.rename(path)
    return path


# --- classifiers of scikit-learn's data ----------------------------------------------------------


def digits_cnn() -> Task:
    """8 x 8 digits: two convolutions and two linear layers; 719 test images."""
    from sklearn.datasets import load_digits
    from torch import nn

    data = load_digits()
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    images = (data.images[:, None] / 16).astype(np.float32)
    return _classifier("digits_cnn", network, images, data.target, epochs=12)


def breast_cancer_mlp() -> Task:
    """30 standardized measurements of a tumour: three linear layers; 228 test rows."""
    from sklearn.datasets import load_breast_cancer
    from torch import nn

    data = load_breast_cancer()
    network = nn.Sequential(
        nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    )
    rows = ((data.data - data.data.mean(0)) / data.data.std(0)).astype(np.float32)
    return _classifier("breast_cancer_mlp", network, rows, data.target, epochs=12)


def _classifier(name: str, network: Any, data: np.ndarray, labels: np.ndarray, epochs: int) -> Task:
    import torch

    order = np.random.default_rng(0).permutation(len(data))
    train, test = np.split(order, [round(0.6 * len(data))])
    # The weights above were drawn before the seed was set: draw them again.
    torch.manual_seed(0)
    for layer in network:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    _train(network, data[train], labels[train], epochs)
    model = export(network, name, [torch.from_numpy(data[:2])], [{0: torch.export.Dim("batch")}])
    given = _only_input(model)

    def score(run: Run) -> dict[str, float]:
        found = [next(iter(run({given: data[i : i + 1]}).values())).argmax() for i in test]
        return {"accuracy": float(np.mean(found == labels[test]))}

    return Task(
        name=name,
        model=model,
        calibration=[{given: data[i : i + 1]} for i in train[:100]],
        score=score,
        timing={given: data[test[:1]]},
    )


def _train(network: Any, data: np.ndarray, labels: np.ndarray, epochs: int) -> None:
    import torch

    torch.set_num_threads(1)
    inputs, targets = torch.from_numpy(data), torch.from_numpy(labels.astype(np.int64))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    network.train()
    for _ in range(epochs):
        for part in torch.randperm(len(inputs)).split(32):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(inputs[part]), targets[part])
            loss.backward()
            optimizer.step()
    network.eval()


def _only_input(model: Path) -> str:
    import onnx

    return str(onnx.load(model, load_external_data=False).graph.input[0].name)


# --- the table -----------------------------------------------------------------------------------


def tasks(stories: Path | None = None) -> dict[str, Callable[[], Task]]:
    """What makes each task, by name; `stories` is the folder of stories260k."""
    from labelled_audio import crepe_tiny, silero
    from labelled_files import magika
    from labelled_text import minilm, rapidocr_rec, stories260k

    return {
        "silero_vad": functools.partial(silero, "silero_vad"),
        "silero_vad_op18_ifless": functools.partial(silero, "silero_vad_op18_ifless"),
        "magika": magika,
        "minilm": minilm,
        "rapidocr_rec": rapidocr_rec,
        "crepe_tiny": crepe_tiny,
        "digits_cnn": digits_cnn,
        "breast_cancer_mlp": breast_cancer_mlp,
        "stories260k": functools.partial(stories260k, stories),
    }


def main() -> None:
    """Scores and calibration samples of the float models."""
    from host import describe_host

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    parser.add_argument("--stories", type=Path, help="the folder of stories260k")
    options = parser.parse_args()
    print(describe_host())
    makers = tasks(options.stories)
    for name in options.tasks or makers:
        try:
            task = makers[name]()
        except NotThere as missing:
            print(f"{name}: left out, {missing}")
            continue
        scores = task.score(session(task.model))
        text = ", ".join(f"{key} {value:.4f}" for key, value in scores.items())
        print(f"{name}: {text}; {len(task.calibration)} calibration samples", flush=True)


if __name__ == "__main__":
    main()
