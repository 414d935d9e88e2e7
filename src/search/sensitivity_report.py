"""Sensitivity as a table, as text and as a picture.

Here: `sensitivity_table`, `sensitivity_text`, `plot_sensitivity`. Not here: what is in them
(`sensitivity`).
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.plots import figure_class
from .trials import Outcome

if TYPE_CHECKING:
    from .sensitivity import Sensitivity

_WIDTH = 160
_EXACT_DB = 120.0
_LABELLED = 60


def sensitivity_table(found: Sensitivity, limit: int = 40) -> Any:
    """A line a layer, the most harmful first; all in 8 bits below."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"Layers in 8 bits, {found.recipe} for {found.target}; {found.samples} samples",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    headings = ["layer", "operator", "MACs", "alone"]
    headings += [f"{name} alone" for name in found.higher]
    headings += ["all but it", *(f"{name} all but it" for name in found.higher)]
    for heading in headings:
        left = heading in ("layer", "operator")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for layer in found.ranked[:limit]:
        cells = [layer.name, layer.op_type, f"{layer.macs:.1%}"]
        for outcome in (layer.alone, layer.without):
            cells += [decibels(outcome), *_changes(found, outcome)]
        table.add_row(*map(Text, cells))
    if len(found.layers) > limit:
        table.add_row(Text(f"... {len(found.layers) - limit} more", style="dim"))
    table.add_section()
    whole = [decibels(found.every), *_changes(found, found.every)]
    table.add_row(*map(Text, ["all in 8 bits", "", "", *whole]), style="bold")
    return table


def sensitivity_text(found: Sensitivity) -> str:
    """The table as plain text, with the notes."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=_WIDTH, color_system=None).print(sensitivity_table(found))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def plot_sensitivity(found: Sensitivity, path: Path) -> Path:
    """By depth: signal to error with the layer alone in 8 bits, and with all but it; below, the
    same for each metric.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    layers, metrics = found.layers, list(found.higher)
    rows = 1 + len(metrics)
    width = max(7.0, min(24.0, 0.16 * len(layers) + 3))
    figure = figure_class()(figsize=(width, 3.2 * rows + 1), layout="constrained")
    places = range(len(layers))
    for row in range(rows):
        axes = figure.add_subplot(rows, 1, row + 1)
        name = metrics[row - 1] if row else ""
        for label, marker, outcomes in (
            ("alone in 8 bits", "o", [layer.alone for layer in layers]),
            ("all but it in 8 bits", "^", [layer.without for layer in layers]),
        ):
            axes.plot(places, [_height(o, name) for o in outcomes], marker, label=label)
        axes.axhline(_height(found.every, name), color="0.4", linestyle="--", label="all")
        axes.set_ylabel(f"change of {name}" if row else "signal to error, dB")
        axes.grid(alpha=0.3)
        axes.set_xticks([])
    if len(layers) <= _LABELLED:
        names = [_short(layer.name) for layer in layers]
        axes.set_xticks(list(places), names, rotation=90)
        axes.tick_params(axis="x", labelsize=6)
    axes.set_xlabel("layer, in the order of the model")
    figure.axes[0].legend(fontsize=8)
    figure.axes[0].set_title("Effect of 8 bits by depth")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


def decibels(outcome: Outcome) -> str:
    """`23.1 dB`, `exact` or `lost`."""
    found = outcome.sqnr_db
    if math.isinf(found):
        return "exact" if found > 0 else "lost"
    return f"{found:.1f} dB"


def _changes(found: Sensitivity, outcome: Outcome) -> list[str]:
    return [f"{outcome.changes.get(name, math.nan):+.4g}" for name in found.higher]


def _height(outcome: Outcome, metric: str) -> float:
    if metric:
        return outcome.changes.get(metric, math.nan)
    return max(-20.0, min(_EXACT_DB, outcome.sqnr_db))


def _short(name: str, length: int = 28) -> str:
    text = name if len(name) <= length else "..." + name[-length + 3 :]
    return text.replace("$", r"\$")
