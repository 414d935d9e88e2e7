"""The commands that make or run something: `compile`, `run`.

Thin: each reads its options, calls the API of the same name and prints what it returns.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console
from .arguments import parse_budget, parse_dims, parse_input_shapes

if TYPE_CHECKING:
    import numpy as np

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", metavar="FILE", help="A Python file with passes, rules or targets."),
]
TargetName = Annotated[str, typer.Option("--target", "-t", help="A name from `edgepass targets`.")]
Recipe = Annotated[
    str, typer.Option("--recipe", "-r", help="A recipe, or passes: 'cleanup,my_pass{x=1},int8'.")
]
Dims = Annotated[
    list[str] | None,
    typer.Option("--dim", metavar="NAME=SIZE", help="A size for a named dynamic dimension."),
]
Limits = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="LIMITS", help="Limits to meet: latency_ms=20,size_mb=4,memory_mb=8"
    ),
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="An input of a torch architecture: x=1x3x224x224, or ids=1x128:int64.",
    ),
]


def load_plugins(plugins: list[str] | None) -> None:
    """Load every `--plugin`."""
    if plugins:
        from ..passes.registry import load_plugin

        for plugin in plugins:
            load_plugin(plugin)


def compile_(
    model: Annotated[str, typer.Argument(help="An .onnx file, or package.module:callable.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The artifact's folder.")],
    target: TargetName = "host",
    recipe: Recipe = "default",
    calibration: Annotated[
        Path | None,
        typer.Option(help="Samples: an .npz of stacked arrays, or a folder of .npz files."),
    ] = None,
    input_shape: InputShapes = None,
    dim: Dims = None,
    plugin: Plugins = None,
    format_: Annotated[
        list[str] | None,
        typer.Option("--format", help="onnx (default) and ort, for ONNX Runtime targets."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail when a node falls off the fast path.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Measure the numeric error of each pass.")
    ] = True,
    time_budget: Annotated[
        float, typer.Option(min=0, help="Seconds for timing against the original; 0 for none.")
    ] = 0.5,
    budget: Limits = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the folder even if it is not an artifact.")
    ] = False,
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="Keep int8 even where float is faster.")
    ] = False,
    json: Json = False,
) -> None:
    """Compile a model for a target and write an artifact.

    An artifact that is in the output folder already is replaced, as one step at the end.
    """
    from .. import api

    load_plugins(plugin)
    with console.progress() as progress:
        compiled = api.compile(
            model,
            target,
            recipe=recipe,
            calibration=calibration,
            input_shapes=parse_input_shapes(input_shape or []),
            dims=parse_dims(dim or []) or None,
            strict=strict,
            check_numerics=check,
            time_budget_s=time_budget,
            budget=parse_budget(budget),
            force=allow_slower,
            progress=progress,
        )
        path = compiled.save(output, formats=tuple(format_ or ("onnx",)), force=force)
    if json:
        console.print_json(
            {
                "artifact": str(path),
                "target": compiled.target.name,
                "recipe": compiled.recipe,
                "ledger": compiled.ledger.as_dict(),
                "placement": compiled.placement.as_dict(),
                "cost": compiled.cost,
                "speed": None if compiled.speed is None else compiled.speed.as_dict(),
                "budget": [verdict.as_dict() for verdict in compiled.verdicts],
                "notes": compiled.notes,
            }
        )
        return
    console.show(compiled.ledger.table(), compiled.placement.table())
    if compiled.speed is not None:
        console.show(str(compiled.speed))
    console.show(*(f"note: {note}" for note in compiled.notes), f"saved to {path}")


def run(
    model: Annotated[str, typer.Argument(help="An artifact's folder, or an .onnx or .ort file.")],
    input_: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="An .npz with an array for each input, or samples."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the outputs to this .npz.")
    ] = None,
    emulate: Annotated[
        str | None, typer.Option(metavar="ARCH", help="Run on the emulated machine: arm64.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads the runtime may use.")] = 1,
    json: Json = False,
) -> None:
    """Run an artifact, or a model file as it is.

    Without `--input` an artifact runs its golden input, and the result is held against the golden
    output. Arrays with one more dimension than the inputs are samples: each is run, and the
    outputs are stacked.
    """
    from .running import run_model

    results, differences = run_model(Path(model), input_, emulate, threads)
    if output is not None:
        from ..npz import write_npz

        write_npz(output, results)
    rows = {name: summary(array) for name, array in results.items()}
    if json:
        console.print_json(
            {
                "outputs": rows,
                "golden_difference": differences,
                "emulated": emulate,
                "written": None if output is None else str(output),
            }
        )
        return
    console.show(_outputs_table(rows, differences))
    if output is not None:
        console.show(f"written to {output}")


def summary(array: np.ndarray) -> dict[str, Any]:
    """Dtype, shape, and range of an array; its values too when they are few."""
    import numpy as np

    row: dict[str, Any] = {"dtype": str(array.dtype), "shape": list(array.shape)}
    if array.size and array.dtype.kind not in "OSU":
        values = np.asarray(array, np.float64)
        row |= {"min": values.min(), "max": values.max(), "mean": values.mean()}
    if array.size <= 16:
        row["values"] = np.asarray(array).tolist()
    return row


def _outputs_table(rows: dict[str, dict[str, Any]], differences: dict[str, float] | None) -> Any:
    from rich.table import Table

    table = Table("output", "dtype", "shape", "min", "max", "mean")
    if differences is not None:
        table.add_column("difference to golden")
    for name, row in rows.items():
        shape = "x".join(map(str, row["shape"])) or "scalar"
        numbers = [f"{row[key]:.6g}" if key in row else "-" for key in ("min", "max", "mean")]
        cells = [name, row["dtype"], shape, *numbers]
        if differences is not None:
            cells.append(f"{differences[name]:.3g}" if name in differences else "-")
        table.add_row(*cells)
    return table
