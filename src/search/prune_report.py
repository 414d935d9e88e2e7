"""Scans and searches of pruning as tables and text.

Here: `scan_table`, `search_table`, `text_of`. Not here: what is in them (`prune_scan`,
`prune_search`).
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from ..cost.latency import format_ms
from ..cost.text import format_bytes, format_count

if TYPE_CHECKING:
    from .prune_rows import GroupRow
    from .prune_scan import PruneScan
    from .prune_search import Pruned
    from .prune_trial import Trial

_WIDTH = 180
_EXACT_DB = 120.0
_REASONS = 20


def scan_table(found: PruneScan, limit: int = 60) -> Any:
    """The groups in the suggested order; the blocked ones with their reasons; what is in reach."""
    from rich.console import Group
    from rich.text import Text

    judged = {
        "outputs": f"output error on {found.samples} samples that no repair has seen",
        "weights": "error by the weights' energy alone: no samples were given",
    }.get(found.measured, "no error: the weights are absent")
    title = f"Each group alone, {found.ratio:.0%} fewer, on {found.target}; {judged}"
    table = _table(title)
    error = "weights kept, dB" if found.measured == "weights" else "outputs, dB"
    for heading in ("group", "kind", "units", "parameters", "MACs", "gained", error, "order"):
        left = heading in ("group", "kind")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for row in found.ranked[:limit]:
        table.add_row(*map(Text, _cells(row)))
    if len(found.rows) > limit:
        table.add_row(Text(f"... {len(found.rows) - limit} more", style="dim"))
    parts: list[Any] = [table]
    if found.blocked:
        parts += [Text(""), _blocked(found, limit)]
    whole = f"{format_count(found.parameters)} parameters, {format_count(found.macs)} MACs"
    parts.append(Text(f"{found.reach:.1%} of {whole} in reach; {found.latency} as it is"))
    parts += [Text(f"note: {note}") for note in found.notes]
    return Group(*parts)


def search_table(found: Pruned) -> Any:
    """What was tried, in the order of the ratio, and what came of it."""
    from rich.console import Group
    from rich.text import Text

    table = _table(f"Pruning for {found.target}: what was tried")
    metrics = list(dict.fromkeys(name for trial in found.trials for name in trial.metrics))
    headings = ["", "ratio", "parameters", "MACs", "file", "predicted", "measured", *metrics]
    if any(trial.sqnr_db is not None for trial in found.trials):
        headings.append("outputs, dB")
    for heading in (*headings, "verdict"):
        left = heading in ("", "verdict")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    if found.original is not None:
        cells = _trial(found.original, metrics, "outputs, dB" in headings)
        table.add_row(*map(Text, ("", "original", *cells[1:], "")))
    for trial in sorted(found.trials, key=lambda trial: trial.ratio):
        cells = _trial(trial, metrics, "outputs, dB" in headings)
        mark = "*" if trial is found.chosen else ""
        table.add_row(*map(Text, (mark, *cells, trial.verdict)))
    lines = [found.reason, *(f"note: {note}" for note in found.notes)]
    return Group(table, *map(Text, lines))


def text_of(renderable: Any) -> str:
    """A table as plain text."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=_WIDTH, color_system=None).print(renderable)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def decibels(value: float | None) -> str:
    """`23.1`; exact where there is no error to speak of."""
    if value is None:
        return "-"
    if value >= _EXACT_DB:
        return "exact"
    return "ruined" if value == -math.inf else f"{value:.1f}"


def _table(title: str) -> Any:
    from rich import box
    from rich.table import Table

    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )


def _cells(row: GroupRow) -> tuple[str, ...]:
    also = f" and {len(row.also)} more" if row.also else ""
    units = f"{row.units} in {row.rows} rows" if row.rows > 1 else str(row.units)
    if row.removed:
        units += f" > {row.units - row.removed}"
    gained = "?" if row.gained_ms is None else f"{format_ms(row.gained_ms)} ms"
    return (
        row.name + also,
        row.kind,
        units,
        f"{row.parameters:.1%}",
        "?" if row.macs is None else f"{row.macs:.1%}",
        gained if row.removed else "-",
        decibels(row.sqnr_db) if row.removed else "-",
        str(row.order),
    )


def _blocked(found: PruneScan, limit: int) -> Any:
    from rich.text import Text

    table = _table("Groups that stay as they are")
    for heading in ("group", "kind", "units", "parameters", "why"):
        left = heading in ("group", "kind", "why")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    largest = sorted(found.blocked, key=lambda row: -row.parameters)
    for row in largest[:limit]:
        why = row.reason + (f"; {row.wish} would allow it" if row.wish else "")
        cells = (row.name, row.kind, str(row.units), f"{row.parameters:.1%}", why)
        table.add_row(*map(Text, cells))
    if len(largest) > limit:
        table.add_row(Text(f"... {len(largest) - limit} more", style="dim"))
    return table


def _trial(trial: Trial, metrics: list[str], outputs: bool) -> list[str]:
    cells = [
        f"{trial.ratio:.0%}",
        format_count(trial.parameters),
        format_count(trial.macs),
        format_bytes(trial.file_bytes),
        str(trial.predicted),
        "-" if trial.measured_ms is None else f"{format_ms(trial.measured_ms)} ms",
    ]
    for name in metrics:
        result = trial.metrics.get(name)
        cells.append("-" if result is None else result.value.text())
    return [*cells, decibels(trial.sqnr_db)] if outputs else cells
