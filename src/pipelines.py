"""Recipes: what text like `int8` or `cleanup,my_pass{x=1},int8` stands for.

Here: the named groups and recipes, and turning text into passes. The only module that knows all
passes by name. Not here: running them (`passes.driver`), the text form of one pass
(`passes.spec`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from .errors import PassOptionError
from .passes.base import Pass, Stage
from .passes.cleanup.algebra import Algebra
from .passes.cleanup.branches import FoldBranches
from .passes.cleanup.broadcasts import Broadcasts
from .passes.cleanup.dead_code import DeadCode
from .passes.cleanup.duplicates import Duplicates
from .passes.cleanup.folding import FoldConstants
from .passes.cleanup.identities import Identities
from .passes.cleanup.inline import InlineFunctions
from .passes.cleanup.movement import Movement
from .passes.cleanup.shape_folding import FoldShapes
from .passes.driver import sort_by_stage
from .passes.fuse.activations import FuseActivations
from .passes.fuse.affine import FoldAffine
from .passes.fuse.attention import FuseAttention
from .passes.fuse.einsum import EinsumForms
from .passes.fuse.gemm import GemmForms
from .passes.fuse.linear import FoldLinear
from .passes.fuse.normalizations import FuseNormalizations
from .passes.fuse.rotary import FuseRotary
from .passes.fuse.row_selection import SelectEarly
from .passes.fuse.talking_heads import MixedHeads
from .passes.fuse.tidy import Tidy
from .passes.legalize import Legalize
from .passes.lower.attention import AttentionForms
from .passes.lower.pack_zeros import PackZeros
from .passes.lower.runtime_forms import RuntimeForms
from .passes.registry import find_pass
from .passes.sparsify.sparsify import Sparsify
from .passes.spec import PassSpec, build_pass, format_pass, parse_specs

GROUPS: dict[str, tuple[type[Pass], ...]] = {
    "cleanup": (
        InlineFunctions,
        FoldBranches,
        FoldShapes,
        Broadcasts,
        FoldConstants,
        Identities,
        Movement,
        Algebra,
        Duplicates,
        DeadCode,
    ),
    "fuse": (
        FoldAffine,
        FuseActivations,
        FuseNormalizations,
        EinsumForms,
        FuseRotary,
        FuseAttention,
        MixedHeads,
        SelectEarly,
        FoldLinear,
        GemmForms,
        Tidy,
    ),
    "lower": (AttentionForms, RuntimeForms),
}
"""Names that stand for several passes at their default options."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named recipe: the passes on top of cleanup and fuse, and what it is good for."""

    name: str
    text: str
    description: str


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("default", "", "lossless: cleanup, and fusion for the target"),
        Recipe("fp32", "", "the same as default"),
        Recipe("optimize", "", "the same as default: what `edgepass optimize` runs"),
        Recipe("fp16", "fp16", "weights and arithmetic in half precision"),
        Recipe("bf16", "bf16", "weights and arithmetic in bfloat16"),
        Recipe("int8", "int8", "weights and activations in 8 bits; needs calibration samples"),
        Recipe("dynamic-int8", "int8_dynamic", "weights in 8 bits, activations quantized per run"),
        Recipe("int8-weights", "weight_only{bits=8}", "weights stored in 8 bits, float arithmetic"),
        Recipe("int4-weights", "weight_only{bits=4}", "MatMul weights stored in 4 bits, in blocks"),
        Recipe(
            "int4-gptq",
            "weight_only{bits=4,method=gptq}",
            "as int4-weights, rounded for what they are multiplied by; needs calibration samples",
        ),
        Recipe("int3-weights", "weight_only{bits=3}", "MatMul weights packed in 3 bits, in blocks"),
        Recipe("palette4", "palettize{bits=4}", "weights as 4-bit indices into codebooks"),
        Recipe("fp8-weights", "fp8", "weights stored in 8-bit floats, float arithmetic"),
    )
}

_PLUS = re.compile(r"\+(?![^{]*\})")
"""A plus outside braces."""
_PERCENT = re.compile(r"(prune|sparsify)(\d{1,2})$")
"""`prune50` is the pass at `ratio=0.5`."""


def parse_recipe(text: str) -> list[Pass]:
    """The passes that a recipe means, sorted by stage; legalization is not among them.

    One item, or several joined by `+` (`prune30+int8`), is a whole pipeline: cleanup and fuse are
    added, and the zeros that `sparsify` makes are packed at the end. So is a list with commas that
    only prunes and quantizes: `prune{ratio=0.3},int8`. Any other list with commas is taken as
    written: `cleanup,my_pass{x=1},int8`.

    Raises:
        UnknownPassError: no such recipe, group or pass.
        PassOptionError: the text or an option is wrong.
    """
    if not text.strip():
        raise PassOptionError(
            "The recipe is empty",
            fix=f"name one of {', '.join(RECIPES)}, or list passes",
        )
    specs = parse_specs(_PLUS.sub(",", text))
    asked = [item for spec in specs for item in _expand(spec)]
    whole = "," not in _outside_braces(text) or _compresses(specs, asked)
    passes: list[Pass] = []
    if whole:
        passes += [cls() for group in GROUPS.values() for cls in group]
    passes += asked
    if whole and not any(isinstance(item, PackZeros) for item in passes):
        shares = [item.share for item in passes if isinstance(item, Sparsify)]
        passes += [PackZeros(assumed=share) for share in shares[-1:]]
    return sort_by_stage(_without_repeats(passes))


def pruning_pass(text: str) -> Pass:
    """The first pass of a recipe that takes away a share, its `ratio`.

    Raises:
        PassOptionError: there is none, or the recipe can't be read.
    """
    for item in parse_recipe(text):
        if _takes_a_share(item):
            return item
    raise PassOptionError(
        f"The recipe {text!r} has no pass that prunes by a ratio",
        fix="name one: prune, prune{ratio=0.3}, prune+int8",
    )


def with_ratio(text: str, ratio: float, limit: float | None = None) -> str:
    """The recipe with another `ratio` of the pass that prunes, and another `limit` where it has
    one that is not given.

    Raises:
        PassOptionError: there is no such pass, or the recipe can't be read.
    """
    wanted = pruning_pass(text)
    options = {"ratio": round(ratio, 4)}
    default = next((f.default for f in dataclasses.fields(wanted) if f.name == "limit"), None)
    if limit is not None and default is not None and vars(wanted)["limit"] == default:
        options["limit"] = limit
    specs = parse_specs(_PLUS.sub(",", text))
    items = [_expand(spec) for spec in specs]
    whole = "," not in _outside_braces(text) or _compresses(
        specs, [item for passes in items for item in passes]
    )
    texts = []
    for spec, passes in zip(specs, items, strict=True):
        if passes and passes[0] == wanted:
            shown = format_pass(dataclasses.replace(passes[0], **options))
            if "ratio=" not in shown:  # the default
                rest = shown.removeprefix(passes[0].name).strip("{}")
                told = ",".join(part for part in (f"ratio={options['ratio']}", rest) if part)
                shown = f"{passes[0].name}{{{told}}}"
            texts.append(shown)
        elif spec.options:
            texts.append(format_pass(passes[0]))
        else:
            texts.append(spec.name)
    return ("+" if whole else ",").join(texts)


def _takes_a_share(item: Pass) -> bool:
    return item.stage is Stage.PRUNE and any(f.name == "ratio" for f in dataclasses.fields(item))


def epilogue() -> list[Pass]:
    """What runs after any recipe: nothing illegal reaches a runtime."""
    return [Legalize()]


def _expand(spec: PassSpec) -> list[Pass]:
    if spec.name in GROUPS and not spec.options:
        return [cls() for cls in GROUPS[spec.name]]
    if spec.name in RECIPES and not spec.options and spec.name not in ("fp16", "bf16", "int8"):
        return [
            build_pass(find_pass(inner.name), inner)
            for inner in parse_specs(RECIPES[spec.name].text)
        ]
    percent = _PERCENT.match(spec.name)
    if percent and not spec.options:
        spec = PassSpec(percent[1], (("ratio", int(percent[2]) / 100),))
    return [build_pass(find_pass(spec.name), spec)]


def _compresses(specs: Sequence[PassSpec], passes: Sequence[Pass]) -> bool:
    """Whether a list only says how to make a model smaller: the rest is for us to add."""
    named = any(spec.name in GROUPS for spec in specs)
    return not named and all(item.stage in (Stage.PRUNE, Stage.QUANTIZE) for item in passes)


def _outside_braces(text: str) -> str:
    return re.sub(r"\{[^}]*\}", "", text)


def _without_repeats(passes: Sequence[Pass]) -> list[Pass]:
    """Each pass once: `cleanup,cleanup` is one cleanup, options and all."""
    return list(dict.fromkeys(passes))
