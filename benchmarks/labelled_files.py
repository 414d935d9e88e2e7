"""Labelled files: what magika says of files of this machine against their extensions.

Here: choosing the files, pinning them by hash, features, accuracy. Not here: the table of tasks
(`labelled_tasks`).
"""

from __future__ import annotations

import hashlib
import json
import os
import site
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from labelled_tasks import Feed, NotThere, Run, Task, cache, in_wheel

from real_models import wheel

PER_TYPE = 60
"""Test files of one type at most."""
CALIBRATION = 8
"""Calibration files of one type at most."""
_LARGEST = 20_000_000
_FEWEST = 4
_ROOTS = ("/usr", "/etc", "/opt")
# Extensions whose files are of another type as often as not, on a Debian system.
_AMBIGUOUS = {
    "h",
    "in",
    "conf",
    "cfg",
    "txt",
    "list",
    "log",
    "bin",
    "dat",
    "inc",
    "out",
    "sum",
    "ts",
}


def magika() -> Task:
    """Accuracy over files of at least 25 types: does the likeliest type have the extension?

    Files whose extension belongs to one type only, chosen by a hash of their path and pinned by
    one of their content in the cache. Calibrated on other files.
    """
    model = wheel("magika", "models", "standard_v3_3", "model.onnx")
    config = json.loads(model.with_name("config.min.json").read_text(encoding="utf-8"))
    manifest = _manifest(config)
    test = _read(manifest["test"], config)
    calibration = _read(manifest["calibration"], config)
    labels = config["target_labels_space"]
    rows = np.array([row for row, _ in test], np.int32)

    def score(run: Run) -> dict[str, float]:
        hits = 0
        for i in range(len(rows)):
            found = next(iter(run({"bytes": rows[i : i + 1]}).values()))[0].argmax()
            label = labels[int(found)]
            hits += config["overwrite_map"].get(label, label) == test[i][1]
        return {"accuracy": hits / len(rows)}

    feeds: list[Feed] = [{"bytes": np.array([row], np.int32)} for row, _ in calibration]
    return Task(
        name="magika",
        model=model,
        calibration=feeds,
        score=score,
        timing={"bytes": rows[:1]},
        better={"accuracy": 1},
    )


def describe() -> str:
    """How many files of how many types the test is of."""
    path = cache() / "magika-files.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["test"]
    return f"{len(entries)} files of {len({e['label'] for e in entries})} types"


def _manifest(config: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """The files of both sets, from the cache where all are still as they were."""
    path = cache() / "magika-files.json"
    if path.exists():
        manifest: dict[str, list[dict[str, str]]] = json.loads(path.read_text(encoding="utf-8"))
        if all(_digest(e["path"]) == e["sha256"] for part in manifest.values() for e in part):
            return manifest
        print("magika: files have changed since they were chosen; choosing again", file=sys.stderr)
    manifest = _choose(config)
    path.write_text(json.dumps(manifest, indent=0), encoding="utf-8")
    return manifest


def _choose(config: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    label_of = _labels(config)
    by_label: dict[str, list[Path]] = defaultdict(list)
    for path in _candidates():
        label = label_of.get(path.suffix[1:].lower())
        if label is not None:
            by_label[label].append(path)
    manifest: dict[str, list[dict[str, str]]] = {"test": [], "calibration": []}
    seen: set[str] = set()
    for label, paths in sorted(by_label.items()):
        paths.sort(key=lambda p: zlib.crc32(str(p).encode()))
        entries = []
        for path in paths:
            digest = _digest(str(path))
            if digest and digest not in seen and features(path, config)[7] != 256:
                seen.add(digest)
                entries.append({"path": str(path), "sha256": digest, "label": label})
            if len(entries) == PER_TYPE + CALIBRATION:
                break
        if len(entries) < _FEWEST:
            continue
        share = max(1, min(CALIBRATION, len(entries) // 4))
        manifest["calibration"] += entries[:share]
        manifest["test"] += entries[share:]
    types = Counter(e["label"] for e in manifest["test"])
    if len(manifest["test"]) < 1000 or len(types) < 25:
        raise NotThere(f"{len(manifest['test'])} files of {len(types)} types; 1000 of 25 needed")
    return manifest


def _labels(config: Mapping[str, Any]) -> dict[str, str]:
    """The type of each extension that belongs to one type only."""
    path = in_wheel("magika", "magika/config/content_types_kb.min.json")
    known = json.loads(path.read_text(encoding="utf-8"))
    owners: dict[str, list[str]] = defaultdict(list)
    for label, entry in known.items():
        for extension in entry["extensions"]:
            owners[extension.lower()].append(label)
    targets = set(config["target_labels_space"])
    return {
        extension: labels[0]
        for extension, labels in owners.items()
        if len(labels) == 1 and labels[0] in targets and extension not in _AMBIGUOUS
    }


def _candidates() -> Iterator[Path]:
    for root in (*_ROOTS, *site.getsitepackages()):
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if not path.suffix or path.is_symlink() or not path.is_file():
                    continue
                if 64 <= path.stat().st_size <= _LARGEST:
                    yield path


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _read(entries: list[dict[str, str]], config: Mapping[str, Any]) -> list[tuple[list[int], str]]:
    return [(features(Path(entry["path"]), config), entry["label"]) for entry in entries]


def features(path: Path, config: Mapping[str, Any]) -> list[int]:
    """The first and last bytes of a file, stripped of white space, padded towards the middle."""
    block, pad = config["block_size"], config["padding_token"]
    first, last = config["beg_size"], config["end_size"]
    with path.open("rb") as file:
        begin = file.read(block).lstrip()[:first]
        file.seek(-min(block, path.stat().st_size), os.SEEK_END)
        end = file.read(block).rstrip()[-last:]
    padding = [pad] * (first - len(begin)), [pad] * (last - len(end))
    return [*begin, *padding[0], *padding[1], *end]
