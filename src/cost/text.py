"""Quantities as people read them. Here: bytes and counts, with units. Not here: milliseconds, which
never go without their label (`latency`)."""

from __future__ import annotations


def format_bytes(count: int | float | None) -> str:
    """Bytes for people, in powers of ten: `3.5 MB`."""
    if count is None:
        return "?"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def format_count(count: int | float | None) -> str:
    """A count for people: `300.1 M`."""
    if count is None:
        return "?"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f}"
