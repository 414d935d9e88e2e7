"""A table of whole-model timings as a CSV file, read with care.

Here: `read_timings` and the rows that it returns. Not here: the fit (`timings`), loading
the models.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from ..errors import ProfileError


@dataclasses.dataclass(frozen=True)
class TimingRow:
    """One line of a table of timings; `model` is a path as written there."""

    line: int
    model: str
    ms: float
    family: str
    threads: int
    dims: Mapping[str, int]


def read_timings(path: str | Path) -> list[TimingRow]:
    """The rows of a CSV with columns `model` and `latency_ms`; `family`, `threads` and `dims`
    (`batch=1;length=128`) may be there. Without `family`, the model's own name is its family.

    Raises:
        ProfileError: no such file, no such columns, or a value that can't be read; with its line.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"model", "latency_ms"} - set(reader.fieldnames or ())
            if missing:
                raise ProfileError(
                    f"The table of timings has no column {sorted(missing)[0]!r}",
                    where=str(path),
                    why=f"its columns are {', '.join(reader.fieldnames or ()) or 'none'}",
                    fix="name the columns model and latency_ms (also: family, threads, dims)",
                )
            rows = [_row(path, reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(
            "The table of timings can't be read", where=str(path), why=str(error)
        ) from error
    if not rows:
        raise ProfileError("The table of timings is empty", where=str(path))
    return rows


def _row(path: Path, line: int, row: Mapping[str, str | None]) -> TimingRow:
    def wrong(column: str, wanted: str) -> ProfileError:
        return ProfileError(
            f"A timing can't be read: {column} is {row.get(column)!r}",
            where=f"{path}, line {line}",
            fix=f"give {wanted}",
        )

    model = (row.get("model") or "").strip()
    if not model:
        raise wrong("model", "the path of an ONNX file")
    try:
        ms = float(row.get("latency_ms") or "")
    except ValueError:
        ms = math.nan
    if not (math.isfinite(ms) and ms > 0):
        raise wrong("latency_ms", "milliseconds above zero, like 12.5")
    threads = (row.get("threads") or "1").strip()
    if not threads.isdecimal() or int(threads) < 1:
        raise wrong("threads", "a whole number above zero")
    dims: dict[str, int] = {}
    for part in (row.get("dims") or "").split(";"):
        name, equals, size = part.strip().partition("=")
        if not part.strip():
            continue
        if not equals or not size.isdecimal() or int(size) < 1:
            raise wrong("dims", "sizes like batch=1;length=128")
        dims[name] = int(size)
    family = (row.get("family") or "").strip() or Path(model).stem.partition("@")[0]
    return TimingRow(line, model, ms, family, int(threads), dims)
