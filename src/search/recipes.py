"""The post-training variants worth trying on a target and a model, each with a reason.

Here: `ptq_recipes` and `prune_recipes`, functions of facts alone, and `as_recipes`, which takes a
user's own list. Not here: what a recipe means (`pipelines`), running any (`sweep`).

A variant whose pass or option this installation lacks is left out, and so is one that the model or
the target gives nothing to do; `left_out` says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from ..errors import EdgepassError, UsageError
from ..ir.graph import all_nodes, constant_tensor
from ..pipelines import parse_recipe
from ..targets.target import Target

PTQ = "ptq"
PRUNE = "prune"
PERCENT = (10, 20, 30, 40, 50, 60, 70)
"""The shares of channels that `prune_recipes` takes out."""
_SMALL_SHARE = 0.02
"""A kind of weight with less of the model than this is not worth a variant of its own."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One to try: a name for people, its text, and why it is worth it."""

    name: str
    text: str
    why: str = ""


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What decides which variants make sense.

    `weights`: bytes of float weights by the operator that reads them. `rescalable`: pairs of
    weighted nodes with only a positive-homogeneous activation between them, whose channels can be
    rescaled against each other. `normed`: products that read a normalization's result, whose scale
    can take up what is divided off an activation.
    """

    weights: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rescalable: int = 0
    normed: int = 0

    def share(self, *ops: str) -> float:
        """The share of the float weights that these operators read, 0 to 1."""
        total = sum(self.weights.values())
        return sum(self.weights.get(op, 0) for op in ops) / total if total else 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be tried, in order, and what not (name, reason)."""

    recipes: tuple[Recipe, ...]
    left_out: tuple[tuple[str, str], ...] = ()


_CONV = ("Conv", "ConvTranspose", "FusedConv")
_PRODUCT = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")
_WEIGHTED = (*_CONV, *_PRODUCT)
_RECURRENT = ("LSTM", "GRU", "RNN")
_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "Flatten", "Identity")
_NORMS = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")


def model_facts(model: ir.Model) -> ModelFacts:
    """Read off a graph that has been through cleanup and fusion; weights may be absent."""
    weights: dict[str, int] = {}
    rescalable = normed = 0
    seen: set[int] = set()
    for node in all_nodes(model):
        first = node.inputs[0] if node.inputs else None
        for value in node.inputs:
            tensor = constant_tensor(value)
            if tensor is None or id(value) in seen or not tensor.dtype.is_floating_point():
                continue
            seen.add(id(value))
            weights[node.op_type] = weights.get(node.op_type, 0) + tensor.nbytes
        if node.op_type in _WEIGHTED and first is not None:
            source = first.producer()
            normed += source is not None and _plain_name(source) in _NORMS
            rescalable += _after_weights(source)
    return ModelFacts(weights, rescalable, normed)


def _plain_name(node: ir.Node) -> str:
    name: str = node.op_type
    return name.removeprefix("Skip")


def _after_weights(node: ir.Node | None) -> bool:
    """Whether a value comes from a weighted node through nothing that a scale can't pass."""
    for _ in range(4):
        if node is None:
            return False
        if node.op_type in _WEIGHTED:
            weight = node.inputs[1] if len(node.inputs) > 1 else None
            return constant_tensor(weight) is not None
        if node.op_type not in _HOMOGENEOUS or node.inputs[0] is None:
            return False
        node = node.inputs[0].producer()
    return False


@dataclasses.dataclass(frozen=True)
class _Variant:
    """A recipe, the ways in which it may be written (the first that is known counts), and what it
    needs: `lacks` is why the model or the target gives it nothing to do, '' where it does."""

    name: str
    texts: tuple[str, ...]
    why: str
    lacks: str = ""
    calibrated: bool = False


def ptq_recipes(facts: ModelFacts, target: Target, *, calibrated: bool) -> Plan:
    """The variants for a model and a target, the safe ones first.

    `calibrated`: whether there are samples to observe ranges on.
    """
    return _plan(_variants(facts, target), calibrated)


def prune_recipes(facts: ModelFacts, target: Target, *, calibrated: bool) -> Plan:
    """Structured pruning from 10 to 70 %, each with and without int8 on top."""
    none, lacks = _needs(facts, target)
    found = [
        _Variant("fp32", ("fp32",), "lossless: what every other is held against"),
        _Variant("int8", ("int8",), "what integers alone do", lacks, calibrated=True),
    ]
    for percent in PERCENT:
        name, why = f"prune{percent}", f"{percent} % of the channels, heads and features less"
        both = f"{name}+int8"
        found.append(_Variant(name, (name,), why, none))
        found.append(_Variant(both, (both,), f"{why}, then integers", lacks, calibrated=True))
    return _plan(found, calibrated)


def _plan(variants: Iterable[_Variant], calibrated: bool) -> Plan:
    kept: list[Recipe] = []
    left: list[tuple[str, str]] = []
    for variant in variants:
        text = next((text for text in variant.texts if _known(text)), None)
        if variant.lacks:
            left.append((variant.name, variant.lacks))
        elif text is None:
            left.append((variant.name, "this installation has no such pass or option"))
        elif variant.calibrated and not calibrated:
            left.append((variant.name, "it needs calibration samples, and none are given"))
        else:
            kept.append(Recipe(variant.name, text, variant.why))
    return Plan(tuple(kept), tuple(left))


def as_recipes(given: Iterable[object]) -> Plan:
    """A user's own list: recipe texts, or (name, text).

    Raises:
        UsageError: nothing is given, something else is, or a name comes twice.
    """
    found: list[Recipe] = []
    for item in given:
        if isinstance(item, Recipe):
            found.append(item)
        elif isinstance(item, str):
            found.append(Recipe(item, item))
        elif (
            isinstance(item, tuple | list)
            and len(item) == 2
            and all(isinstance(part, str) for part in item)
        ):
            found.append(Recipe(str(item[0]), str(item[1])))
        else:
            raise UsageError(
                f"A recipe can't be {item!r}",
                fix='give texts or pairs: recipes=["fp32", ("fine", "int8{observer=mse}")]',
            )
    names = [recipe.name for recipe in found]
    twice = [name for name in names if names.count(name) > 1]
    if not found or twice:
        raise UsageError(
            "No recipe is given" if not found else f"Two recipes are called {twice[0]!r}",
            fix='recipes="ptq", or a list of recipe texts or of (name, text)',
        )
    return Plan(tuple(found))


def _known(text: str) -> bool:
    """Whether every pass of the text is there, with these options."""
    try:
        parse_recipe(text)
    except EdgepassError:
        return False
    return True


def _with(*items: str) -> str:
    """Passes on top of cleanup and fusion. Options in braces need the list with commas."""
    if len(items) == 1:
        return items[0]
    return ",".join(("cleanup", "fuse", "lower", *items))


def _variants(facts: ModelFacts, target: Target) -> list[_Variant]:
    none, lacks = _needs(facts, target)
    return [
        _Variant("fp32", ("fp32",), "lossless: what every other is held against"),
        *_half(target, none),
        *_static(facts, lacks),
        *_weights(facts, none),
    ]


def _needs(facts: ModelFacts, target: Target) -> tuple[str, str]:
    """Why nothing can be compressed, and why nothing can run in integers; '' where it can."""
    none = "" if facts.weights else "the model has no float weights"
    if not none and target.scheme is None:
        return none, f"{target.name} does not compute in 8-bit integers"
    if not none and not facts.share(*_CONV, *_PRODUCT, *_RECURRENT):
        return none, "no convolution, product or recurrent layer has weights"
    return none, none


def _half(target: Target, none: str) -> list[_Variant]:
    runs = {dtype.name for dtype in target.float_dtypes}
    slow = "" if "FLOAT16" in runs else "; computed in float32 here"
    bf16 = "" if "BFLOAT16" in runs else f"{target.name} does not compute in bfloat16"
    return [
        _Variant("fp16", ("fp16",), f"half the file at nearly no loss{slow}", none),
        _Variant("bf16", ("bf16",), "half the file, with float32's range", none or bf16),
    ]


def _static(facts: ModelFacts, lacks: str) -> list[_Variant]:
    """Integer arithmetic with ranges from calibration, and ways to lose less by it."""
    pairs = "" if facts.rescalable else "no two layers with only a ReLU or the like between them"
    norms = "" if facts.normed else "no product reads a normalization"

    def static(name: str, why: str, *texts: str, also: str = "") -> _Variant:
        return _Variant(name, texts, why, lacks or also, calibrated=True)

    observers = (
        ("percentile", "leaves out rare outliers"),
        ("entropy", "keeps the most information (KL)"),
        ("mse", "makes the smallest squared error"),
    )
    return [
        static("int8", "smallest time: integer arithmetic, placed automatically", "int8"),
        *(
            static(f"int8 {name}", f"a range that {why}", f"int8{{observer={name}}}")
            for name, why in observers
        ),
        static(
            "smooth_quant + int8",
            f"{facts.normed} products read a normalization: outlier channels can move to weights",
            _with("smooth_quant", "int8"),
            also=norms,
        ),
        static(
            "equalize + int8",
            f"{facts.rescalable} pairs of layers can be rescaled to even channel ranges",
            _with("equalize", "int8"),
            also=pairs,
        ),
        static(
            "int8 bias correction",
            "the mean error of each layer goes into its bias",
            "int8{bias_correction=true}",
            _with("int8", "bias_correction"),
        ),
        static(
            "int8 adaround",
            "weights rounded by what the layer's output loses",
            "int8{rounding=adaround}",
            _with("int8", "adaround"),
        ),
        static(
            "int8 reconstruct",
            "each layer solved again by least squares on what reaches it",
            "int8{reconstruct=true}",
        ),
        static(
            "int8 int16-activations",
            "where activations, not weights, need the finer steps",
            "int8{scheme=u16s8}",
            "int8{scheme=s16s8}",
            "int8{activations=int16}",
        ),
    ]


def _weights(facts: ModelFacts, none: str) -> list[_Variant]:
    """Integers in the file: float arithmetic, or activations quantized as they come."""
    matrices = facts.share(*_PRODUCT, *_RECURRENT)
    no_product = "" if matrices > _SMALL_SHARE else "hardly any weight is of a product"
    blocked = facts.share(*_PRODUCT)
    no_block = "" if blocked > _SMALL_SHARE else "hardly any weight is of a matrix product"

    def int4(name: str, why: str, *texts: str, calibrated: bool = False) -> _Variant:
        return _Variant(name, texts, why, none or no_block, calibrated)

    return [
        _Variant(
            "dynamic-int8",
            ("dynamic-int8",),
            f"{matrices:.0%} of the weights are of products: integers without calibration",
            none or no_product,
        ),
        _Variant(
            "int8-weights", ("int8-weights",), "a quarter of the file, float arithmetic", none
        ),
        int4("int4-weights", "an eighth of the file, rounded to nearest", "int4-weights"),
        int4(
            "int4-weights hqq",
            "scales fitted to the weights alone (half-quadratic)",
            "weight_only{bits=4,method=hqq}",
        ),
        int4(
            "int4-weights gptq",
            "later weights make up for the rounding of earlier ones",
            "weight_only{bits=4,method=gptq}",
            calibrated=True,
        ),
        int4(
            "int4-weights awq",
            "the channels that activations stress are kept finer",
            "weight_only{bits=4,method=awq}",
            calibrated=True,
        ),
        int4(
            "int4-weights awq + gptq",
            "both: channels kept finer, then rounding made up for",
            "weight_only{bits=4,method=awq-gptq}",
            calibrated=True,
        ),
        int4(
            "int3-weights awq + gptq",
            "less than a tenth of the file, where 4 bits are not small enough",
            "weight_only{bits=3,method=awq-gptq}",
            calibrated=True,
        ),
        _Variant(
            "palettize 6 bits",
            ("palettize{bits=6}",),
            "64 values a layer, chosen by k-means",
            none,
        ),
        _Variant(
            "palettize 4 bits",
            ("palettize{bits=4}",),
            "16 values a layer, chosen by k-means",
            none,
        ),
    ]
