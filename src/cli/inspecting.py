"""The command `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console
from .build import Plugins, load_plugins


def inspect(
    original: Annotated[str, typer.Argument(help="An .onnx file, or package.module:callable.")],
    candidate: Annotated[str, typer.Argument(help="What was made of it: an artifact or .onnx.")],
    data: Annotated[
        Path, typer.Option("--data", help="Inputs: a .npz of stacks, or a folder of .npz samples.")
    ],
    plots: Annotated[
        Path | None, typer.Option("--plots", metavar="FOLDER", help="Write pictures there.")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layer", help="Whose distributions to draw; the culprits' if not given."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for the terminal.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="Lines of the table: the worst.")] = 40,
    plugin: Plugins = None,
) -> None:
    """Look inside a compressed model: which layer errs, by how much, why, and what to do."""
    from ..evaluation.internals import inspect as call

    load_plugins(plugin)
    with console.progress() as progress:
        found = call(original, candidate, data, progress=progress)
    if json is not None and str(json) != "-":
        json.write_text(console.json_text(found.as_dict()), encoding="utf-8")
    if json is not None and str(json) == "-":
        console.print_json(found.as_dict())
    else:
        console.show(found.table(limit))
        if found.culprits:
            console.show("", found.culprit_table())
        else:
            console.show("", "no layer is out of its expected range")
        console.show(*(f"note: {note}" for note in found.notes))
    if plots is not None:
        files = found.save_plots(plots, layers=layers)
        console.say(f"{len(files)} pictures in {plots}")
