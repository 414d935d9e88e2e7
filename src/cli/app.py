"""The typer application: every command registered, and options that all of them share.

Not here: what the commands do (`build`, `look`).
"""

from __future__ import annotations

from typing import Annotated

import typer

from . import (
    build,
    estimating,
    evaluating,
    inspecting,
    look,
    optimizing,
    pruning,
    sweeping,
    trying,
)

app = typer.Typer(
    name="edgepass",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make a model fit a device: estimate, compile, run, and see what was done.",
)


def _version(value: bool) -> None:
    if value:
        import importlib.metadata

        typer.echo(f"edgepass {importlib.metadata.version('edgepass')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for command in (
    build.compile_,
    optimizing.optimize,
    estimating.estimate,
    estimating.measure,
    estimating.calibrate,
    estimating.profiles,
    build.run,
    inspecting.inspect,
    evaluating.evaluate,
    sweeping.sweep,
    trying.sensitivity,
    pruning.prune,
    look.targets,
    look.passes,
    look.show,
    look.explain,
    look.bisect,
):
    app.command(command.__name__.rstrip("_"))(command)
