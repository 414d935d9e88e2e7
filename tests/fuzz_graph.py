"""Random graphs for fuzzing, made straight from a seed: no hypothesis, a millisecond each.

Here: `Grower`, which holds a growing graph and offers values to build on, and `fuzz_case`: a model
with its feeds. What can be grown is in `fuzz_steps` (movement, shapes, integers, control flow) and
`fuzz_blocks` (what networks are made of). Jumps (rounding, comparing, casts to integers) are
applied to inputs only: elsewhere a rounding error would show as a whole step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int | str, ...]

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL

INPUTS: dict[str, tuple[int, Shape]] = {
    "image": (FLOAT, ("batch", 4, 6, 6)),
    "tokens": (FLOAT, ("batch", "length", 8)),
    "matrix": (FLOAT, ("batch", 8)),
    "ids": (INT64, ("batch", "length")),
    "flag": (BOOL, ()),
}

STEPS: list[tuple[Callable[[Grower], None], int]] = []


def step(weight: int = 2) -> Callable[[Callable[[Grower], None]], Callable[[Grower], None]]:
    """Register a way to grow a graph; it may do nothing where no value fits."""

    def register(function: Callable[[Grower], None]) -> Callable[[Grower], None]:
        STEPS.append((function, weight))
        return function

    return register


@dataclasses.dataclass(frozen=True)
class Value:
    """A float value that can be built on. `exact` ones are inputs, or moved inputs."""

    name: str
    shape: Shape
    exact: bool = False


class Grower:
    """A graph that grows. Methods named after what they add return names or `Value`s."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = int(self.rng.integers(13, 25))
        dynamic = self.rng.random() < 0.7
        self.sizes = {
            "batch": int(self.rng.integers(1, 4)),
            "length": int(self.rng.integers(2, 6)),
        }
        self.dynamic = dynamic
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.count = 0
        self.inputs = {n: (t, self.bound(s)) for n, (t, s) in INPUTS.items()}
        self.values = [
            Value(name, shape, True) for name, (t, shape) in self.inputs.items() if t == FLOAT
        ]

    # --- parts ---

    def bound(self, shape: Shape) -> Shape:
        return shape if self.dynamic else tuple(self.sizes.get(d, d) for d in shape)

    def name(self, stem: str = "v") -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def choose(self, items):
        return items[int(self.rng.integers(len(items)))]

    def node(self, op: str, *inputs: str | np.ndarray, outs: int = 1, domain: str = "", **attrs):
        """Add a node; arrays become constants. The name of its result, or names of several."""
        names = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        results = [self.name() for _ in range(outs)]
        self.nodes.append(
            helper.make_node(op, names, results, name=self.name("n"), domain=domain, **attrs)
        )
        return results[0] if outs == 1 else results

    def constant(self, array: np.ndarray) -> str:
        name, array = self.name("w"), np.asarray(array)
        if self.chance(0.85):
            self.weights.append(numpy_helper.from_array(array, name))
        else:
            tensor = numpy_helper.from_array(array, name)
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def random(self, *shape: int, low: float = -1.0, high: float = 1.0) -> np.ndarray:
        return self.rng.uniform(low, high, shape).astype(np.float32)

    def keep(self, name: str, shape: Shape, exact: bool = False) -> Value:
        """Make a value known, to be built on."""
        value = Value(name, tuple(shape), exact)
        self.values.append(value)
        return value

    def pick(self, fits: Callable[[Value], bool] = lambda value: True) -> Value | None:
        """A value that fits, newer ones rather; None where none does."""
        found = [value for value in self.values if fits(value)]
        if not found:
            return None
        if self.chance(0.5):
            return found[-1 - int(self.rng.integers(min(3, len(found))))]
        return self.choose(found)

    def axes(self, op: str, name: str, axes: list[int], **attrs) -> str:
        """A reduction over axes, which became an input in opset 18 (ReduceSum: 13)."""
        if self.opset >= (13 if op == "ReduceSum" else 18):
            return self.node(op, name, np.array(axes, np.int64), **attrs)
        return self.node(op, name, axes=axes, **attrs)

    def split(self, name: str, sizes: list[int], axis: int) -> list[str]:
        if self.chance(0.5) and len(set(sizes)) == 1:
            options = {"num_outputs": len(sizes)} if self.opset >= 18 else {}
            found = self.node("Split", name, outs=len(sizes), axis=axis, **options)
        else:
            found = self.node("Split", name, np.array(sizes, np.int64), outs=len(sizes), axis=axis)
        return [found] if isinstance(found, str) else found

    # --- the whole ---

    def grow(self) -> None:
        weights = np.array([weight for _, weight in STEPS], np.float64)
        for index in self.rng.choice(
            len(STEPS), int(self.rng.integers(2, 9)), p=weights / weights.sum()
        ):
            STEPS[index][0](self)

    def model(self) -> onnx.ModelProto:
        made = [v for v in self.values if v.name not in INPUTS] or self.values
        used = {name for node in self.nodes for name in node.input}
        loose = [v for v in made if v.name not in used] or made[-1:]
        chosen = loose if self.chance(0.8) else [self.choose(loose)]  # the rest is dead code
        if self.chance(0.5):
            chosen = [*chosen, self.choose(made)]  # an inner value, or the same one twice
        outputs, names = [], set()
        for value in chosen:
            name = value.name
            if name in INPUTS or name in names or self.chance(0.4):
                name = self.node("Identity", name)
            names.add(name)
            outputs.append(helper.make_tensor_value_info(name, FLOAT, list(value.shape)))
        inputs = [helper.make_tensor_value_info(n, t, list(s)) for n, (t, s) in self.inputs.items()]
        graph = helper.make_graph(self.nodes, "fuzz", inputs, outputs, self.weights)
        imports = [helper.make_opsetid("", self.opset)]
        if self.functions:
            imports.append(helper.make_opsetid("local", 1))
        return helper.make_model(
            graph, opset_imports=imports, ir_version=10, functions=self.functions
        )

    def feeds(self) -> list[dict[str, np.ndarray]]:
        """Random numbers at the sizes that static graphs have, and at others where free."""
        found = [self.feed(self.sizes)]
        if self.dynamic:
            batch, length = int(self.rng.integers(1, 5)), int(self.rng.integers(1, 8))
            found.append(self.feed({"batch": batch, "length": length}))
        if self.chance(0.3):  # where sums vanish, maxima tie and functions saturate
            factor = self.choose([0.0, 30.0])
            found.append(
                {
                    k: (np.abs(v) * np.float32(factor) if v.dtype == np.float32 else v)
                    for k, v in found[0].items()
                }
            )
        return found

    def feed(self, sizes: dict[str, int]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for name, (dtype, declared) in INPUTS.items():
            shape = [sizes.get(d, d) for d in declared]
            if dtype == FLOAT:
                found[name] = self.rng.standard_normal(shape).astype(np.float32)
            elif dtype == INT64:
                found[name] = self.rng.integers(0, 5, shape)
            else:
                found[name] = np.array(self.chance(0.5))
        return found


def fuzz_case(seed: int) -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    """The model of a seed, and inputs for it."""
    import fuzz_blocks  # noqa: F401  (they register their steps)
    import fuzz_steps  # noqa: F401

    grower = Grower(seed)
    grower.grow()
    return grower.model(), grower.feeds()
