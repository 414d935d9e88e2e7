"""Plots of a report and of a sweep, as PNG files.

Here: `save_plots`, `pareto_plot`. Not here: distributions and error by depth (`internals`).
matplotlib is an optional extra; nothing here needs a display.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingDependencyError
from .report import ORIGINAL, Estimate

if TYPE_CHECKING:
    from .report import Report

_MOST_SLICES = 25


@dataclasses.dataclass(frozen=True)
class Point:
    """A model in a plot: cost along x, quality with its interval along y."""

    name: str
    x: float
    y: Estimate
    front: bool = False


def save_plots(report: Report, folder: Path) -> list[Path]:
    """`metrics.png`, `slices.png`, and `size_METRIC.png` as far as there is something to plot.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure_class()
    folder.mkdir(parents=True, exist_ok=True)
    saved = []
    if report.original.metrics:
        saved.append(_metrics(report, folder / "metrics.png"))
    if any(rung.slices for rung in report.candidates):
        saved.append(_slices(report, folder / "slices.png"))
    sized = [rung for rung in report.rungs if rung.bytes]
    if len(sized) > 1:
        for name, metric in report.original.metrics.items():
            points = [Point(r.name, r.bytes / 1e6, r.metrics[name].value) for r in sized if r.bytes]
            marked = mark_front(points, higher_is_better=metric.higher_is_better)
            path = folder / f"size_{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.png"
            saved.append(pareto_plot(marked, path, x="size, MB", y=name))
    return saved


def figure_class() -> Any:
    """matplotlib's `Figure`, without a display.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "A plot needs matplotlib", why=str(error), fix="pip install 'edgepass[plot]'"
        ) from error
    return Figure


def mark_front(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """The points with `front` set where no other is at least as cheap and as good, and better in
    one."""
    sign = 1 if higher_is_better else -1

    def beaten(point: Point) -> bool:
        return any(
            other.x <= point.x
            and sign * other.y.value >= sign * point.y.value
            and (other.x < point.x or sign * other.y.value > sign * point.y.value)
            for other in points
        )

    return [dataclasses.replace(point, front=not beaten(point)) for point in points]


def pareto_plot(points: Sequence[Point], path: Path, *, x: str, y: str) -> Path:
    """Cost against quality; points of the front are filled and joined by a line.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = figure_class()(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    front = sorted((point for point in points if point.front), key=lambda point: point.x)
    axes.plot([p.x for p in front], [p.y.value for p in front], color="0.7", zorder=1)
    for point in points:
        low, high = _arms(point.y)
        axes.errorbar(
            [point.x],
            [point.y.value],
            yerr=[[low], [high]],
            fmt="o",
            capsize=3,
            color="C0" if point.front else "0.55",
            markerfacecolor="C0" if point.front else "white",
        )
        axes.annotate(
            _plain(point.name),
            (point.x, point.y.value),
            (5, 5),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return _saved(figure, path)


def _metrics(report: Report, path: Path) -> Path:
    names = list(report.original.metrics)
    height = 1.2 + 0.35 * len(report.rungs)
    figure = figure_class()(figsize=(8, height * len(names)), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(len(names), 1, i + 1)
        for row, rung in enumerate(reversed(report.rungs)):
            value = rung.metrics[name].value
            low, high = _arms(value)
            color = "0.3" if rung.name == ORIGINAL else "C0"
            axes.errorbar(
                [value.value], [row], xerr=[[low], [high]], fmt="o", capsize=3, color=color
            )
        axes.axvline(report.original.metrics[name].value.value, color="0.8", zorder=0)
        axes.set_yticks(range(len(report.rungs)), [_plain(r.name) for r in reversed(report.rungs)])
        axes.set_ylim(-0.6, len(report.rungs) - 0.4)
        axes.set_xlabel(f"{_plain(name)}, {report.confidence:.0%} interval")
    return _saved(figure, path)


def _slices(report: Report, path: Path) -> Path:
    """Change of each slice, the most harmed on top; harmed ones in red."""
    rungs = [rung for rung in report.candidates if rung.slices]
    most = max(min(len(rung.slices), _MOST_SLICES) for rung in rungs)
    size = (8, (1.2 + 0.25 * most) * len(rungs))
    figure = figure_class()(figsize=size, layout="constrained")
    for i, rung in enumerate(rungs):
        axes = figure.add_subplot(len(rungs), 1, i + 1)
        rows = [row for row in rung.slices if np.isfinite(row.difference)][:_MOST_SLICES][::-1]
        colors = ["C3" if row.harmed else "0.6" for row in rows]
        axes.barh(range(len(rows)), [row.difference for row in rows], color=colors)
        labels = [_plain(f"{row.name}, {row.metric} ({row.count})") for row in rows]
        axes.set_yticks(range(len(rows)), labels, fontsize=8)
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set_title(_plain(rung.name), loc="left", fontsize=10)
        axes.set_xlabel("change from the original")
    return _saved(figure, path)


def _arms(estimate: Estimate) -> tuple[float, float]:
    if estimate.low is None or estimate.high is None:
        return 0.0, 0.0
    return max(0.0, estimate.value - estimate.low), max(0.0, estimate.high - estimate.value)


def _plain(text: str) -> str:
    """A `$` would start a formula."""
    return text.replace("$", r"\$")


def _saved(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path
