"""What a pass is: a frozen dataclass with options, a stage, and one method.

Here: `Pass`, `PassResult`, `Context`, `Stage`. Not here: running passes (`driver`), their text form
(`spec`), names (`registry`), rewrite rules (`rules`).

A pass of your own:

    @dataclass(frozen=True)
    class DropPrints(Pass):
        '''Removes Print nodes.'''
        stage = Stage.CLEANUP
        def run(self, model, context):
            ...
            return PassResult(model, modified)
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx_ir as ir

from ..ir.match import Match
from ..ir.quant import QuantPlan
from ..targets.target import Target

Feed = Mapping[str, np.ndarray]
"""One sample: the array of every graph input by name."""


class Stage(enum.IntEnum):
    """When a pass may run. A pipeline is sorted by stage; within a stage, order is as given.

    Prune comes first, since shapes and ranges change; fuse comes before quantize, so that
    only tensors that survive are observed.
    """

    IMPORT = 0
    CLEANUP = 1
    PRUNE = 2
    FUSE = 3
    QUANTIZE = 4
    LEGALIZE = 5
    LOWER = 6


class Witness(Protocol):
    """Is shown what every firing of a rule replaces, and by what."""

    def before(self, found: Match) -> Any:
        """What is to be remembered of the graph before the rule rewrites it."""

    def after(
        self,
        rule: str,
        before: Any,
        replaced: Sequence[tuple[ir.Value, ir.Value]],
        model: ir.Model,
    ) -> None:
        """The rule has built what takes the place of what: values, and the new ones."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What a pass may know besides the model.

    `target` is None when a pass is run on its own. `calibration` is a sequence of samples (each a
    mapping from input name to array). `dims` gives symbolic dimensions the sizes at which costs
    are counted. `progress` is called with (done, total, what). `opsets` are the model's opset
    versions by domain, set by whatever applies rules. `certify` is shown every firing of a rule,
    before and after (`passes.equality.Certifier`). `portable` keeps rules to standard operators.
    """

    target: Target | None = None
    calibration: Sequence[Feed] | None = None
    dims: Mapping[str, int] = dataclasses.field(default_factory=dict)
    progress: Callable[[int, int, str], None] = lambda done, total, what: None
    opsets: Mapping[str, int] = dataclasses.field(default_factory=dict)
    certify: Witness | None = None
    portable: bool = False


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One firing of a rewrite rule: which, at which node, and the user's source line if known."""

    rule: str
    node: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class PassResult:
    """The model after the pass (the same object when edited in place), and whether it changed.

    `notes` are lines for the ledger: what was done, what was refused and why. `rewrites` say which
    rule fired where, in order.
    """

    model: ir.Model
    modified: bool
    notes: tuple[str, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()


_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@dataclasses.dataclass(frozen=True)
class Pass(abc.ABC):
    """Base of all passes. Fields are options; the docstring is the help text.

    Class attributes a pass may set:
    `name`: as written in recipes; derived from the class name when not set.
    `stage`: when it runs.
    `lossless`: results stay equal up to float rounding. Lossy passes are not held to 1e-4.
    `idempotent`: a second run changes nothing (tested).
    `fixpoint`: the driver repeats the group of such passes until none modifies the model.
    `needs_weights`: it can't run on an architecture without weights.
    `faster`: it is there for speed: `compile` refuses a result that is slower than float.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[Stage] = Stage.CLEANUP
    lossless: ClassVar[bool] = True
    idempotent: ClassVar[bool] = False
    fixpoint: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False
    faster: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = _CAMEL.sub("_", cls.__name__).lower()

    @abc.abstractmethod
    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Transform the model, in place where that is easier.

        Raises:
            EdgepassError: when the model or the context lacks what the pass needs.
        """

    def plan(self, model: ir.Model, context: Context) -> QuantPlan | None:
        """What the pass would store where, without weights: how `estimate` prices it.

        A pass that needs weights and changes what is stored overrides this. None: nothing is known
        but the graph as it is.
        """
        return None

    def __str__(self) -> str:
        from .spec import format_pass

        return format_pass(self)
