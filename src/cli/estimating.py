"""The commands that say what a model will cost, and prove it: `estimate`, `measure`, `calibrate`,
`profiles`.

Thin, like `build`: options in, one call, a table or JSON out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import console
from .arguments import parse_budget, parse_dims, parse_input_shapes, split_list
from .build import Dims, Json, Limits, Plugins, TargetName, load_plugins

if TYPE_CHECKING:
    from ..cost.profiles import ProfileFile

Recipes = Annotated[str, typer.Option(help="Recipes to compare, with commas.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads the runtime may use.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "--input-shape",
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="An input of a torch architecture: 1x3x224x224, or ids=1x128:int64.",
    ),
]
ProfileName = Annotated[
    str | None,
    typer.Option("--profile", help="Fitted latency to use: a name or a file (`profiles`)."),
]


def estimate(
    architecture: Annotated[
        str,
        typer.Argument(help="An .onnx file (weights may be absent), or package.module:callable."),
    ],
    target: TargetName = "host",
    recipes: Recipes = "fp32,fp16,int8",
    threads: Threads = 1,
    profile: ProfileName = None,
    budget: Limits = None,
    per_kernel: Annotated[
        bool, typer.Option("--per-kernel", help="Also a line a launch, for each recipe.")
    ] = False,
    per_node: Annotated[
        bool, typer.Option("--per-node", help="Also a line a node, for each recipe.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save a picture: .png, .svg or .pdf.")
    ] = None,
    input_shape: Shapes = None,
    dim: Dims = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Estimate size, memory and latency of an architecture on a target; no weights needed."""
    from ..architecture import estimate as ask

    load_plugins(plugin)
    names = split_list(recipes)
    limits = parse_budget(budget)
    with console.progress() as show:
        found = ask(
            architecture,
            target,
            tuple(names),
            input_shapes=parse_input_shapes(input_shape or []),
            dims=parse_dims(dim or []) or None,
            threads=threads,
            profile=profile,
            budget=limits,
            progress=show,
        )
    if plot is not None:
        found.plot(plot)
        console.say(f"saved {plot}")
    if json:
        console.print_json(found.as_dict())
        return
    console.show(found.table())
    for row in found.rows:
        if per_kernel:
            console.show(found.per_kernel_table(row.recipe))
        if per_node:
            console.show(found.per_node_table(row.recipe))


def measure(
    architecture: Annotated[
        str,
        typer.Argument(help="An .onnx file (weights may be absent), or package.module:callable."),
    ],
    target: TargetName = "host",
    recipes: Recipes = "fp32,int8",
    threads: Threads = 1,
    profile: ProfileName = None,
    input_shape: Shapes = None,
    dim: Dims = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Measure what `estimate` predicts, on this machine: random weights, each recipe, timed."""
    from ..measuring import measure as ask

    load_plugins(plugin)
    with console.progress() as show:
        found = ask(
            architecture,
            target,
            tuple(split_list(recipes)),
            input_shapes=parse_input_shapes(input_shape or []),
            dims=parse_dims(dim or []) or None,
            threads=threads,
            profile=profile,
            progress=show,
        )
    if json:
        console.print_json(found.as_dict())
    else:
        console.show(found.table())


def calibrate(
    target: TargetName = "host",
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="TIMINGS.csv",
            help="Fit whole-model timings instead: columns model, latency_ms.",
        ),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(help="With --from: the profile of a related device to start from."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The profile's name; by default the target's.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="With --from: the device that was timed, in words.")
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="With --from: the runtime that was timed.")
    ] = "onnxruntime",
    threads: Annotated[
        str | None, typer.Option(help="Thread counts, with commas; by default 1 and all cores.")
    ] = None,
    budget: Annotated[float, typer.Option(min=10, help="Seconds to spend measuring.")] = 540.0,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Re-measure a sample of a profile's kernels; exit 1 if stale."
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The profile's file.")
    ] = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Fit a latency profile: measure kernels on this machine, or read whole-model timings."""
    load_plugins(plugin)
    if check:
        from .. import calibrating

        with console.progress() as show:
            result = calibrating.check(name or target, progress=show)
        if json:
            console.print_json(result.as_dict())
        else:
            console.show(str(result))
        if result.stale:
            raise typer.Exit(1)
        return
    with console.progress() as show:
        if from_ is not None:
            from ..timing_tables import profile_from_table

            made = profile_from_table(
                from_,
                target,
                name=name or from_.stem,
                device=device or "",
                runtime=runtime,
                prior=prior,
                progress=show,
            )
        else:
            from .. import calibrating

            made = calibrating.calibrate(
                target, name=name, threads=_counts(threads), budget_s=budget, progress=show
            )
    from ..cost.profiles import user_folder

    path = made.save(output or user_folder() / f"{made.name}.json")
    if json:
        console.print_json({"path": str(path), **_profile_dict(made)})
        return
    console.show(f"{path}", *_profile_lines(made))


def profiles(
    name: Annotated[
        str | None, typer.Argument(help="One profile, with its classes of kernels.")
    ] = None,
    json: Json = False,
) -> None:
    """List the latency profiles: device, runtime, what they were fitted on, held-out error."""
    from ..cost.profiles import all_profiles, find_profile

    if name is not None:
        profile = find_profile(name)
        if json:
            console.print_json(profile.as_dict())
        else:
            console.show(*_profile_lines(profile), *_class_tables(profile))
        return
    found, broken = all_profiles()
    if json:
        console.print_json(
            [{"path": str(f.path), "shipped": f.shipped, **_profile_dict(f.profile)} for f in found]
        )
    else:
        console.show(_profiles_table(found))
    for error in broken:
        console.say(str(error))


def _counts(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        counts = tuple(int(part) for part in split_list(text))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise UsageError(f"--threads {text!r} can't be read", fix="give counts, like 1,2,4")
    return counts


def _profile_dict(profile: Any) -> dict[str, Any]:
    """All but the fitted numbers."""
    plain = profile.as_dict()
    plain.pop("kernels")
    for setting in plain["settings"]:
        setting["classes"] = len(setting["classes"])
    return dict(plain)


def _profile_lines(profile: Any) -> list[str]:
    lines = [
        f"{profile.name}: {profile.device}, {profile.runtime} {profile.runtime_version}".rstrip(),
        f"  fitted {profile.date} on {profile.source}",
    ]
    for setting in profile.settings:
        for dtype, proof in setting.held_out.items():
            lines.append(f"  {setting.threads} thread(s), {dtype or 'all'}: {proof}")
    return [*lines, *(f"  note: {note}" for note in profile.notes)]


def _profiles_table(found: list[ProfileFile]) -> Any:
    from rich.table import Table

    table = Table("profile", "device", "runtime", "threads", "held-out error", "fitted on")
    for item in found:
        profile = item.profile
        errors = [
            f"{setting.threads} thr. {dtype + ' ' if dtype else ''}{proof.median_error:.1%} "
            f"({proof.within_10:.0%}/{proof.within_20:.0%}, {proof.models})"
            for setting in profile.settings
            for dtype, proof in setting.held_out.items()
        ]
        table.add_row(
            profile.name if item.shipped else f"{profile.name} (yours)",
            profile.device,
            f"{profile.runtime} {profile.runtime_version}".rstrip(),
            ", ".join(str(setting.threads) for setting in profile.settings),
            "\n".join(errors) or "not known",
            f"{profile.source} ({profile.date})",
        )
    table.caption = "held-out error: median (within 10 % / within 20 %, models)"
    return table


def _class_tables(profile: Any) -> list[Any]:
    from rich.table import Table

    tables = []
    for setting in profile.settings:
        table = Table(
            "class",
            "samples",
            "error",
            "ms a unit",
            title=f"{setting.threads} thread(s)",
            title_justify="left",
        )
        for name, model in setting.classes.items():
            terms = ", ".join(f"{key} {value:.3g}" for key, value in model.terms.items())
            error = "?" if model.error is None else f"{model.error:.1%}"
            table.add_row(name, str(model.samples), error, terms)
        tables.append(table)
    return tables
