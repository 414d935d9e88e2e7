"""The command `optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import NumericsError
from . import console
from .arguments import parse_dims, parse_input_shapes
from .build import Dims, InputShapes, Json, Plugins, TargetName, load_plugins


def optimize(
    model: Annotated[str, typer.Argument(help="An .onnx file, or package.module:callable.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The .onnx file to write; MODEL.opt.onnx if not given."
        ),
    ] = None,
    target: TargetName = "host",
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A lossless recipe, or passes with commas.")
    ] = "optimize",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Hold the result against the source.")
    ] = True,
    certify: Annotated[
        bool, typer.Option("--certify", help="Check every single rewrite, before against after.")
    ] = False,
    portable: Annotated[
        bool, typer.Option("--portable", help="Standard operators only: any runtime reads it.")
    ] = False,
    rules: Annotated[
        bool, typer.Option("--rules", help="Also every rule that fired, how often and where.")
    ] = False,
    input_shape: InputShapes = None,
    dim: Dims = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Simplify and fuse a model for a target; results stay equal, and that is checked.

    `edgepass explain MODEL --rule NAME` says why a rule did not fire.
    """
    from ..optimizer import optimize as call

    load_plugins(plugin)
    place = output or Path(_stem(model) + ".opt.onnx")
    with console.progress() as progress:
        found = call(
            model,
            target,
            place,
            recipe=recipe,
            check=check,
            certify=certify,
            portable=portable,
            input_shapes=parse_input_shapes(input_shape or []),
            dims=parse_dims(dim or []) or None,
            progress=progress,
        )
    if json:
        console.print_json(found.as_dict())
    else:
        console.show(found.ledger.table())
        if rules:
            console.show(found.rules_table())
        if certify:
            console.show(found.certificates_table())
        console.show(
            f"{found.nodes_before} > {found.nodes} nodes for {found.target.name}",
            str(found.equality),
            *(f"note: {note}" for note in found.notes),
            f"saved to {found.files[0]}",
        )
    wrong = [item for item in found.certificates or () if item.holds is False]
    if wrong and found.equality.holds is not False:
        console.say(f"{len(wrong)} rewrites differ on some inputs; the first: {wrong[0]}")
    if found.equality.holds is False:
        raise NumericsError(
            "The optimized model does not compute what its source does",
            where=str(found.files[0]),
            why=str(found.equality),
            fix="do not use the file; `edgepass bisect` names the pass, and please report it",
        )


def _stem(model: str) -> str:
    """What the result is called after: the model's path without its suffix, or the callable."""
    path = Path(model)
    return str(path.with_suffix("")) if path.suffix else model.rpartition(":")[2]
