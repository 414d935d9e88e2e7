"""Pictures of what `inspect` found: error by depth, and distributions of a layer.

Here: `save_plots`. matplotlib is imported here only, and draws to files without a display.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependencyError

if TYPE_CHECKING:
    from .internals import Internals, Layer

_EXACT = 100.0
"""dB from which a layer counts as exact, and is not drawn."""
_FEW = 3
_COLOURS = ("#1f77b4", "#d62728")


def save_plots(found: Internals, folder: Path, layers: Sequence[str] | None) -> list[Path]:
    """Write the pictures; returns the files.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        UsageError: there is no such layer.
    """
    if layers is None:
        worst = sorted(found.layers, key=lambda x: x.injected.sqnr)[:_FEW]
        guilty = list(dict.fromkeys(c.candidate for c in found.culprits))
        layers = guilty or [x.candidate for x in worst]
    chosen = [found[name] for name in layers]
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "error-by-depth.png"]
    _save(_depth(found), files[0])
    for index, layer in enumerate(chosen):
        name = re.sub(r"[^\w.-]+", "_", layer.name).strip("._")[-80:]
        files.append(folder / f"layer-{index + 1:02}-{name}.png")
        _save(_distributions(layer), files[-1])
    return files


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "A plot needs matplotlib", why=str(error), fix="pip install 'edgepass[plot]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, columns, i + 1) for i in range(columns)]


def _save(figure: Any, path: Path) -> None:
    # The version of matplotlib is no part of the picture: the same result, the same bytes.
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _depth(found: Internals) -> Any:
    layers = found.layers
    figure, (axes,) = _figure(max(7.0, min(24.0, 0.16 * len(layers) + 3)), 4.5)
    places = range(len(layers))
    for name, colour, marker in (("injected", _COLOURS[0], "o"), ("accumulated", _COLOURS[1], ".")):
        values = [_drawn(getattr(layer, name).sqnr) for layer in layers]
        label = f"{name}: {'the layer alone' if name == 'injected' else 'the model as it runs'}"
        axes.plot(
            places,
            values,
            marker=marker,
            linewidth=0 if name == "injected" else 1,
            color=colour,
            label=label,
        )
    flagged = [i for i, layer in enumerate(layers) if layer.causes]
    if flagged:
        axes.plot(
            flagged,
            [_drawn(layers[i].injected.sqnr) for i in flagged],
            linestyle="",
            marker="x",
            markersize=11,
            color="black",
            label="out of its expected range",
        )
    axes.set_ylabel("signal to error, dB")
    axes.set_xlabel("layer, in the order of the model")
    if len(layers) <= 60:
        axes.set_xticks(list(places), [_short(layer.name) for layer in layers], rotation=90)
        axes.tick_params(axis="x", labelsize=6)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title("Error by depth")
    return figure


def _distributions(layer: Layer) -> Any:
    figure, axes = _figure(5.0 * (1 + len(layer.weights[:1])), 4.0, 1 + len(layer.weights[:1]))
    activation = layer.activation
    _bars(axes[0], *activation.histogram)
    for bound in (activation.quant_low, activation.quant_high):
        if bound is not None:
            axes[0].axvline(bound, color="black", linestyle="--", linewidth=1)
    injected = _text(layer.injected.sqnr)
    axes[0].set_title(f"activation, {layer.dtype}; {injected} alone", fontsize=9)
    for axis, weight in zip(axes[1:], layer.weights, strict=False):
        _bars(axis, *weight.histogram)
        axis.set_title(f"weight, {weight.bits} bits; {_text(weight.sqnr)}", fontsize=9)
    causes = ", ".join(c.replace("_", " ") for c in layer.causes)
    figure.suptitle(f"{_short(layer.name, 60)} ({layer.op}){': ' + causes if causes else ''}")
    return figure


def _bars(axes: Any, edges: Sequence[float], ours: Sequence[int], theirs: Sequence[int]) -> None:
    for counts, colour, label in (
        (ours, _COLOURS[0], "original"),
        (theirs, _COLOURS[1], "candidate"),
    ):
        axes.stairs(counts, edges, color=colour, label=label, fill=label == "original", alpha=0.6)
    axes.set_yscale("symlog")
    axes.set_ylabel("elements")
    axes.legend(fontsize=8)


def _drawn(value: float) -> float:
    return math.nan if math.isnan(value) or value >= _EXACT else max(value, -20.0)


def _text(value: float) -> str:
    if math.isinf(value):
        return "exact" if value > 0 else "lost"
    return f"{value:.0f} dB"


def _short(name: str, length: int = 28) -> str:
    return name if len(name) <= length else "..." + name[-length + 3 :]
