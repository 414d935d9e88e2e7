"""An imported architecture that answers what-ifs: any recipe, target, threads and sizes.

Here: `Architecture` and `estimate`. Importing and cleaning up are done once and remembered. Not
here: what one graph costs (`cost.report`), what a recipe means (`pipelines`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import onnx_ir as ir

from .cost.budget import Budget
from .cost.counts import Counts, count
from .cost.estimate import Estimate
from .cost.features import Features
from .cost.kernels import kernels
from .cost.latency import describe
from .cost.profile import Profile
from .cost.profiles import board_profiles, find_profile, profile_for
from .cost.report import CostReport, report_of
from .errors import EdgepassError, ShapeError, UsageError
from .frontends import load_supported
from .ir.graph import AbsentTensor, index_names, is_absent
from .ir.quant import QuantPlan
from .ir.shapes import infer_shapes
from .ir.sizing import is_dynamic, static_twin
from .passes.base import Context, Pass, PassResult, Stage
from .passes.driver import run_passes, sort_by_stage
from .passes.probe import default_dims
from .passes.spec import format_passes
from .pipelines import parse_recipe
from .targets.registry import get_target
from .targets.target import Hardware, Runtime, Target, Verified

ProgressCall = Callable[[int, int, str], None]
Priced = tuple[ir.Model, ir.Model, tuple[str, ...]]

RECIPES = ("fp32", "fp16", "int8")
"""What is estimated where nothing else is asked for."""


class Architecture:
    """A model's graph, weights or not, that was imported once and is priced many times.

        net = edgepass.Architecture("net.onnx")
        net.estimate("arm64", ["fp32", "int8"])
        net.estimate("jetson-nano-cpu", ["int4-weights"], threads=4)

    Takes what `edgepass.estimate` takes. `passes` run at their stage in every recipe.

    Raises:
        EdgepassError: the architecture can't be read.
    """

    def __init__(
        self,
        architecture: Any,
        *,
        example_inputs: Any = None,
        dynamic_shapes: Any = None,
        input_shapes: Sequence[str] | Mapping[str, str] | None = None,
        passes: Sequence[Pass] = (),
    ) -> None:
        self.graph = load_supported(
            architecture,
            example_inputs=example_inputs,
            dynamic_shapes=dynamic_shapes,
            input_shapes=input_shapes,
            weights_required=False,
        )
        self.passes = tuple(passes)
        self._cleaned: dict[tuple[Any, ...], ir.Model] = {}
        self._saved: dict[tuple[Any, ...], tuple[ir.Model, tuple[str, ...]]] = {}
        self._sized: dict[tuple[Any, ...], ir.Model] = {}
        self._counted: dict[tuple[Any, ...], Counts] = {}
        self._alike: list[Target] = []

    def estimate(
        self,
        target: str | Target = "host",
        recipes: Iterable[str] = RECIPES,
        *,
        dims: Mapping[str, int] | None = None,
        threads: int = 1,
        profile: str | Path | Profile | None = None,
        budget: Budget | None = None,
        progress: ProgressCall | None = None,
    ) -> Estimate:
        """What the architecture costs on a target under each recipe; see `edgepass.estimate`.

        Raises:
            EdgepassError: no recipe is given, or no such target or profile.
        """
        wanted = [recipes] if isinstance(recipes, str) else list(recipes)
        if not wanted:
            raise UsageError("No recipe is given", fix='recipes=["fp32", "int8"]')
        if threads < 1:
            raise UsageError(f"The number of threads must be above zero, it is {threads}")
        device = get_target(target)
        fitted = _profile(profile, device)
        boards = _boards(device) if fitted is None else []
        plans = {name: sort_by_stage([*parse_recipe(name), *self.passes]) for name in wanted}
        sizes = default_dims(self.graph, dims)
        context = Context(device, None, sizes)
        rows: list[CostReport] = []
        failed: dict[str, str] = {}
        for done, (name, chosen) in enumerate(plans.items()):
            if progress is not None:
                progress(done, len(plans), name)
            try:
                with _no_collection():
                    counted, notes = self._count(chosen, context)
                    rows.append(
                        report_of(
                            counted,
                            device,
                            recipe=name,
                            notes=notes,
                            threads=threads,
                            profile=fitted,
                            boards=boards,
                        )
                    )
            except EdgepassError as error:
                failed[name] = str(error)
        if progress is not None:
            progress(len(plans), len(plans), "")
        return Estimate(device.name, tuple(rows), failed, budget)

    def launches(
        self, target: str | Target, *, dims: Mapping[str, int] | None = None
    ) -> list[Features]:
        """What the target's runtime makes of the model as it was given, for fitting timings of it.

        Raises:
            ShapeError: the size of a kernel is not known; give `dims`.
        """
        device = get_target(target)
        model = self.graph.clone()
        infer_shapes(model)
        sizes = default_dims(model, dims)
        found = kernels(at_sizes(model, sizes), device, dims=sizes)
        described = [(kernel, describe(kernel)) for kernel in found]
        for kernel, features in described:
            if features is None:
                raise ShapeError(
                    "The size of a kernel is not known",
                    where=kernel.op,
                    why=kernel.unknown_reason,
                    fix="give sizes of dynamic dimensions (dims)",
                )
        return [features for _, features in described if features is not None]

    def prepared(
        self, recipe: str, target: str | Target, *, dims: Mapping[str, int] | None = None
    ) -> ir.Model:
        """The graph as a recipe would save it, to change at will. Weights that were absent still
        are, and so are the numbers of a quantization.

        Raises:
            EdgepassError: no such recipe or target, or the recipe does not suit the model.
        """
        chosen = sort_by_stage([*parse_recipe(recipe), *self.passes])
        context = Context(get_target(target), None, default_dims(self.graph, dims))
        return self._prepare(chosen, context)[1].clone()

    def _count(self, chosen: Sequence[Pass], context: Context) -> tuple[Counts, tuple[str, ...]]:
        """What the graph that a recipe leaves costs, time left out; what could not be done."""
        assert context.target is not None
        model, saved, notes = self._prepare(chosen, context)
        key = (*self._where(context), format_passes(list(chosen)))
        if key not in self._counted:
            self._counted[key] = count(model, context.target, None, context.dims, saved)
        return self._counted[key], notes

    def _prepare(self, chosen: Sequence[Pass], context: Context) -> Priced:
        """The graph that a recipe leaves, at the sizes and as saved; what could not be done."""
        assert context.target is not None
        key = (self._likeness(context.target), *self._own(context), format_passes(list(chosen)))
        if key not in self._saved:
            self._saved[key] = self._run(chosen, context)
        model, notes = self._saved[key]
        sized = (*key, *self._where(context))
        if sized not in self._sized:
            self._sized[sized] = at_sizes(model, context.dims)
        return self._sized[sized], model, notes

    def _where(self, context: Context) -> tuple[Any, ...]:
        """What the costs of a recipe depend on."""
        assert context.target is not None
        return self._likeness(context.target), tuple(sorted(context.dims.items()))

    def _own(self, context: Context) -> tuple[Any, ...]:
        """What passes of the user may look at besides; ours do not."""
        return self._where(context) if self.passes else ()

    def _likeness(self, target: Target) -> int:
        """The same number for targets that make the same kernels of a graph, fast or slow."""
        bare = _without_speed(target)
        if bare not in self._alike:
            self._alike.append(bare)
        return self._alike.index(bare)

    def _run(self, chosen: Sequence[Pass], context: Context) -> tuple[ir.Model, tuple[str, ...]]:
        """The graph that a recipe leaves, with any size; what could not be done."""
        skipped = [i for i in chosen if i.needs_weights and not isinstance(i, Previewed)]
        notes = [f"{item}: stored size is not changed by it" for item in skipped]
        done = [item for item in chosen if item not in skipped]
        lossless = list(itertools.takewhile(lambda i: i.lossless and not i.needs_weights, done))
        model = self._clean(lossless, context)
        rest = done[len(lossless) :]
        if any(item.needs_weights for item in rest):
            model = without_weights(model)
        elif rest:
            model = model.clone()
        shaped = False
        for planned, items in itertools.groupby(rest, key=lambda item: item.needs_weights):
            if not planned:
                model, _ = run_passes(model, list(items), context, quick=True, shaped=shaped)
                continue
            shaped = True  # a preview writes the shape of all that it writes
            for item in items:
                assert isinstance(item, Previewed)
                notes += _planned(item.plan(model, context), get_target(context.target or "host"))
                item.preview(model, context)
        return model, tuple(notes)

    def _clean(self, passes: Sequence[Pass], context: Context) -> ir.Model:
        """The graph after lossless passes; what targets have in common is done once."""
        assert context.target is not None
        common = [item for item in passes if item.stage < Stage.LEGALIZE]
        forms = _without_hardware(context.target)
        key = (self._likeness(forms), *self._own(context), format_passes(common))
        if key not in self._cleaned:
            self._cleaned[key], _ = run_passes(self.graph.clone(), common, context, quick=True)
        own = [item for item in passes if item.stage >= Stage.LEGALIZE]
        if not own:
            return self._cleaned[key]
        return run_passes(self._cleaned[key].clone(), own, context, quick=True)[0]


@runtime_checkable
class Previewed(Protocol):
    """A pass that writes what it would, exact in structure and size, without seeing weights."""

    def plan(self, model: ir.Model, context: Context) -> QuantPlan:
        """What becomes of which value."""

    def preview(self, model: ir.Model, context: Context) -> PassResult:
        """Change the model in place; numbers that need weights are absent."""


def _without_speed(target: Target) -> Target:
    """A target without what only time depends on, and without its name."""
    hardware = target.hardware
    bare = Hardware(
        arch=hardware.arch, vector_bits=hardware.vector_bits, features=hardware.features
    )
    return dataclasses.replace(target, name="", description="", profile="", hardware=bare)


def _without_hardware(target: Target) -> Target:
    """A target as cleanup and fusion see it: a runtime and its operators."""
    return dataclasses.replace(
        _without_speed(target),
        hardware=Hardware(arch=""),
        quantization=(),
        session_options={},
        verified=Verified.STRUCTURE,
    )


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's search for cycles, which takes a third of the time of many small objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _planned(plan: QuantPlan, target: Target) -> list[str]:
    notes = [f"priced before weights are seen: {plan.label}"]
    if target.runtime is Runtime.TVM and plan.nodes:
        notes.append("TVM computes quantized nodes in floats: 8 bits save size, not time")
    return notes


_SMALL = 64
"""Elements up to which a constant may be a number that passes look at, and stays."""


def without_weights(model: ir.Model) -> ir.Model:
    """A copy whose float weights are absent: no pass can spend time on them."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or is_absent(tensor) or tensor.size <= _SMALL:
            continue
        if tensor.dtype.is_floating_point():
            shape = tuple(int(d) for d in tensor.shape.numpy())
            value.const_value = AbsentTensor(value.name or "", tensor.dtype, shape)
    index_names(copy)  # the copy shares the index of the original, with names that are not here
    return copy


def estimate(
    architecture: Any,
    target: str | Target = "host",
    recipes: Iterable[str] = RECIPES,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    input_shapes: Sequence[str] | Mapping[str, str] | None = None,
    dims: Mapping[str, int] | None = None,
    passes: Sequence[Pass] = (),
    threads: int = 1,
    profile: str | Path | Profile | None = None,
    budget: Budget | None = None,
    progress: ProgressCall | None = None,
) -> Estimate:
    """What an architecture will cost on a target under each recipe. No weights are needed.

    Takes what `compile` takes, and modules on torch's `meta` device, callables that build one, and
    ONNX files whose external data is not there. A recipe that can't be priced is reported
    with its reason; the others are unharmed. For many questions about one architecture, import it
    once: `Architecture`.

    Args:
        architecture, example_inputs, dynamic_shapes, input_shapes: see `compile`.
        target: a name (`edgepass targets`), `host`, or a `Target`.
        recipes: names, or passes as text.
        dims: sizes of symbolic dimensions.
        passes: passes of your own, in every recipe.
        threads: how many the runtime may use.
        profile: fitted latency to use instead of the target's: a name (`edgepass profiles`), a
            path, or a `Profile`.
        budget: limits to hold every recipe against: met, missed, or cannot tell.
        progress: called with (done, total, what).

    Raises:
        EdgepassError: the architecture can't be read, no recipe is given, or no such target.
    """
    tell = progress or _silent
    tell(0, 1, "loading")
    net = Architecture(
        architecture,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        input_shapes=input_shapes,
        passes=passes,
    )
    return net.estimate(
        target,
        recipes,
        dims=dims,
        threads=threads,
        profile=profile,
        budget=budget,
        progress=progress,
    )


def at_sizes(model: ir.Model, dims: Mapping[str, int]) -> ir.Model:
    """The model at given sizes, where its inputs have symbolic dimensions."""
    return static_twin(model, dims) if is_dynamic(model) else model


def _profile(given: str | Path | Profile | None, target: Target) -> Profile | None:
    if isinstance(given, Profile):
        return given
    if given is not None:
        return find_profile(given)
    return profile_for(target)


def _boards(target: Target) -> list[Profile]:
    """Of what is described but not one device: the measured boards of its architecture."""
    if target.runtime is Runtime.TVM or target.hardware.arch != "aarch64":
        return []
    return board_profiles(target.hardware.arch)


def _silent(done: int, total: int, what: str) -> None:
    """No progress shown."""
