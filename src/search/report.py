"""A sweep as a table, as text and as a picture.

Here: `sweep_table`, `sweep_text`, `plot_sweep`. Not here: what is in them (`rows`, `result`).
"""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cost.latency import format_ms
from ..cost.text import format_bytes
from ..errors import MissingDependencyError, UsageError
from ..evaluation.report import Rung
from .rows import Row

if TYPE_CHECKING:
    from .result import SweepResult

_WIDTH = 200


def sweep_table(result: SweepResult, by: str = "both") -> Any:
    """A rich renderable: the rows, then why some failed or may not be shipped, then the best."""
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"Sweep for {result.target} (* no other beats it in size, latency and metric)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    metrics = metric_names(result)
    headings = _headings(result, metrics)
    for heading in headings:
        left = heading in ("", "recipe", "worst slice", "verdict")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for cells in _lines(result, metrics):
        table.add_row(*(Text(cells.get(heading, "")) for heading in headings))
    remarks = [Padding(Text(line, style="dim"), (0, 0, 0, 2)) for line in _remarks(result)]
    return Group(table, *remarks, Text(f"best: {result.best(by)}"))


def sweep_text(result: SweepResult, by: str = "both") -> str:
    """The table as plain text."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=_WIDTH, color_system=None).print(sweep_table(result, by))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def metric_names(result: SweepResult) -> list[str]:
    """The metrics of the evaluation, in its order."""
    rungs = [row.rung for row in result.rows if row.rung is not None]
    return list(dict.fromkeys(name for rung in rungs for name in rung.metrics))


def _headings(result: SweepResult, metrics: list[str]) -> list[str]:
    rungs = [row.rung for row in result.rows if row.rung is not None]
    headings = ["", "recipe", "file", "predicted"]
    if result.measured:
        headings += ["measured", "of original"]
    headings += metrics
    if rungs and not metrics:
        headings.append("SQNR")
    if any(rung.slices for rung in rungs):
        headings.append("worst slice")
    if any(rung.flips is not None for rung in rungs):
        headings.append("flips")
    return [*headings, "verdict"]


def _lines(result: SweepResult, metrics: list[str]) -> list[dict[str, str]]:
    lines = []
    if result.original is not None:
        cells = {"recipe": "(original)", **_evaluated(result.original, metrics)}
        times = [row.timing.original_ms for row in result.rows if row.timing is not None]
        if times:
            cells |= {"measured": f"{format_ms(statistics.median(times))} ms", "of original": "1"}
        lines.append(cells)
    for row in result.rows:
        cells = {"": "*" if row.front else "", "recipe": row.name, "verdict": row.verdict}
        if row.file_bytes is not None:
            cells["file"] = format_bytes(row.file_bytes)
        if row.predicted is not None:
            cells["predicted"] = str(row.predicted)
        if row.timing is not None:
            cells["measured"] = f"{format_ms(row.timing.ms)} ms"
            cells["of original"] = f"{row.timing.share:.2f}"
        if row.rung is not None:
            cells |= _evaluated(row.rung, metrics)
        lines.append(cells)
    return lines


def _evaluated(rung: Rung, metrics: list[str]) -> dict[str, str]:
    cells = {name: rung.metrics[name].value.text() for name in metrics if name in rung.metrics}
    if rung.divergence:
        cells["SQNR"] = f"{min(part.sqnr_db for part in rung.divergence.values()):.1f} dB"
    if (worst := rung.worst_slice) is not None and worst.difference:
        mark = ", harmed" if worst.harmed else ""
        cells["worst slice"] = f"{worst.name} {worst.metric} {worst.difference:+.4g}{mark}"
    if rung.flips is not None:
        cells["flips"] = f"-{rung.flips.broken} +{rung.flips.mended}"
    return cells


def _remarks(result: SweepResult) -> list[str]:
    lines = []
    for row in result.rows:
        if row.failed:
            lines.append(f"{row.name}: {_one_line(row.failed)}")
        elif row.same_as:
            lines.append(f"{row.name}: the same files as {row.same_as}")
        elif row.objections:
            lines.append(f"{row.name}: {'; '.join(row.objections)}")
    if result.left_out:
        reasons: dict[str, list[str]] = {}
        for name, why in result.left_out:
            reasons.setdefault(why, []).append(name)
        lines += [f"not tried: {', '.join(names)}: {why}" for why, names in reasons.items()]
    return [*lines, *(f"note: {note}" for note in result.notes)]


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- picture ---------------------------------------------------------------------------------


def plot_sweep(result: SweepResult, path: Path) -> Path:
    """Size and latency against the first metric (or noise), front rows joined and named."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "A plot needs matplotlib", why=str(error), fix="pip install 'edgepass[plot]'"
        ) from error
    rows = [row for row in result.rows if not row.failed and row.file_bytes is not None]
    if not rows:
        raise UsageError("The sweep has nothing to plot", why="no recipe gave an artifact")
    figure = Figure(figsize=(12, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if path.suffix[1:] not in canvas.get_supported_filetypes():
        raise UsageError(
            f"A plot can't be saved as {path.suffix or 'a file without an ending'!r}",
            where=str(path),
            fix="end the name in .png, .svg or .pdf",
        )
    how = "measured" if result.measured else "predicted"
    left, right = figure.subplots(1, 2, sharey=True)
    name = next(iter(metric_names(result)), "signal to noise, dB")
    _scatter(left, rows, [(row.file_bytes or 0) / 1e6 for row in rows])
    _scatter(right, rows, [_latency_ms(row, result.measured) for row in rows])
    left.set(xlabel="file, MB", ylabel=name)
    right.set(xlabel=f"latency, ms ({how})")
    figure.suptitle(f"Sweep for {result.target}; filled: no other beats it in all three")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


_SHADES = {"within": "#117733", "exceeds": "#cc3311", "cannot tell": "#ddaa33"}


def _latency_ms(row: Row, measured: bool) -> float:
    if measured:
        return float("nan") if row.timing is None else row.timing.ms
    time = row.predicted
    return float("nan") if time is None or time.ms is None else time.ms


def _scatter(axis: Any, rows: list[Row], values: list[float]) -> None:
    for row, x in zip(rows, values, strict=True):
        y, low, high = _height(row)
        shade = _SHADES.get(row.verdict, "#cc3311" if "over budget" in row.verdict else "#4477aa")
        face = shade if row.front else "none"
        axis.errorbar(
            [x], [y], yerr=[[y - low], [high - y]], fmt="o", color=shade, mfc=face, capsize=2
        )
        axis.annotate(row.name, (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axis.grid(alpha=0.3)


def _height(row: Row) -> tuple[float, float, float]:
    """The first metric and its interval, or signal to noise."""
    first = row.first_metric
    if first is not None:
        value = first[1].value
        low = value.value if value.low is None else min(value.low, value.value)
        high = value.value if value.high is None else max(value.high, value.value)
        return value.value, low, high
    if row.loss is None:
        return 0.0, 0.0, 0.0
    shown = min(-row.loss, 150.0)  # equal outputs have no noise at all
    return shown, shown, shown
