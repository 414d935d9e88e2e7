"""The command `evaluate`, and reading its options: data, metrics, slices, gates.

Not here: what an evaluation does (`evaluation`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RegressionError, UsageError
from . import console

if TYPE_CHECKING:
    from ..evaluation.evaluation import Evaluation
    from ..evaluation.report import Report


Data = Annotated[
    str,
    typer.Option(
        help="An .npz of stacked arrays (and labels), a folder of .npz files, or "
        "module:function that returns samples."
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(help="An .npy or .txt file, or the entry of --data; by default labels or y."),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", metavar="[NAME=]METRIC", help="A built-in name, or module:function."),
]
Slices = Annotated[
    list[str] | None,
    typer.Option("--slice", metavar="[NAME=]SLICE", help="module:function, or an entry of --data."),
]
Group = Annotated[str | None, typer.Option(help="As --slice: samples that are resampled together.")]
Gate = Annotated[Path | None, typer.Option(help="A TOML file with limits: docs/evaluation.md.")]
LossLimits = Annotated[
    list[str] | None,
    typer.Option("--limit", metavar="METRIC=LIMIT", help="auc=-0.003, 'f1=-1%', 'wer<=0.05'."),
]
Confident = Annotated[
    bool, typer.Option("--confident", help="A limit must hold for the whole interval.")
]
Predict = Annotated[
    str | None, typer.Option(help="module:function from outputs to what metrics see.")
]
Output = Annotated[str | None, typer.Option("--output", help="Which output the metrics see.")]
Carry = Annotated[
    list[str] | None,
    typer.Option(metavar="OUTPUT=INPUT", help="A state handed from step to step."),
]
Logits = Annotated[
    bool, typer.Option("--logits", help="Softmax outputs for the calibration error.")
]


def evaluate(
    original: Annotated[str, typer.Argument(help="A model file, or an artifact's folder.")],
    candidates: Annotated[
        list[str], typer.Argument(help="Models to hold against it; NAME=PATH gives a name.")
    ],
    data: Data,
    labels: Labels = None,
    metric: Metrics = None,
    slice_: Slices = None,
    group: Group = None,
    gate: Gate = None,
    limit: LossLimits = None,
    confident: Confident = False,
    predict: Predict = None,
    output: Output = None,
    carry: Carry = None,
    logits: Logits = False,
    resamples: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 1000,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    json: Annotated[
        Path | None, typer.Option(help="Write the report to this file; - for stdout.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Write plots to this folder.")] = None,
) -> None:
    """What compression did to a model, on data: metrics, slices, flips, a verdict.

    Exits with 29 where a candidate is not within the limits of `--gate` or `--limit`.
    """
    evaluation = evaluation_of(
        data,
        labels=labels,
        metrics=metric,
        slices=slice_,
        group=group,
        gate=gate,
        limits=limit,
        confident=confident,
        predict=predict,
        output=output,
        carry=carry,
        logits=logits,
        resamples=resamples,
        confidence=confidence,
    )
    report = _run(evaluation, original, candidates)
    _show(report, json, plots)
    if report.regressed:
        error = _regression(report)
        console.show_error(error.diagnostic, as_json=False)  # a report may be on stdout already
        raise typer.Exit(error.exit_code)


def evaluation_of(
    data: str,
    *,
    labels: str | None = None,
    metrics: Sequence[str] | None = None,
    slices: Sequence[str] | None = None,
    group: str | None = None,
    gate: Path | None = None,
    limits: Sequence[str] | None = None,
    confident: bool = False,
    predict: str | None = None,
    output: str | None = None,
    carry: Sequence[str] | None = None,
    logits: bool = False,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Evaluation:
    """The evaluation that a command's options mean.

    Raises:
        UsageError: an option that can't be read, or names what is not there.
    """
    from ..evaluation.evaluation import Evaluation

    allowed, strict = _gate(gate)
    return Evaluation(
        data=_data(data),
        labels=_labels(labels),
        metrics=_metrics(metrics or []),
        slices={name: _loaded(text) for name, text in _pairs(slices or []).items()},
        group=None if group is None else _loaded(group),
        limits=allowed | _limits(limits or []),
        confident=confident or strict,
        predict=None if predict is None else _loaded(predict),
        output=output,
        carry=_carry(carry or []),
        logits=logits,
        resamples=resamples,
        confidence=confidence,
    )


def _run(evaluation: Evaluation, original: str, candidates: Sequence[str]) -> Report:
    named: dict[str, str] = {}
    for text in candidates:
        name, equals, path = text.partition("=")
        found = {name: path} if equals else {one.rstrip("/"): one for one in _models_in(text)}
        for key, one in found.items():
            if key in named:
                raise UsageError(f"Two candidates are called {key!r}", fix="name them: NAME=PATH")
            named[key] = one
    with console.progress() as progress:
        return evaluation.run(original, named, progress=progress)


def _models_in(text: str) -> list[str]:
    """An artifact or file as it is; of another folder, the artifacts and ONNX files in it."""
    from ..manifest import is_artifact

    folder = Path(text)
    if not folder.is_dir() or is_artifact(folder):
        return [text]
    inside = [p for p in sorted(folder.iterdir()) if p.suffix == ".onnx" or is_artifact(p)]
    return [str(path) for path in inside] or [text]


def _show(report: Report, json: Path | None, plots: Path | None) -> None:
    if json is not None and str(json) != "-":
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(console.json_text(report.as_dict()), encoding="utf-8")
    saved = [] if plots is None else report.save_plots(plots)
    if json is not None and str(json) == "-":
        console.print_json(report.as_dict())
        return
    console.show(report.table())
    if any(rung.slices for rung in report.candidates):
        console.show(report.slice_table())
    console.show(*(f"note: {note}" for note in report.notes))
    if saved:
        console.show(f"plots in {saved[0].parent}")


def _regression(report: Report) -> RegressionError:
    broken = [
        f"{name}: {held.name} {held.limit}, {held.verdict}, {held.why or f'it is {held.value:.4g}'}"
        for name in report.regressed
        for held in report[name].limits
        if held.verdict != "within"
    ]
    return RegressionError(
        f"{len(report.regressed)} of {len(report.candidates)} candidates are not within the limits",
        where="; ".join(report.regressed),
        why="; ".join(broken),
        fix="compile with less loss, or widen the limits if this is acceptable",
    )


# --- options -----------------------------------------------------------------------------------


def _pairs(items: Sequence[str]) -> dict[str, str]:
    """`name=what`, or `module:function` and plain names, which name themselves."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, what = item.partition("=")
        if not equals:
            name, what = item.rpartition(":")[2], item
        if name in found:
            raise UsageError(f"{name!r} is given twice", fix="name them apart: NAME=...")
        found[name] = what
    return found


def _loaded(text: str) -> Any:
    from ..evaluation.metrics import named_function

    return named_function(text)


def _metrics(items: Sequence[str]) -> dict[str, Any]:
    return {name: _loaded(text) for name, text in _pairs(items).items()}


def _data(text: str) -> Any:
    if Path(text).exists() or ":" not in text:
        return text
    return _loaded(text)


def _labels(text: str | None) -> Any:
    """An entry's name, or labels read from a file.

    Raises:
        UsageError: a file of another kind.
    """
    import numpy as np

    if text is None or not Path(text).is_file():
        return text
    path = Path(text)
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8").splitlines()
        return np.array([_number(line) for line in lines])
    if path.suffix == ".npz":
        from ..npz import read_npz

        arrays = read_npz(path)
        if len(arrays) == 1:
            return next(iter(arrays.values()))
    raise UsageError(
        f"Labels can't be read from {text!r}",
        fix="give an .npy, a .txt with a label a line, or an .npz of one array",
    )


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _carry(items: Sequence[str]) -> dict[str, str] | None:
    pairs = [item.partition("=") for item in items]
    for item, (name, equals, target) in zip(items, pairs, strict=True):
        if not (name and equals and target):
            raise UsageError(f"--carry {item!r} can't be read", fix="give OUTPUT=INPUT")
    return {name: target for name, _, target in pairs} or None


def _limits(items: Sequence[str]) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for item in items:
        mark = next((m for m in ("<=", ">=", "<", ">", "=") if m in item), "")
        name, _, bound = item.partition(mark) if mark else ("", "", "")
        if not name or not bound:
            raise UsageError(f"--limit {item!r} can't be read", fix="give METRIC=-0.003")
        found[name.strip()] = bound.strip() if mark == "=" else f"{mark} {bound.strip()}"
    return found


def _gate(path: Path | None) -> tuple[dict[str, float | str], bool]:
    """The table `[limits]`, and whether `confident = true` stands above it.

    Raises:
        UsageError: not TOML, or without limits.
    """
    if path is None:
        return {}, False
    try:
        found: Mapping[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"The gate {str(path)!r} can't be read", why=str(error)) from error
    limits = found.get("limits")
    unknown = set(found) - {"limits", "confident"}
    if not isinstance(limits, dict) or not limits or unknown:
        raise UsageError(
            f"The gate {str(path)!r} has no table of limits",
            why=f"it has {', '.join(sorted(found)) or 'nothing'}",
            fix='[limits]\nauc = -0.003\nwer = "<= 0.05"',
        )
    return dict(limits), bool(found.get("confident", False))
