"""What a sweep has done, on disk: one folder a result, named by the hash of all it depends on.

Here: `Cache`, safe against being killed at any moment and against damage. Not here: what is hashed
(`fingerprint`), what is stored (`sweep`).

An entry is a folder with `entry.json` (its data, and a hash over them) and any files beside it. It
is built under another name and renamed when whole (`atomic`): there is all of it or nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..atomic import replacing
from ..errors import UsageError

ENTRY = "entry.json"
FORMAT = 1


def default_folder() -> Path:
    """`$EDGEPASS_CACHE`, or `edgepass` in the user's cache folder, and there `sweeps`."""
    chosen = os.environ.get("EDGEPASS_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "sweeps"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "edgepass" / "sweeps"


class Cache:
    """Entries of a kind by key. `notes` collects what was found damaged and left out."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser()
        self.notes: list[str] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"The cache {str(self.folder)!r} can't be used",
                why=str(error),
                fix="name another folder (`cache=`, `--cache`), or None to keep nothing",
            ) from error

    def place(self, kind: str, key: str) -> Path:
        """Where an entry is, or would be."""
        return self.folder / kind / key

    def get(self, kind: str, key: str) -> dict[str, Any] | None:
        """The data of an entry; None where there is none, or it is damaged (`notes` says so)."""
        place = self.place(kind, key)
        try:
            text = (place / ENTRY).read_text(encoding="utf-8")
        except FileNotFoundError:
            if place.exists():
                self.reject(kind, key, f"{ENTRY} is missing")
            return None
        except (OSError, UnicodeDecodeError) as error:
            self.reject(kind, key, str(error))
            return None
        try:
            entry = json.loads(text)
            data, digest, version = entry["data"], entry["sha256"], entry["format"]
        except (ValueError, KeyError, TypeError) as error:
            self.reject(kind, key, f"{ENTRY} can't be read: {error!r}")
            return None
        if version != FORMAT:
            return None
        if not isinstance(data, dict) or digest != _digest(data):
            self.reject(kind, key, f"{ENTRY} does not match its hash")
            return None
        return data

    def put(
        self,
        kind: str,
        key: str,
        data: dict[str, Any] | Callable[[Path], dict[str, Any]],
    ) -> Path:
        """Write an entry, replacing what is there. A function is given the entry's folder for files
        of its own, and returns the data."""
        place = self.place(kind, key)
        with replacing(place) as fresh:
            found = data(fresh) if callable(data) else data
            entry = {"format": FORMAT, "sha256": _digest(found), "data": found}
            text = json.dumps(entry, indent=1, ensure_ascii=False) + "\n"
            (fresh / ENTRY).write_text(text, encoding="utf-8")
        return place

    def reject(self, kind: str, key: str, why: str) -> None:
        """Note that an entry is damaged; it will be made again."""
        self.notes.append(f"damaged cache entry left out: {self.place(kind, key)}: {why}")


def _digest(data: dict[str, Any]) -> str:
    """Of data as they come back from JSON."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
