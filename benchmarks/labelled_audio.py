"""Labelled audio: voice activity (silero-vad) and pitch (CREPE).

Here: the sample that ships in pyannote-audio with its reference, longer recordings made of it,
synthetic tones, and their scores. Not here: the table of tasks (`labelled_tasks`).
"""

from __future__ import annotations

import wave

import numpy as np
from labelled_tasks import Feed, Run, Task, export, in_wheel, session

from real_models import speech, wheel

F32 = np.float32
RATE = 16000
CHUNK, CONTEXT = 512, 64
"""Samples that silero-vad takes at a time, and those of the chunk before that go in front."""


# --- voice activity ------------------------------------------------------------------------------


def silero(variant: str) -> Task:
    """Area under the ROC curve of a chunk's probability, on 30 s and on 4 minutes made of them.

    A chunk is speech where the reference has a speaker at its middle. Calibrated on synthetic
    speech, noise and tones at several levels, with the states that the float model has there.
    """
    model = wheel("silero_vad", "data", f"{variant}.onnx")
    audio, spoken = labelled_speech()
    longer, longer_spoken = longer_speech(audio, spoken)

    def score(run: Run) -> dict[str, float]:
        return {
            "auc": _auc_of(run, audio, spoken),
            "auc_longer": _auc_of(run, longer, longer_spoken),
        }

    calibration = silero_feeds(session(model), calibration_audio())
    return Task(
        name=variant,
        model=model,
        calibration=calibration[::4],
        score=score,
        timing=calibration[100],
        better={"auc": 1, "auc_longer": 1},
    )


def labelled_speech() -> tuple[np.ndarray, np.ndarray]:
    """pyannote-audio's sample, 30 s at 16 kHz, and for each sample whether someone speaks."""
    path = in_wheel("pyannote-audio", "pyannote/audio/sample/sample.wav")
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        audio = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(F32) / 32768
    spoken = np.zeros(len(audio), bool)
    for line in path.with_suffix(".rttm").read_text(encoding="utf-8").splitlines():
        start, length = (float(x) for x in line.split()[3:5])
        spoken[round(start * RATE) : round((start + length) * RATE)] = True
    return audio, spoken


def longer_speech(audio: np.ndarray, spoken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Four minutes: pieces of 3 to 10 s, at other speeds and levels, in noise, with pauses."""
    rng = np.random.default_rng(1)
    quiet = audio[: round(6.5 * RATE)]
    pieces, labels, length = [], [], 0
    while length < 240 * RATE:
        size = int(rng.uniform(3, 10) * RATE)
        start = int(rng.integers(0, len(audio) - size))
        speed = rng.uniform(0.9, 1.1)
        at = np.arange(0, size - 1, speed)
        piece = np.interp(at, np.arange(size), audio[start : start + size])
        label = spoken[start : start + size][at.astype(int)]
        pause = int(rng.uniform(0.2, 2.0) * RATE)
        offset = int(rng.integers(0, len(quiet) - pause))
        piece = np.concatenate([piece, quiet[offset : offset + pause]])
        piece = piece * 10 ** rng.uniform(-1.0, 0.3)
        noise = rng.standard_normal(len(piece))
        if rng.random() < 0.5:  # brown-ish
            noise = np.convolve(noise, np.ones(16) / 4, mode="same")
        level = np.sqrt(np.mean(piece**2)) * 10 ** (-rng.uniform(12, 35) / 20)
        pieces.append(np.clip(piece + level * noise, -1, 1))
        labels.append(np.concatenate([label, np.zeros(pause, bool)]))
        length += len(piece)
    return np.concatenate(pieces).astype(F32), np.concatenate(labels)


def calibration_audio() -> np.ndarray:
    """40 s that are no test data: synthetic speech at several pitches and levels, noise, tones."""
    rng = np.random.default_rng(2)
    base = speech(8.0)
    parts = []
    for speed, gain in ((0.8, 0.1), (1.0, 1.0), (1.25, 0.3), (1.6, 0.8)):
        at = np.arange(0, len(base) - 1, speed)
        part = gain * np.interp(at, np.arange(len(base)), base)
        parts.append(part + gain * 10 ** rng.uniform(-3, -1) * rng.standard_normal(len(part)))
    time = np.arange(2 * RATE) / RATE
    parts.append(0.2 * rng.standard_normal(2 * RATE))
    parts.append(0.3 * np.sin(2 * np.pi * (200 + 400 * time) * time))
    parts.append(0.001 * rng.standard_normal(2 * RATE))
    return np.clip(np.concatenate(parts), -1, 1).astype(F32)


def silero_feeds(run: Run, audio: np.ndarray) -> list[Feed]:
    """One feed a chunk, each with the state that `run` left."""
    feeds: list[Feed] = []
    state = np.zeros((2, 1, 128), F32)
    padded = np.concatenate([np.zeros(CONTEXT, F32), audio])
    for i in range(len(audio) // CHUNK):
        chunk = padded[None, i * CHUNK : (i + 1) * CHUNK + CONTEXT]
        feed = {"input": chunk, "state": state, "sr": np.array(RATE, np.int64)}
        feeds.append(feed)
        state = run(feed)["stateN"]
    return feeds


def _auc_of(run: Run, audio: np.ndarray, spoken: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    state = np.zeros((2, 1, 128), F32)
    padded = np.concatenate([np.zeros(CONTEXT, F32), audio])
    found = []
    for i in range(len(audio) // CHUNK):
        chunk = padded[None, i * CHUNK : (i + 1) * CHUNK + CONTEXT]
        outputs = run({"input": chunk, "state": state, "sr": np.array(RATE, np.int64)})
        state = outputs["stateN"]
        found.append(float(outputs["output"][0, 0]))
    truth = spoken[CHUNK // 2 :: CHUNK][: len(found)]
    return float(roc_auc_score(truth, found))


# --- pitch ---------------------------------------------------------------------------------------

_BINS = 360
_CENTS = 1997.3794084376191 + 20 * np.arange(_BINS)
"""Kim et al. 2018: 20 cents a bin, above 10 Hz."""


def crepe_tiny() -> Task:
    """The share of 1,000 synthetic tones whose pitch is found to 10 cents.

    Tones of 80 to 800 Hz with harmonics that fall off at several rates, 25 to 50 dB above noise.
    """
    import torch

    from real_models import crepe_tiny as trained

    module = trained().source
    frames, truth = tones(1000, seed=3)
    model = export(
        module, "crepe_tiny", [torch.from_numpy(frames[:2])], [{0: torch.export.Dim("batch")}]
    )

    def score(run: Run) -> dict[str, float]:
        parts = [
            next(iter(run({"x": frames[i : i + 10]}).values())) for i in range(0, len(frames), 10)
        ]
        off = np.abs(decode_pitch(np.concatenate(parts)) - truth)
        return {"within_10_cents": float(np.mean(off <= 10))}

    other, _ = tones(200, seed=4)
    return Task(
        name="crepe_tiny",
        model=model,
        calibration=[{"x": other[i : i + 1]} for i in range(len(other))],
        score=score,
        timing={"x": frames[:1]},
        better={"within_10_cents": 1},
    )


def tones(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames of 1024 samples with mean 0 and deviation 1, and their pitches in cents over 10 Hz."""
    rng = np.random.default_rng(seed)
    frequencies = np.exp(rng.uniform(np.log(80), np.log(800), count))
    time = np.arange(1024) / RATE
    frames = []
    for frequency in frequencies:
        frame = np.zeros(1024)
        fall = rng.uniform(0.8, 1.6)
        for harmonic in range(1, 40):
            if harmonic * frequency < 0.45 * RATE:
                phase = rng.uniform(0, 2 * np.pi)
                frame += np.sin(2 * np.pi * harmonic * frequency * time + phase) / harmonic**fall
        noise = rng.standard_normal(1024) * frame.std() * 10 ** (-rng.uniform(25, 50) / 20)
        frame = frame + noise
        frames.append((frame - frame.mean()) / frame.std())
    return np.stack(frames).astype(F32), 1200 * np.log2(frequencies / 10)


def decode_pitch(probabilities: np.ndarray) -> np.ndarray:
    """Cents: the mean over the nine bins around the greatest, weighted by probability."""
    found = []
    for row in probabilities.astype(np.float64):
        centre = int(row.argmax())
        near = slice(max(0, centre - 4), min(_BINS, centre + 5))
        found.append(np.sum(row[near] * _CENTS[near]) / np.sum(row[near]))
    return np.array(found)
