"""Replacing a folder as one step, so that a killed process leaves the old one or the new one.

Here: `replacing`. Not here: what is in the folder (`artifact`).
The new folder is built as a hidden sibling, locked while its process lives; what dead processes
left behind is told by the lock being free, and removed by the next writer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def replacing(destination: Path) -> Iterator[Path]:
    """An empty folder to fill; on leaving without an exception it becomes `destination`.

    Files are flushed to disk before the swap. On an exception (Ctrl-C too) the new folder is
    removed and `destination` is as it was. Parents are created.
    """
    parent = Path(os.path.abspath(destination)).parent
    parent.mkdir(parents=True, exist_ok=True)
    place = parent / destination.name
    remove_leftovers(place)
    fresh, lock = _locked_folder(place)
    try:
        yield fresh
        for path in fresh.iterdir():
            _flush(path)
        _flush(fresh)
        _swap_in(fresh, place)
        _flush(parent)
    finally:
        # After a swap `fresh` holds the old folder; after an exception, the unfinished new one.
        shutil.rmtree(fresh, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_leftovers(place: Path) -> list[Path]:
    """Delete temporary siblings of dead processes; returns what was deleted.

    An old folder that was moved aside by a process that died before moving the new one in is
    moved back.
    """
    removed = []
    for path in place.parent.glob(f".{_escaped(place.name)}.edgepass-*"):
        lock = _lock(path)
        if lock is None:
            continue
        if path.name.endswith("-old") and not place.exists():
            os.rename(path, place)
            os.close(lock)
            continue
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
        removed.append(path)
    return removed


def _locked_folder(place: Path) -> tuple[Path, int | None]:
    while True:
        fresh = place.parent / f".{place.name}.edgepass-{uuid.uuid4().hex[:12]}"
        fresh.mkdir()
        if sys.platform == "win32":
            return fresh, None
        lock = _lock(fresh)
        # Another writer may have taken the folder for a leftover before it was locked.
        if lock is not None and fresh.is_dir():
            return fresh, lock


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None when another process holds it."""
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _swap_in(fresh: Path, place: Path) -> None:
    if not place.exists():
        os.rename(fresh, place)
        return
    if _exchange(fresh, place):
        return
    # No atomic exchange on this system or file system: for an instant there is neither.
    aside = fresh.with_name(fresh.name + "-old")
    os.rename(place, aside)
    try:
        os.rename(fresh, place)
    except OSError:
        os.rename(aside, place)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Linux's renameat2 with RENAME_EXCHANGE; False where it is not there."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    done = libc.renameat2(
        _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
    )
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _flush(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened on Windows
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
