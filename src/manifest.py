"""The manifest of an artifact: reading it without trust, and holding the files against it.

Here: its form, and hashes. Not here: what its entries mean, and writing it (`artifact`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ArtifactError

FORMAT = "edgepass-artifact"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "target": str,
    "arch": str,
    "runtime": str,
    "session_options": dict,
    "recipe": str,
    "model": str,
    "inputs": list,
    "outputs": list,
    "files": dict,
    "golden": (dict, type(None)),
}


def is_artifact(path: Path) -> bool:
    """Whether a folder says that it is an artifact, of whatever version, whole or not."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact, its form checked.

    Raises:
        ArtifactError: not an artifact, of an unknown version, or damaged.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError("There is no such artifact", where=str(folder))
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            "The folder is not an artifact", where=str(folder), why=f"it has no {MANIFEST}"
        ) from error
    except (OSError, ValueError) as error:
        raise broken(folder, f"{MANIFEST}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise broken(folder, f'{MANIFEST} does not say "format": "{FORMAT}"')
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"The artifact's format version {manifest.get('format_version')!r} is unknown",
            where=str(path),
            why=f"this edgepass reads version {FORMAT_VERSION}",
            fix="use the edgepass that wrote it, or compile the model again",
        )
    for key, kind in _KEYS.items():
        if key not in manifest or not isinstance(manifest[key], kind):
            raise broken(folder, f"{MANIFEST} has no proper {key!r}")
    golden = manifest["golden"]
    if golden is not None and not (
        isinstance(golden.get("file"), str) and isinstance(golden.get("tolerance"), int | float)
    ):
        raise broken(folder, f"{MANIFEST} has no proper 'golden'")
    if not all(isinstance(entry, dict) for entry in manifest["files"].values()):
        raise broken(folder, f"{MANIFEST} has no proper 'files'")
    for name in (manifest["model"], *([golden["file"]] if golden else [])):
        if name not in manifest["files"]:
            raise broken(folder, f"{MANIFEST} has no hash of {name!r}")
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Hold every file that the manifest lists against its size and hash.

    Raises:
        ArtifactError: a file is missing, changed, or outside the folder.
    """
    root = folder.resolve()
    for name, entry in manifest["files"].items():
        path = folder / name
        if os.path.isabs(name) or Path(name).name != name or path.resolve().parent != root:
            raise ArtifactError(
                f"The manifest names the file {name!r}, outside the artifact",
                where=str(folder / MANIFEST),
                why="an artifact is one flat folder, and reads nothing elsewhere",
                fix="do not use this artifact unless you know who made it",
            )
        if not path.is_file():
            raise broken(folder, f"the file {name!r} is missing")
        size = path.stat().st_size
        if size != entry.get("bytes"):
            raise broken(folder, f"{name!r} has {size} bytes, {entry.get('bytes')} are expected")
        if file_entry(path)["sha256"] != entry.get("sha256"):
            raise broken(folder, f"{name!r} does not have the hash that the manifest says")


def broken(folder: Path, why: str) -> ArtifactError:
    """The error for an artifact that is not whole."""
    return ArtifactError(
        "The artifact is incomplete or was changed",
        where=str(folder),
        why=why,
        fix="copy it again, or compile the model again",
    )


def file_entry(path: Path) -> dict[str, Any]:
    """The manifest's line for a file: its SHA-256 and size in bytes."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}
