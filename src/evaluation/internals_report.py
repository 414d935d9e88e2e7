"""What `inspect` found, as tables and text for a terminal.

Here: `layer_table`, `culprit_table`, `summary`. Not here: measuring, plots (`internals_plots`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .internals import Internals, Layer


def layer_table(found: Internals, limit: int | None) -> Any:
    """A line a layer; the `limit` worst of them, in the model's order."""
    from rich.table import Table

    layers = list(found.layers)
    title = f"{len(layers)} layers, {found.samples} samples; {_matched(found)}"
    if limit is not None and len(layers) > limit:
        worst = sorted(layers, key=lambda x: (not x.causes, x.injected.sqnr))[:limit]
        chosen = {id(x) for x in worst}
        layers = [x for x in layers if id(x) in chosen]
        title += f"; the worst {limit} of them"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    headings = ("layer", "op", "stored", "range", "clipped", "weight dB", "alone dB", "run dB")
    for heading in (*headings, "cosine", "matched by", "flag"):
        text = heading in ("layer", "op", "stored", "matched by", "flag")
        table.add_column(heading, justify="left" if text else "right", overflow="fold")
    for layer in layers:
        table.add_row(*_cells(layer))
    return table


def culprit_table(found: Internals) -> Any:
    """A line a culprit, worst first."""
    from rich.table import Table

    title = f"{len(found.culprits)} layers out of their expected range"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("layer", "op", "cause", "measured", "remedy"):
        table.add_column(heading, overflow="fold")
    for item in found.culprits:
        table.add_row(item.layer, item.op, item.cause.replace("_", " "), item.what, item.remedy)
    return table


def summary(found: Internals) -> str:
    """Some lines: how much was matched, the culprits, the notes."""
    lines = [f"{len(found.layers)} layers on {found.samples} samples; {_matched(found)}"]
    lines += [f"culprit: {item}" for item in found.culprits]
    if not found.culprits:
        lines.append("no layer is out of its expected range")
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def _matched(found: Internals) -> str:
    how = ", ".join(f"{count} by {name}" for name, count in sorted(found.how.items()))
    return f"{found.matched} of {found.weighted} nodes with weights told apart ({how})"


def _cells(layer: Layer) -> tuple[str, ...]:
    activation = layer.activation
    clipped = activation.clipped_share
    weight = min((w.sqnr for w in layer.weights), default=None)
    return (
        layer.name,
        layer.op,
        layer.dtype,
        f"{activation.low:.3g}..{activation.high:.3g}",
        "" if clipped is None else f"{100 * clipped:.2g}%",
        "" if weight is None else decibel_text(weight),
        decibel_text(layer.injected.sqnr),
        decibel_text(layer.accumulated.sqnr),
        f"{layer.accumulated.cosine:.4f}",
        layer.how,
        ", ".join(cause.replace("_", " ") for cause in layer.causes),
    )


def decibel_text(value: float) -> str:
    """`31`, `exact`, or `not finite`."""
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "exact" if value > 0 else "lost"
    return f"{value:.0f}"
