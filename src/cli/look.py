"""The commands that only read: `targets`, `passes`, `show`, `explain`, and `bisect`.

Thin, like `build`: options in, one call, a table or JSON out.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import console
from .arguments import parse_dims, parse_input_shapes
from .build import Dims, InputShapes, Json, Plugins, Recipe, TargetName, load_plugins

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..passes.base import Pass
    from ..targets.target import Target


def targets(plugin: Plugins = None, json: Json = False) -> None:
    """List the targets: runtime, hardware, int8 scheme, latency profile, how far verified."""
    from ..targets.registry import targets as known

    load_plugins(plugin)
    found = list(known().values())
    if json:
        console.print_json([_target_dict(target) for target in found])
        return
    from rich.table import Table

    headings = ("target", "runtime", "hardware", "int8", "profile", "verified", "description")
    table = Table(*headings, caption="latency is calibrated with a profile, assumed without one")
    # architectures first, then single devices
    for target in sorted(found, key=lambda target: bool(target.profile)):
        hardware = target.hardware
        table.add_row(
            target.name,
            str(target.runtime),
            f"{hardware.arch}, {hardware.cores} x {hardware.frequency_ghz:g} GHz",
            str(target.scheme or "-"),
            _fitted_under(target),
            str(target.verified),
            target.description,
        )
    console.show(table)


def _fitted_under(target: Target) -> str:
    """The profile that a target names, and the runtime it was fitted under."""
    from ..cost.profiles import find_profile
    from ..errors import ProfileError

    if not target.profile:
        return "-"
    try:
        runtime = find_profile(target.profile).runtime
    except ProfileError:
        return f"{target.profile} (missing)"
    return f"{'' if target.profile == target.name else target.profile + ', '}{runtime}"


def _target_dict(target: Target) -> dict[str, Any]:
    hardware = target.hardware
    return {
        "name": target.name,
        "description": target.description,
        "runtime": str(target.runtime),
        "verified": str(target.verified),
        "opset": target.opset,
        "arch": hardware.arch,
        "cores": hardware.cores,
        "frequency_ghz": hardware.frequency_ghz,
        "features": list(hardware.features),
        "float_dtypes": [dtype.name.lower() for dtype in target.float_dtypes],
        "quantization": [str(scheme) for scheme in target.quantization],
        "fused_activations": list(target.fused_activations),
        "session_options": dict(target.session_options),
        "profile": target.profile,
    }


def passes(
    name: Annotated[str | None, typer.Argument(help="One pass, with its documentation.")] = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """List the passes and recipes, or one pass with its options and documentation."""
    from ..passes.registry import find_pass
    from ..passes.registry import passes as known
    from ..pipelines import GROUPS, RECIPES

    load_plugins(plugin)
    if name is not None:
        found = pass_dict(find_pass(name))
        if json:
            console.print_json(found)
        else:
            console.show(*_pass_page(found))
        return
    rows = [pass_dict(cls) for cls in known().values()]
    groups = {key: [cls.name for cls in members] for key, members in GROUPS.items()}
    if json:
        recipes = {r.name: {"text": r.text, "description": r.description} for r in RECIPES.values()}
        console.print_json({"passes": rows, "groups": groups, "recipes": recipes})
        return
    from rich.table import Table

    table = Table("pass", "stage", "options", "what it does", title="Passes", title_justify="left")
    for row in rows:
        options = ", ".join(f"{o['name']}={o['default']}" for o in row["options"])
        table.add_row(row["name"], row["stage"], options, row["summary"])
    named = Table("recipe or group", "passes", "what for", title="Recipes", title_justify="left")
    for recipe in RECIPES.values():
        named.add_row(recipe.name, recipe.text or "(cleanup, fuse)", recipe.description)
    for key, members in groups.items():
        named.add_row(key, ", ".join(members), "a group of passes")
    console.show(table, named)


def pass_dict(cls: type[Pass]) -> dict[str, Any]:
    """All that can be said of a pass, as plain data."""
    from ..passes.spec import describe_options

    documentation = inspect.getdoc(cls) or ""
    return {
        "name": cls.name,
        "stage": cls.stage.name.lower(),
        "summary": documentation.split("\n", 1)[0],
        "documentation": documentation,
        "options": describe_options(cls),
        "lossless": cls.lossless,
        "idempotent": cls.idempotent,
        "needs_weights": cls.needs_weights,
        "module": cls.__module__,
        "rules": [
            {"name": rule.name, "summary": (inspect.getdoc(rule) or "").split("\n\n", 1)[0]}
            for rule in getattr(cls, "rules", ())
        ],
    }


def _pass_page(found: dict[str, Any]) -> list[Any]:
    from rich.table import Table

    facts = [
        f"stage {found['stage']}",
        "lossless" if found["lossless"] else "lossy",
        *(["needs weights"] if found["needs_weights"] else []),
    ]
    page: list[Any] = [f"{found['name']} ({', '.join(facts)})", "", found["documentation"], ""]
    if found["rules"]:
        rules = Table("rule", "before -> after")
        for rule in found["rules"]:
            rules.add_row(rule["name"], " ".join(rule["summary"].split()))
        page += [rules, ""]
    if not found["options"]:
        return [*page, "It has no options."]
    table = Table("option", "type", "default", "choices")
    for option in found["options"]:
        default = "(required)" if option["required"] else str(option["default"])
        table.add_row(option["name"], option["type"], default, ", ".join(option["choices"]))
    return [*page, table]


def read_model(name: str) -> ir.Model:
    """A model to look at, as it is: weights may be absent, its opset is kept."""
    from ..frontends import load_model

    return load_model(name, weights_required=False)


def show(
    model: Annotated[str, typer.Argument(help="An .onnx file, an artifact, or module:callable.")],
    other: Annotated[str | None, typer.Argument(help="Show the difference to this one.")] = None,
    sources: Annotated[
        bool, typer.Option("--sources", help="Add the user's source line of each node.")
    ] = False,
    json: Json = False,
) -> None:
    """Print a model as text, or the difference of two."""
    from ..ir.text import diff_models, format_model
    from ..targets.feed import input_specs, output_specs

    first = read_model(_inside_artifact(model))
    if other is not None:
        difference = diff_models(first, read_model(_inside_artifact(other)))
        if json:
            console.print_json({"equal": not difference, "difference": difference})
        else:
            console.show(difference or "the models are equal")
        return
    text = format_model(first, sources=sources)
    if json:
        console.print_json(
            {
                "opset_imports": dict(first.opset_imports),
                "inputs": [spec.as_dict() for spec in input_specs(first)],
                "outputs": [spec.as_dict() for spec in output_specs(first)],
                "text": text,
            }
        )
    else:
        console.show(text.rstrip())


def _inside_artifact(name: str) -> str:
    path = Path(name)
    if not path.is_dir():
        return name
    from ..artifact import load

    file = load(path).model_file
    if file.suffix != ".onnx":
        raise UsageError(f"The artifact holds {file.name}, which has no graph to show", where=name)
    return str(file)


def explain(
    model: Annotated[str, typer.Argument(help="An .onnx file, or package.module:callable.")],
    rule: Annotated[str, typer.Option(help="The rewrite rule.")],
    node: Annotated[
        str | None, typer.Option(help="A node's name, or an output of it; all where not given.")
    ] = None,
    target: TargetName = "host",
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Say why a rewrite rule matches at a node, or why not.

    The rule sees what it would in a pipeline for the target: shapes inferred, and the graph as the
    stages before the rule's own leave it.
    """
    from ..frontends import to_supported_opset
    from ..ir.graph import all_nodes
    from ..passes.base import Context
    from ..passes.driver import run_passes
    from ..passes.registry import find_rule
    from ..passes.rules import explain as explain_one
    from ..passes.rules import explain_all
    from ..pipelines import parse_recipe
    from ..targets.registry import get_target

    load_plugins(plugin)
    chosen = find_rule(rule)()
    graph = read_model(model)
    to_supported_opset(graph)
    context = Context(get_target(target))
    before = [item for item in parse_recipe("optimize") if item.stage < chosen.stage]
    graph, _ = run_passes(graph, before, context)
    context = dataclasses.replace(context, opsets=dict(graph.opset_imports))
    if node is None:
        found = explain_all(chosen, graph, context)
    else:
        nodes = [
            n for n in all_nodes(graph) if n.name == node or any(o.name == node for o in n.outputs)
        ]
        if not nodes:
            raise UsageError(
                f"The model has no node {node!r}", fix="`edgepass show` lists nodes and outputs"
            )
        found = [explain_one(chosen, n, context) for n in nodes]
    if json:
        console.print_json([item.as_dict() for item in found])
        return
    console.show(*map(str, found))
    matches = sum(item.matched for item in found)
    if len(found) > 1:
        console.show(f"{chosen.name} matches at {matches} of {len(found)} nodes")
    if not found:
        console.show(f"{chosen.name}: the model has no node of the type that the rule ends in")


def bisect(
    model: Annotated[str, typer.Argument(help="An .onnx file, or package.module:callable.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A folder for a minimal reproducer.")
    ] = None,
    target: TargetName = "host",
    recipe: Recipe = "default",
    input_: Annotated[
        Path | None, typer.Option("--input", "-i", help="An .npz with an array for each input.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Allowed difference, relative to the output's range.")
    ] = 1e-4,
    calibration: Annotated[
        Path | None, typer.Option(help="Samples, for recipes that need them; as for compile.")
    ] = None,
    input_shape: InputShapes = None,
    dim: Dims = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Find the pass that first breaks numerics, and save a minimal reproducer."""
    from .. import api
    from ..npz import read_npz

    load_plugins(plugin)
    result = api.bisect(
        model,
        target,
        recipe=recipe,
        feed=None if input_ is None else read_npz(input_),
        calibration=calibration,
        dims=parse_dims(dim or []) or None,
        tolerance=tolerance,
        out=output,
        input_shapes=parse_input_shapes(input_shape or []),
    )
    if json:
        console.print_json(result.as_dict())
    else:
        console.show(str(result))
