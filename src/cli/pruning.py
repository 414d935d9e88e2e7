"""The command `prune`: what pruning would cost and gain, group by group; or a pruned artifact.

Thin: options in, one call, a table or JSON out. Not here: what the options of an evaluation mean
(`evaluating`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RegressionError, UsageError
from . import console
from .arguments import parse_budget, parse_dims, parse_input_shapes
from .build import Dims, InputShapes, Json, Limits, Plugins, TargetName, load_plugins
from .evaluating import (
    Carry,
    Confident,
    Gate,
    Labels,
    Logits,
    LossLimits,
    Metrics,
    Output,
    Predict,
    evaluation_of,
)

if TYPE_CHECKING:
    from ..evaluation.evaluation import Evaluation
    from ..search.prune_search import Pruned


def prune(
    model: Annotated[str, typer.Argument(help="An .onnx file, or package.module:callable.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--out", help="The artifact's folder.")
    ] = None,
    scan: Annotated[
        bool, typer.Option("--scan", help="Make nothing: show what each group costs and gains.")
    ] = False,
    target: TargetName = "host",
    ratio: Annotated[
        float | None, typer.Option(help="The share to prune, 0.3 if nothing else says how much.")
    ] = None,
    budget: Limits = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "-r",
            help="prune with its options, and what else: 'prune{heads=whole}+int8'.",
        ),
    ] = "prune",
    calibration: Annotated[
        Path | None,
        typer.Option(help="Samples: an .npz of stacked arrays, or a folder of .npz files."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="What to evaluate on: an .npz of stacked arrays (and labels), a folder of .npz "
            "files, or module:function. Without it, outputs are compared on --calibration."
        ),
    ] = None,
    labels: Labels = None,
    metric: Metrics = None,
    gate: Gate = None,
    limit: LossLimits = None,
    confident: Confident = False,
    predict: Predict = None,
    output_name: Output = None,
    carry: Carry = None,
    logits: Logits = False,
    step: Annotated[float, typer.Option(help="Ratios tried are multiples of it.")] = 0.05,
    most: Annotated[float, typer.Option(help="The largest ratio that is tried.")] = 0.9,
    samples: Annotated[int, typer.Option(min=1, help="--scan: samples to look at at most.")] = 96,
    lines: Annotated[int, typer.Option(help="--scan: lines of the table.")] = 60,
    time_budget: Annotated[
        float, typer.Option(min=0, help="Seconds of timing for each ratio; 0 for none.")
    ] = 0.5,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the folder even if it is not an artifact.")
    ] = False,
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="Keep int8 even where float is faster.")
    ] = False,
    input_shape: InputShapes = None,
    dim: Dims = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Make a model physically smaller: fewer channels, heads and features.

    How much: --ratio, --budget, or as much as --limit and --gate allow. With --scan, the groups of
    the model, what pruning each would gain and cost, and why others can't be pruned. Exits with 29
    where budget or limits can't be met.
    """
    if scan and (output is not None or budget is not None or limit or gate):
        raise UsageError("--scan makes nothing", fix="leave -o, --budget, --limit and --gate out")
    if not scan and output is None:
        raise UsageError("There is no folder to write to", fix="give -o FOLDER, or --scan")
    if data is None and (labels or metric or gate or limit or predict or output_name or carry):
        raise UsageError("There is no data to measure metrics and limits on", fix="give --data")
    load_plugins(plugin)
    evaluation = None
    if data is not None:
        evaluation = evaluation_of(
            data,
            labels=labels,
            metrics=metric,
            gate=gate,
            limits=limit,
            confident=confident,
            predict=predict,
            output=output_name,
            carry=carry,
            logits=logits,
        )
    shared: dict[str, Any] = {
        "recipe": recipe,
        "dims": parse_dims(dim or []) or None,
        "input_shapes": parse_input_shapes(input_shape or []),
    }
    if scan:
        given = calibration if calibration is not None else evaluation
        _scan(model, target, given, ratio, samples, lines, json, shared)
        return
    from ..search.prune_search import prune as run

    limits = parse_budget(budget)
    if ratio is None and limits is None and not (evaluation is not None and evaluation.limits):
        from ..pipelines import pruning_pass

        ratio = float(vars(pruning_pass(recipe))["ratio"])
    with console.progress() as progress:
        found = run(
            model,
            target,
            ratio=ratio,
            budget=limits,
            evaluation=evaluation,
            calibration=calibration,
            step=step,
            most=most,
            time_budget_s=time_budget,
            force=allow_slower,
            progress=progress,
            **shared,
        )
        if found.compiled is not None and output is not None:
            found.save(output, force=force)
    _show(found, output, json)


def _scan(
    model: str,
    target: str,
    given: Path | Evaluation | None,
    ratio: float | None,
    samples: int,
    lines: int,
    json: bool,
    shared: dict[str, Any],
) -> None:
    from ..search.prune_scan import prune_scan

    with console.progress() as progress:
        found = prune_scan(
            model,
            target,
            ratio=ratio,
            calibration=given,
            samples=samples,
            progress=progress,
            **shared,
        )
    if json:
        console.print_json(found.as_dict())
    else:
        console.show(found.table(lines))


def _show(found: Pruned, output: Path | None, json: bool) -> None:
    saved = None if found.compiled is None else str(output)
    if json:
        console.print_json(found.as_dict() | {"artifact": saved})
    else:
        ledger = [] if found.compiled is None else [found.compiled.ledger.table()]
        console.show(*ledger, found.table())
        if found.compiled is not None and found.compiled.speed is not None:
            console.show(str(found.compiled.speed))
        if saved is not None:
            console.show(f"saved to {saved}")
    if not found:
        error = RegressionError(
            "Pruning does not meet what was asked of it",
            why=found.reason,
            fix="widen the budget or the limits; `edgepass prune --scan` shows where it hurts",
        )
        console.show_error(error.diagnostic, as_json=False)
        raise typer.Exit(error.exit_code)
