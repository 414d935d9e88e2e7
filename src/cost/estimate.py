"""Several recipes of one architecture side by side: tables, a picture, verdicts on a budget.

Here: `Estimate`. Not here: the cost of one recipe (`report`), running recipes (`architecture`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError, UsageError
from .budget import Answer, Budget, Verdict
from .latency import format_ms
from .report import CostReport, KernelRow, NodeRow
from .text import format_bytes, format_count


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The reports of several recipes on one target; `failed` gives why others have none.

    `budget`: what they are held against, if anything.
    """

    target: str
    rows: tuple[CostReport, ...]
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    budget: Budget | None = None

    def __getitem__(self, recipe: str) -> CostReport:
        for row in self.rows:
            if row.recipe == recipe:
                return row
        raise UsageError(
            f"The estimate has no recipe {recipe!r}",
            where=f"estimate for {self.target}",
            why=self.failed.get(recipe, ""),
            fix=f"it has: {', '.join(row.recipe for row in self.rows) or 'none'}",
        )

    def verdicts(self, recipe: str) -> tuple[Verdict, ...]:
        """A verdict of one recipe on each limit of the budget; none without a budget.

        Raises:
            UsageError: no report of that recipe.
        """
        return () if self.budget is None else self.budget.check(self[recipe])

    def offenders(self, recipe: str, n: int = 10) -> tuple[KernelRow, ...]:
        """The `n` kernels predicted to take longest, longest first.

        Raises:
            UsageError: no report of that recipe.
        """
        return self[recipe].offenders(n)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        rows = []
        for row in self.rows:
            plain = row.as_dict()
            if self.budget is not None:
                plain["budget"] = {
                    "answer": str(self.budget.answer(row)),
                    "limits": [verdict.as_dict() for verdict in self.budget.check(row)],
                }
            rows.append(plain)
        return {"target": self.target, "recipes": rows, "failed": dict(self.failed)}

    # --- tables ----------------------------------------------------------------------------------

    def table(self) -> Any:
        """A rich renderable: a line a recipe, and below the table what each should be read with.

        Every latency says whether it is measured, calibrated or assumed. Fits 80 columns.
        """
        from rich.console import Group
        from rich.padding import Padding
        from rich.text import Text

        shown = ["recipe", "file", "peak activations", "MACs", "latency"]
        if self.budget is not None:
            shown.append("budget")
        table = _table(f"Estimate for {self.target}", shown, left=("recipe",))
        remarks = []
        for line in self._lines():
            cells = dict(zip(_HEADINGS, line, strict=True))
            table.add_row(*(cells[heading] for heading in shown))
        for recipe, texts in self._remarks():
            remarks += [
                Padding(Text(f"{recipe}: {text}", style="dim"), (0, 0, 0, 2)) for text in texts
            ]
        return Group(table, *remarks)

    def per_kernel_table(self, recipe: str) -> Any:
        """A `rich.table.Table`: a line a launch of the runtime, in the order in which they run.

        Raises:
            UsageError: no report of that recipe.
        """
        report = self[recipe]
        title = f"{recipe} on {self.target}, by kernel (times are {report.latency.label})"
        table = _table(title, _KERNEL_HEADINGS, left=("kernel", "node", "dtype", "source"))
        for row in report.kernels:
            table.add_row(
                row.op,
                row.dtype,
                "?" if row.shape is None else "x".join(map(str, row.shape)) or "scalar",
                format_count(row.macs),
                format_bytes(row.bytes_read),
                format_bytes(row.bytes_written),
                format_bytes(row.weight_bytes),
                format_ms(row.ms),
                "?" if row.share is None else f"{row.share:.1%}",
                row.nodes[0] if row.nodes else "",
                row.source,
            )
        return table

    def per_node_table(self, recipe: str) -> Any:
        """A `rich.table.Table`: a line a node of one recipe's graph.

        Raises:
            UsageError: no report of that recipe.
        """
        report = self[recipe]
        title = f"{recipe} on {self.target}, by node (times are {report.latency.label})"
        table = _table(title, _NODE_HEADINGS, left=("node", "op", "kernel", "source"))
        for row in report.nodes:
            table.add_row(*_node_cells(row))
        return table

    def _lines(self) -> list[tuple[str, ...]]:
        lines = []
        for row in self.rows:
            answer = "" if self.budget is None else str(self.budget.answer(row))
            lines.append((row.recipe, *row.cells, answer, "; ".join(row.notes)))
        for recipe, why in self.failed.items():
            lines.append((recipe, *["-"] * 6, "", " ".join(why.split())))
        return lines

    def _remarks(self) -> list[tuple[str, list[str]]]:
        """What stands below the table; what several recipes share is said once."""
        found: list[tuple[str, list[str]]] = []
        told: set[str] = set()
        for row in self.rows:
            texts = []
            if self.budget is not None:
                missed = [v for v in self.budget.check(row) if v.answer is not Answer.MET]
                texts += [verdict.text for verdict in missed]
            worst = [
                f"{kernel.op} ({kernel.where}) {kernel.share:.0%}"
                for kernel in row.offenders(3)
                if kernel.share is not None
            ]
            if worst:
                texts.append(f"most time: {', '.join(worst)}")
            texts += [f"{item.text}{_at(item.source)}" for item in row.advice]
            texts += row.notes
            new = [text for text in texts if text not in told]
            told.update(new)
            found.append((row.recipe, new))
        found += [(recipe, [" ".join(why.split())]) for recipe, why in self.failed.items()]
        return found

    def __str__(self) -> str:
        headings = [h for h in _HEADINGS if h != "budget" or self.budget is not None]
        lines = [tuple(headings)]
        for line in self._lines():
            cells = dict(zip(_HEADINGS, line, strict=True))
            lines.append(tuple(cells[heading] for heading in headings))
        widths = [max(len(line[i]) for line in lines) for i in range(len(headings) - 1)]
        return "\n".join(
            "  ".join(
                [line[0].ljust(widths[0])]
                + [line[i].rjust(widths[i]) for i in range(1, len(widths))]
                + [line[-1]]
            ).rstrip()
            for line in lines
        )

    # --- picture ---------------------------------------------------------------------------------

    def plot(self, path: str | Path) -> Path:
        """Save a picture: size, peak memory, and latency with its interval, a bar a recipe.

        The file's ending says the format: .png, .svg, .pdf. Limits of the budget are lines.

        Raises:
            MissingDependencyError: matplotlib is not installed.
            UsageError: there is nothing to show, or no such format.
        """
        if not self.rows:
            raise UsageError(
                "The estimate has nothing to plot",
                where=f"estimate for {self.target}",
                why="no recipe could be priced",
            )
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingDependencyError(
                "A plot needs matplotlib", why=str(error), fix="pip install 'edgepass[plot]'"
            ) from error
        figure = Figure(figsize=(11, 1.6 + 0.45 * len(self.rows)), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        path = Path(path)
        kinds = canvas.get_supported_filetypes()
        if path.suffix[1:] not in kinds:
            raise UsageError(
                f"A plot can't be saved as {path.suffix or 'a file without an ending'!r}",
                where=str(path),
                fix="end the name in .png, .svg or .pdf",
            )
        self._draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        return path

    def _draw(self, figure: Any) -> None:
        names = [row.recipe for row in self.rows]
        budget = self.budget
        panels = (
            ("file, MB", [row.file_bytes / 1e6 for row in self.rows], budget and budget.size_mb),
            (
                "peak activations, MB",
                [(row.peak_activation_bytes or 0) / 1e6 for row in self.rows],
                budget and budget.memory_mb,
            ),
            (
                "latency, ms",
                [row.latency.ms or 0.0 for row in self.rows],
                budget and budget.latency_ms,
            ),
        )
        axes = figure.subplots(1, len(panels), sharey=True)
        for axis, (title, values, limit) in zip(axes, panels, strict=True):
            shades = [_SHADES.get(row.latency.label, "0.6") for row in self.rows]
            axis.barh(names, values, color=shades if "latency" in title else "#4477aa")
            if "latency" in title:
                low = [v - (r.latency.low_ms or v) for r, v in zip(self.rows, values, strict=True)]
                high = [
                    (r.latency.high_ms or v) - v for r, v in zip(self.rows, values, strict=True)
                ]
                axis.errorbar(values, names, xerr=[low, high], fmt="none", ecolor="0.2", capsize=3)
                labels = sorted({row.latency.label for row in self.rows})
                title += f" ({', '.join(labels)}, 80 % interval)"
            if limit:
                axis.axvline(limit, color="#cc3311", linestyle="--", label="limit")
                axis.legend(loc="lower right")
            axis.set_title(title, fontsize=10)
        axes[0].invert_yaxis()
        figure.suptitle(f"Estimate for {self.target}")


_SHADES = {"measured": "#117733", "calibrated": "#4477aa", "assumed": "#bbbbbb"}
_HEADINGS = (
    "recipe",
    "file",
    "peak activations",
    "parameters",
    "MACs",
    "bytes moved",
    "latency",
    "budget",
    "notes",
)
_KERNEL_HEADINGS = (
    "kernel",
    "dtype",
    "output",
    "MACs",
    "read",
    "written",
    "weights",
    "ms",
    "share",
    "node",
    "source",
)
_NODE_HEADINGS = (
    "node",
    "op",
    "output",
    "MACs",
    "read",
    "written",
    "weights",
    "alive",
    "kernel",
    "ms",
    "source",
)


def _table(title: str, headings: Any, left: tuple[str, ...]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
    return table


def _at(source: str) -> str:
    return f" [{source}]" if source else ""


def _node_cells(row: NodeRow) -> tuple[str, ...]:
    return (
        row.name,
        row.op,
        "?" if row.shape is None else "x".join(str(d) for d in row.shape) or "scalar",
        format_count(row.macs),
        format_bytes(row.bytes_read),
        format_bytes(row.bytes_written),
        format_bytes(row.weight_bytes),
        format_bytes(row.alive_bytes),
        row.kernel,
        format_ms(row.ms),
        row.source,
    )
