"""The command `sweep`: every recipe worth trying, made, judged and timed.

Thin, like `build`: options in, one call, a table or JSON out. Not here: what the options of an
evaluation mean (`evaluating`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console
from .arguments import parse_budget, parse_dims, parse_input_shapes, split_list
from .build import Dims, InputShapes, Json, Limits, Plugins, TargetName, load_plugins
from .evaluating import (
    Carry,
    Confident,
    Gate,
    Group,
    Labels,
    Logits,
    LossLimits,
    Metrics,
    Output,
    Predict,
    Slices,
    evaluation_of,
)

if TYPE_CHECKING:
    from ..search.result import SweepResult


def sweep(
    model: Annotated[str, typer.Argument(help="An .onnx file, or package.module:callable.")],
    target: TargetName = "host",
    recipes: Annotated[
        str,
        typer.Option(
            help="ptq: all post-training variants worth trying; prune: 10 to 70 % fewer channels, "
            "with and without int8; or recipes with commas."
        ),
    ] = "ptq",
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]RECIPE",
            help="One to try, which may have commas of its own; instead of --recipes.",
        ),
    ] = None,
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
    slice_: Slices = None,
    group: Group = None,
    gate: Gate = None,
    limit: LossLimits = None,
    confident: Confident = False,
    predict: Predict = None,
    output: Output = None,
    carry: Carry = None,
    logits: Logits = False,
    budget: Limits = None,
    by: Annotated[
        str, typer.Option(help="What the best is chosen by: both, size or latency.")
    ] = "both",
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Write table, JSON and the best artifact to this folder."),
    ] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Also a picture, in --out.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Where results are kept; by default the user's cache.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep nothing.")] = False,
    time_budget: Annotated[
        float, typer.Option(min=0, help="Seconds of timing for each recipe; 0 for none.")
    ] = 1.0,
    input_shape: InputShapes = None,
    dim: Dims = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Compile a model by every recipe worth trying, evaluate and time each, and name the best.

    Finished steps are kept: after Ctrl-C or a kill, the same command goes on where it was. Exits
    with 29 where no recipe that compresses the model is within the limits.
    """
    from ..search.choice import check_objective
    from ..search.sweep import AUTO
    from ..search.sweep import sweep as run

    check_objective(by)
    _check(data, out, plots, bool(metric or slice_ or limit or gate or group), no_cache and cache)
    load_plugins(plugin)
    evaluation = None
    if data is not None:
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
        )
    with console.told_on_interrupt(_KEPT_NOTHING if no_cache else _GOES_ON):
        with console.progress() as progress:
            result = run(
                model,
                target,
                _recipes(recipes, recipe),
                calibration=calibration,
                evaluate=evaluation,
                budget=parse_budget(budget),
                dims=parse_dims(dim or []) or None,
                input_shapes=parse_input_shapes(input_shape or []),
                time_budget_s=time_budget,
                cache=None if no_cache else cache or AUTO,
                progress=progress,
            )
        _show(result, by, out, plots, json)


_GOES_ON = "interrupted; what was finished is kept, and the same command goes on from there"
_KEPT_NOTHING = "interrupted; nothing was kept, as --no-cache says"


def _recipes(names: str, single: list[str] | None) -> str | list[str | tuple[str, str]]:
    """`ptq` or `prune`, a list from commas, or the `--recipe`s; `name=text` where what is before
    the first `=` is no part of a recipe's options."""
    if not single:
        return names if names in ("ptq", "prune") else list(split_list(names))
    found: list[str | tuple[str, str]] = []
    for text in single:
        name, equals, rest = text.partition("=")
        found.append((name.strip(), rest.strip()) if equals and "{" not in name else text)
    return found


def _check(data: str | None, out: Path | None, plots: bool, asks: bool, both: object) -> None:
    from ..errors import UsageError

    if asks and data is None:
        raise UsageError(
            "There is no data to measure metrics, slices and limits on", fix="give --data"
        )
    if plots and out is None:
        raise UsageError("--plots needs a folder to save to", fix="give --out")
    if both:
        raise UsageError("--cache and --no-cache contradict each other")


def _show(result: SweepResult, by: str, out: Path | None, plots: bool, json: bool) -> None:
    from ..errors import RegressionError

    best = result.best(by)
    saved = None if out is None else result.save(out, plots=plots, by=by)
    if json:
        console.print_json(result.as_dict(by=by))
    else:
        console.show(result.table(by=by))
        if saved is not None:
            files = ", ".join(sorted(path.name for path in saved.iterdir()))
            console.show(f"saved in {saved}: {files}")
    if not best:
        error = RegressionError(
            "No recipe that compresses the model is within the limits",
            where="" if best.nearest is None else best.nearest.name,
            why="; ".join(best.misses) or best.reason,
            fix="; ".join(f"{item.layer}: {item.remedy}" for item in best.blame if item.remedy)
            or "widen the limits, or give recipes of your own",
        )
        console.show_error(error.diagnostic, as_json=False)
        raise typer.Exit(error.exit_code)
