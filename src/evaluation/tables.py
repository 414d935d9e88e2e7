"""A report as tables and text for a terminal.

Not here: what is in it (`report`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .report import EXCEEDS, NO_LIMITS, WITHIN

if TYPE_CHECKING:
    from .report import Estimate, Report, Rung

_SLICE_HEADINGS = (
    "model", "slice", "samples", "metric", "original", "model's", "change", "p", "harmed"
)  # fmt: skip
_STYLES = {WITHIN: "green", EXCEEDS: "red", "cannot tell": "yellow"}


def report_table(report: Report) -> Any:
    """A line a model: metrics and their change with intervals, flips, divergence, verdict."""
    from rich.table import Table
    from rich.text import Text

    groups = "" if report.units == report.samples else f", {report.units} groups"
    title = f"{report.samples} samples{groups}, {report.confidence:.0%} intervals"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    columns = _columns(report)
    table.add_column("model", overflow="fold")
    for heading in columns:
        left = heading == "worst slice"
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for rung in report.rungs:
        cells = [_cell(report, rung, heading, "\n") for heading in columns]
        table.add_row(Text(rung.name), *(Text(c, style=_STYLES.get(c, "")) for c in cells))
    return table


def _columns(report: Report) -> list[str]:
    columns = ["size"] if any(rung.bytes for rung in report.rungs) else []
    for name in report.original.metrics:
        columns += [name, f"{name} change"]
    candidates = report.candidates
    if any(rung.slices for rung in candidates):
        columns.append("worst slice")
    if any(rung.flips is not None for rung in candidates):
        columns.append("flips")
    if any(rung.ece is not None for rung in report.rungs):
        columns.append("ECE")
    unlabelled = not any(rung.flips is not None for rung in candidates)
    agreements = [d.agreement for rung in candidates for d in rung.divergence.values()]
    if unlabelled and any(agreement is not None for agreement in agreements):
        columns.append("agreement")
    if any(rung.divergence for rung in candidates):
        columns.append("SQNR")
    if any(rung.verdict != NO_LIMITS for rung in candidates):
        columns.append("verdict")
    return columns


def _cell(report: Report, rung: Rung, heading: str, gap: str) -> str:
    """One figure of one model; `gap` is before its interval."""
    if heading in rung.metrics:
        return _estimate(rung.metrics[heading].value, gap)
    if heading.endswith(" change"):
        change = rung.metrics[heading.removesuffix(" change")].difference
        return "" if change is None else _estimate(change, gap, signed=True)
    if heading == "size":
        return "" if rung.bytes is None else f"{rung.bytes / 1e6:.2f} MB"
    if heading == "ECE":
        return "" if rung.ece is None else f"{rung.ece:.4f}"
    if rung is report.original:
        return ""
    if heading == "worst slice":
        return worst_slice_text(rung)
    if heading == "flips":
        if rung.flips is None:
            return ""
        return f"{rung.flips.broken} broken,{gap}{rung.flips.mended} mended"
    if heading == "agreement":
        shares = [d.agreement for d in rung.divergence.values() if d.agreement is not None]
        return f"{min(shares):.4f}" if shares else ""
    if heading == "SQNR":
        return sqnr_text(min(d.sqnr_db for d in rung.divergence.values()))
    return rung.verdict


def worst_slice_text(rung: Rung) -> str:
    """`speaker=ann: auc -0.12, harmed (p 0.001)`; or the least likely loss, or none."""
    worst = rung.worst_slice
    if worst is None:
        return ""
    text = f"{worst.name}: {worst.metric} {worst.difference:+.3g}"
    if worst.harmed:
        return f"{text}, harmed (p {worst.adjusted:.2g})"
    if worst.adjusted is None:
        return f"{text}, not tested"
    return "none worse" if worst.p_value == 1 else f"{text}, maybe chance"


def sqnr_text(decibels: float) -> str:
    """`41 dB`; `equal` for infinitely many."""
    if math.isinf(decibels):
        return "equal" if decibels > 0 else "-inf"
    return f"{decibels:.0f} dB"


def _estimate(estimate: Estimate, gap: str, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    digits = 4 if abs(estimate.value) < 10 else 3
    head = f"{estimate.value:{sign}.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return head
    return f"{head}{gap}[{estimate.low:{sign}.{digits}f}, {estimate.high:{sign}.{digits}f}]"


def slice_table(report: Report, limit: int) -> Any:
    """The most harmed slices of each candidate."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="slices", title_justify="left", show_edge=False, pad_edge=False)
    headings = (
        "model",
        "slice",
        "samples",
        "metric",
        "original",
        "model's",
        "change",
        "p",
        "harmed",
    )
    for heading in headings:
        left = heading in ("model", "slice", "metric", "harmed")
        table.add_column(heading, justify="left" if left else "right")
    for rung in report.candidates:
        for row in rung.slices[:limit]:
            numbers = [f"{row.original:.4f}", f"{row.candidate:.4f}", f"{row.difference:+.4f}"]
            adjusted = "-" if row.adjusted is None else f"{row.adjusted:.2g}"
            cells = [rung.name, row.name, str(row.count), row.metric, *numbers, adjusted]
            table.add_row(*(Text(cell) for cell in cells), Text("yes" if row.harmed else "", "red"))
    return table


def report_text(report: Report) -> str:
    """A paragraph a model, without colours or boxes."""
    lines = [f"{report.samples} samples, {report.confidence:.0%} intervals"]
    for rung in report.rungs:
        lines.append(rung.name)
        for heading in _columns(report):
            cell = _cell(report, rung, heading, " ")
            if cell:
                lines.append(f"  {heading}: {cell}")
        lines += [
            f"  limit {r.name} {r.limit}: {r.verdict}, {r.why or r.value}" for r in rung.limits
        ]
        for row in rung.harmed:
            lines.append(
                f"  harmed: {row.name}, {row.metric} {row.original:.4g} > {row.candidate:.4g}"
            )
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])
