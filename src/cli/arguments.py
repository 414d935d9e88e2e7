"""Text forms of options: `NAME=1x3x224x224`, `batch=1`, lists with commas, and model names.

Not here: what a shape text means (`frontends.torch_inputs`), arrays (`samples`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from ..cost.budget import Budget

_SHAPE = re.compile(r"([^=:]+=)?(\d+(x\d+)*)?(:\w+)?")


def parse_dims(items: Sequence[str]) -> dict[str, int]:
    """`["batch=1", "length=128"]` as a mapping.

    Raises:
        UsageError: not NAME=NUMBER with a number above zero, or a name twice.
    """
    found: dict[str, int] = {}
    for item in items:
        name, equals, number = item.partition("=")
        if not (name and equals and number.isdecimal() and int(number) > 0):
            raise _wrong("--dim", item, "a name and a positive size, like batch=1")
        if name in found:
            raise _wrong("--dim", item, "each name once")
        found[name] = int(number)
    return found


def parse_input_shapes(items: Sequence[str]) -> list[str] | dict[str, str] | None:
    """`["x=1x3x224x224", "ids=1x128:int64"]` as a mapping from input to its text, or texts
    without names as a list in input order; None for no items.

    Raises:
        UsageError: some have names and some do not, another form, or a name twice.
    """
    for item in items:
        if not _SHAPE.fullmatch(item):
            raise _wrong("--input-shape", item, "NAME=1x3x224x224 or NAME=1x128:int64")
    named = [item.partition("=") for item in items if "=" in item]
    if not items:
        return None
    if not named:
        return list(items)
    if len(named) != len(items):
        raise UsageError("Some --input-shape have a name and some do not", fix="name all or none")
    if len({name for name, _, _ in named}) != len(named):
        raise _wrong("--input-shape", items[-1], "each name once")
    return {name: text for name, _, text in named}


def parse_budget(text: str | None) -> Budget | None:
    """`"latency_ms=20,size_mb=4"` as a `Budget`; None for no text.

    Raises:
        UsageError: another form, an unknown limit, or one that is not above zero.
    """
    from ..cost.budget import Budget

    if text is None:
        return None
    known = ("latency_ms", "size_mb", "memory_mb")
    limits: dict[str, float] = {}
    for item in split_list(text):
        name, equals, number = item.partition("=")
        try:
            limits[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or name not in known:
            raise _wrong("--budget", item, f"limits with commas, of {', '.join(known)}")
    return Budget(**limits)


def split_list(text: str) -> list[str]:
    """`"fp32, int8"` as a list; commas inside braces do not separate."""
    parts = re.split(r",(?![^{}]*\})", text)
    return [part.strip() for part in parts if part.strip()]


def _wrong(option: str, value: str, wanted: str) -> UsageError:
    return UsageError(f"{option} {value!r} can't be read", fix=f"give {wanted}")
