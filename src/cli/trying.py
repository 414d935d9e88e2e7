"""The command `sensitivity`: what 8 bits in each layer do.

Thin: options in, one call, a table or JSON out. Not here: what the options of an evaluation mean
(`evaluating`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from . import console
from .arguments import parse_dims
from .build import Dims, Plugins, TargetName, load_plugins
from .evaluating import (
    Carry,
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
    from ..search.mixed import Mixed
    from ..search.sensitivity import Sensitivity
    from ..search.trials import Progress


def sensitivity(
    model: Annotated[str, typer.Argument(help="An .onnx file, or package.module:callable.")],
    calibration: Annotated[
        Path, typer.Option(help="Samples: an .npz of stacked arrays, or a folder of .npz files.")
    ],
    target: TargetName = "host",
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Static int8 with options: 'int8{observer=mse}'.")
    ] = "int8",
    data: Annotated[
        str | None,
        typer.Option(
            help="What to measure metrics on: an .npz of stacked arrays (and labels), a folder of "
            ".npz files, or module:function. Without it, outputs are compared on --calibration."
        ),
    ] = None,
    labels: Labels = None,
    metric: Metrics = None,
    gate: Gate = None,
    limit: LossLimits = None,
    predict: Predict = None,
    output: Output = None,
    carry: Carry = None,
    logits: Logits = False,
    mixed: Annotated[
        bool,
        typer.Option("--mixed", help="Also find the fewest layers to keep float: --limit, --gate."),
    ] = False,
    db: Annotated[
        float | None, typer.Option(help="--mixed without --data: dB of signal to error to reach.")
    ] = None,
    at_most: Annotated[
        int | None, typer.Option(min=0, help="--mixed: keep so many layers float at most.")
    ] = None,
    macs: Annotated[
        float | None, typer.Option(help="--mixed: keep so large a share of the MACs at most.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of --calibration to try layers on.")] = 16,
    max_runs: Annotated[int, typer.Option(min=1, help="Runs of the model at most.")] = 50_000,
    lines: Annotated[int, typer.Option(help="Lines of the table: the most harmful.")] = 40,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Effect by depth, as a PNG file.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for the terminal.")
    ] = None,
    dim: Dims = None,
    plugin: Plugins = None,
) -> None:
    """What 8 bits in each layer do: that layer alone, and all but it.

    With --mixed, --db, --at-most or --macs also which layers to keep float; exits with 29 where no
    choice meets the limits.
    """
    from ..search.sensitivity import sensitivity as run

    wanted = mixed or db is not None or at_most is not None or macs is not None
    _check(data, db, bool(metric or limit or gate or labels))
    load_plugins(plugin)
    evaluation = None
    if data is not None:
        evaluation = evaluation_of(
            data,
            labels=labels,
            metrics=metric,
            gate=gate,
            limits=limit,
            predict=predict,
            output=output,
            carry=carry,
            logits=logits,
        )
    with console.progress() as progress:
        found = run(
            model,
            target,
            calibration=calibration,
            evaluate=evaluation,
            recipe=recipe,
            samples=samples,
            max_runs=max_runs,
            dims=parse_dims(dim or []) or None,
            progress=_announcing(progress),
        )
        choice = None
        if wanted:
            choice = found.mixed(db, at_most=at_most, macs=macs, progress=progress)
    _show(found, choice, lines, json)
    if plot is not None:
        console.say(f"picture in {found.save_plot(plot)}")
    if choice is not None and not choice:
        raise typer.Exit(_refused(choice))


def _check(data: str | None, db: float | None, asks: bool) -> None:
    if asks and data is None:
        raise UsageError("There is no data to measure metrics and limits on", fix="give --data")
    if db is not None and data is not None:
        raise UsageError(
            "--db limits the outputs' error, and with --data limits are on figures",
            fix=f"--limit 'sqnr_db>={db:g}'",
        )


def _announcing(progress: Progress | None) -> Progress:
    """Says how many runs it will be, on a terminal or not."""
    said = False

    def tell(done: int, total: int, what: str) -> None:
        nonlocal said
        if not said and " runs" in what:
            said = True
            console.say(what)
        if progress is not None:
            progress(done, total, what)

    return tell


def _show(found: Sensitivity, choice: Mixed | None, lines: int, json: Path | None) -> None:
    data = found.as_dict() | ({} if choice is None else {"mixed": choice.as_dict()})
    if json is not None and str(json) == "-":
        console.print_json(data)
        return
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(console.json_text(data), encoding="utf-8")
    console.show(found.table(lines), *(f"note: {note}" for note in found.notes))
    if choice is not None:
        console.show("", f"mixed: {choice.reason}", f"recipe: {choice.recipe}")


def _refused(choice: Mixed) -> int:
    from ..errors import RegressionError

    error = RegressionError(
        "No choice of layers meets the limits",
        why=choice.reason,
        fix="widen limits or budget, or make all layers better first: smooth_quant,int8 and the "
        "options of int8",
    )
    console.show_error(error.diagnostic, as_json=False)
    return error.exit_code
