"""A certificate for each firing of a rule: that the region after computes what the one before did.

Here: `Certifier`, which a `Context` carries to the rule engine, and `certify_region`. Not here:
cutting the regions out (`region`), inputs (`feeds`), when results are equal (`judge`).

    certifier = Certifier()
    run_rules(model, rules, Context(certify=certifier))
    for certificate in certifier.certificates: print(certificate)

Three methods, the strongest that applies. *symbolic*: results are integers computed from shapes,
and shape inference finds the same expression of the symbolic sizes for every element on both sides:
equal at all sizes. *exhaustive*: every combination of inputs was run. *numeric*: adversarial inputs
at several sizes were run in ONNX Runtime, its optimizations off. Where these differ by more than
the tolerance, the region before is run in double precision too: what rounding alone does to the
original is no difference either.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ...errors import EdgepassError, WeightsAbsentError
from ...ir import dims as dim_math
from ...ir.graph import constant_tensor, graphs, is_absent, is_onnx_op, node_name, source_line
from ...ir.match import Match
from ...ir.ops import is_deterministic, is_elementwise
from ...ir.shapes import infer_shapes
from .feeds import BAND, NON_FINITE, Case, adversarial, assignments, exhaustive, fill
from .judge import Difference, compare
from .region import Record, Region, cut, record
from .wide import Wide

_FATAL_WHEN_EMPTY = frozenset({"Einsum"})
"""Operators whose kernel in ONNX Runtime 1.32 divides by a size: one of 0 ends the process."""

CONTEXTS = (0, 2, 8)
"""Layers of producers added above a region that differs, before it is said to differ: a rule may
rely on what feeds its match (that a value is positive, that two sizes are the same)."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What was found for one rewrite.

    `method` is symbolic, exhaustive, numeric or none; `cases` how many inputs were run;
    `worst_error` the largest difference relative to an output's range; `verdict` equal, differs
    or `not checked`; `detail` says what differs or why it was not checked; `policy` what becomes of
    NaN and infinity. `source` is the user's source line.
    """

    rule: str
    node: str
    source: str
    method: str
    cases: int
    worst_error: float
    verdict: str
    detail: str = ""
    policy: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether before and after are equal; None where that was not checked."""
        return {"equal": True, "differs": False}.get(self.verdict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {**dataclasses.asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        head = f"{self.rule} at {self.node}: {self.verdict}"
        if self.verdict != "not checked":
            head += f" ({self.method}, {self.cases} cases, worst error {self.worst_error:.1e})"
        return "; ".join(part for part in (head, self.detail, self.policy) if part)


class Certifier:
    """Collects a certificate for every firing; give it as `Context(certify=...)`.

    `dims` fixes symbolic sizes. `keep` also keeps each region, as `regions`.
    """

    def __init__(
        self, *, seed: int = 0, dims: Mapping[str, int] | None = None, keep: bool = False
    ) -> None:
        self.seed = seed
        self.dims = dict(dims or {})
        self.certificates: list[Certificate] = []
        self.regions: list[Region] = []
        self._keep = keep

    def before(self, found: Match) -> Record:
        """Called by the rule engine before a rule rewrites."""
        return record(found.matched_nodes)

    def after(
        self,
        rule: str,
        before: Record,
        replaced: Sequence[tuple[ir.Value, ir.Value]],
        model: ir.Model,
    ) -> None:
        """Called by the rule engine with the values that the rule replaces, and by what."""
        root = before.matched[0].node
        label = node_name(root)
        source, functions = source_line(root), list(model.functions.values())
        found: Certificate | None = None
        kept: Region | None = None
        for context in CONTEXTS:
            try:
                region = cut(before, replaced, model.opset_imports, functions, context=context)
                outcome = certify_region(region, seed=self.seed, dims=self.dims)
            except EdgepassError as error:
                outcome, region = _not_checked(error.diagnostic.what), None
            if found is None or outcome.verdict == "equal":
                found, kept = outcome, region
            if outcome.verdict == "equal":
                if context:
                    note = f"given the {context} layers of nodes above"
                    found = dataclasses.replace(found, detail=_join(note, found.detail))
                break
        assert found is not None
        self.certificates.append(dataclasses.replace(found, rule=rule, node=label, source=source))
        if self._keep and kept is not None:
            self.regions.append(kept)

    @property
    def differing(self) -> list[Certificate]:
        """Certificates that found a difference."""
        return [item for item in self.certificates if item.holds is False]


def certify_region(
    region: Region, *, seed: int = 0, dims: Mapping[str, int] | None = None
) -> Certificate:
    """The certificate of a region, without rule and place."""
    if not all(is_deterministic(n) for m in (region.before, region.after) for n in m.graph):
        return _not_checked("it holds random operators")
    proof = _symbolic(region)
    if proof is not None:
        return proof
    from ...targets.onnxruntime import OrtRunner

    try:
        filled = _fill_absent(region, seed)
    except WeightsAbsentError as error:
        return _not_checked(error.diagnostic.what)
    try:
        first = OrtRunner(region.before, optimize=False)
    except EdgepassError as error:
        return _not_checked(f"the runtime does not take the region before: {error.diagnostic.why}")
    with first:
        try:
            second = OrtRunner(region.after, optimize=False)
        except EdgepassError as error:
            if not _runs(region, first, seed, dict(dims or {})):
                return _not_checked("neither region runs")
            why = error.diagnostic.why or error.diagnostic.what
            return _outcome("none", 0, float("inf"), "differs", f"the result is invalid: {why}")
        with second:
            found = _run_cases(region, first, second, seed, dict(dims or {}))
    if filled and found.holds is False:
        return _not_checked("weights may be computed from weights that have no data")
    return found


def _by_element(node: ir.Node) -> bool:
    return is_elementwise(node) or is_onnx_op(node, "Identity")


def _through_double(op_type: str) -> bool:
    """Whether ONNX Runtime computes it in double on integers too: not exact for the largest."""
    return op_type == "Pow" or op_type.startswith("Reduce")


def _runs(region: Region, runner: Any, seed: int, dims: Mapping[str, int]) -> bool:
    """Whether the region before runs on any input tried."""
    values = list(region.before.graph.inputs)
    for sizes in assignments(values, dims)[:4]:
        for case in itertools.islice(adversarial(values, sizes, seed, positive=True), 3):
            try:
                runner.run(case.feed)
            except EdgepassError:
                continue
            return True
    return False


@dataclasses.dataclass
class _Findings:
    """What the cases run so far have shown."""

    wide: Wide
    exact: bool = True
    cases: int = 0
    worst: float = 0.0
    refusal: str = ""
    notes: dict[str, None] = dataclasses.field(default_factory=dict)
    policies: dict[str, None] = dataclasses.field(default_factory=dict)
    failure: str = ""


def _run_cases(
    region: Region, first: Any, second: Any, seed: int, dims: Mapping[str, int]
) -> Certificate:
    values = list(region.before.graph.inputs)
    findings = _Findings(Wide(region.before, first))
    everything = exhaustive(values, all(map(_by_element, region.before.graph)))
    if everything is not None:
        for feed in everything:
            _run_case(Case("normal", feed, {}), first, second, findings)
            if findings.failure:
                break
        if findings.cases == len(everything) or findings.failure:
            return _conclude("exhaustive", findings, region)
    positive = _divides_integers(region)
    used = {n.op_type for model in (region.before, region.after) for n in model.graph}
    empty, findings.exact = not used & _FATAL_WHEN_EMPTY, not any(map(_through_double, used))
    for dims_ in assignments(values, dims):
        if not empty and 0 in dims_.values():
            continue
        for case in adversarial(values, dims_, seed, positive=positive):
            _run_case(case, first, second, findings)
            if findings.failure:
                return _conclude("numeric", findings, region)
    return _conclude("numeric", findings, region)


def _run_case(case: Case, first: Any, second: Any, findings: _Findings) -> None:
    try:
        expected = list(first.run(case.feed).values())
    except EdgepassError as error:  # an input that the original refuses says nothing
        findings.refusal = error.diagnostic.why or error.diagnostic.what
        return
    sizes = f" with {dict(case.dims)}" if case.dims else ""
    try:
        actual = list(second.run(_inputs_of(second, case.feed)).values())
    except EdgepassError as error:
        if any(array.size == 0 for array in case.feed.values()):
            findings.policies.setdefault("refuses empty tensors")
            return
        findings.failure = f"on {case.kind} inputs{sizes} the result fails: {error.diagnostic.why}"
        return
    if any(isinstance(item, list | dict) for item in (*expected, *actual)):
        return  # a sequence
    found = compare(expected, actual)
    findings.cases += 1
    if case.kind in NON_FINITE:
        agree = found.acceptable and not found.other_kind
        word = "agrees" if agree else "differs"
        findings.policies.setdefault(f"{word} on {_NAMES[case.kind]}")
        return
    if found.other_kind:
        findings.policies.setdefault("differs where the original is not finite")
    if case.kind in BAND and not found.acceptable:
        if not (found.lost or found.other_kind) and _exact(expected) and findings.exact:
            findings.failure = _words(found, case, sizes)
        findings.policies.setdefault("differs near overflow")
        return
    if not found.acceptable and found.error != float("inf"):
        slack = findings.wide.own_errors(case.feed, expected, nudge=case.kind != "integers")
        found = compare(expected, actual, slack=slack)
        if found.acceptable:
            findings.notes.setdefault("as far from the original as that is from double precision")
    if not found.acceptable:
        findings.failure = _words(found, case, sizes)
    findings.worst = max(findings.worst, found.error)


_NAMES = {"infinite": "infinite inputs", "nan": "NaN inputs"}


def _words(found: Difference, case: Case, sizes: str) -> str:
    why = found.why or f"it is {found.error:.1e} of the range, {found.allowed:.0e} being allowed"
    return f"output {found.output} differs on {case.kind} inputs{sizes}: {why}"


def _exact(results: Sequence[np.ndarray]) -> bool:
    return all(np.asarray(a).dtype.kind in "iub" for a in results)


def _inputs_of(runner: Any, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {spec.name for spec in runner.inputs}
    return {name: array for name, array in feed.items() if name in names}


def _conclude(method: str, findings: _Findings, region: Region) -> Certificate:
    policy = "; ".join(findings.policies)
    if findings.failure and region.loose:
        return _not_checked(f"{findings.failure}; the result also reads {region.loose}")
    if findings.failure:
        return _outcome(method, findings.cases, float("inf"), "differs", findings.failure, policy)
    if not findings.cases:
        return _not_checked(f"the region before runs on no input tried: {findings.refusal}")
    return _outcome(
        method, findings.cases, findings.worst, "equal", "; ".join(findings.notes), policy
    )


def _outcome(
    method: str, cases: int, worst: float, verdict: str, detail: str = "", policy: str = ""
) -> Certificate:
    return Certificate("", "", "", method, cases, worst, verdict, detail, policy)


def _not_checked(why: str) -> Certificate:
    return _outcome("none", 0, 0.0, "not checked", why)


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


# --- shapes -----------------------------------------------------------------------------------


def _symbolic(region: Region) -> Certificate | None:
    """Equal at all sizes: each element of each result is the same expression of the symbols."""
    integers = (ir.DataType.INT64, ir.DataType.INT32)
    if any(v.dtype not in integers for v in region.before.graph.outputs):
        return None
    sides = []
    for model in (region.before, region.after):
        try:
            report = infer_shapes(model, strict=False)
        except EdgepassError:
            return None
        sides.append([(report.shape_values(v), v.shape) for v in model.graph.outputs])
    for (left, shape), (right, other) in zip(*sides, strict=True):
        if left is None or right is None or shape is None or other is None:
            return None
        if shape.dims != other.dims or len(left) != len(right):
            return None
        if not all(dim_math.same(a, b) for a, b in zip(left, right, strict=True)):
            return None
    return _outcome("symbolic", 0, 0.0, "equal", "the same expressions of the symbolic sizes")


def _divides_integers(region: Region) -> bool:
    """Whether an integer is divided by something that is not a constant."""
    return any(
        node.op_type in ("Div", "Mod")
        and any(v is not None and v.dtype is not None and v.dtype.is_integer() for v in node.inputs)
        for model in (region.before, region.after)
        for node in model.graph
        if len(node.inputs) > 1 and constant_tensor(node.inputs[1]) is None
    )


def _fill_absent(region: Region, seed: int) -> bool:
    """Random numbers for weights without data; the same tensor gets the same on both sides. Whether
    there are any.

    Raises:
        WeightsAbsentError: the two sides do not have the same weights, so that some were computed.
    """
    sides = [
        {
            id(value.const_value)
            for graph in graphs(model)
            for value in graph.initializers.values()
            if is_absent(value.const_value)
        }
        for model in (region.before, region.after)
    ]
    if sides[0] != sides[1]:
        raise WeightsAbsentError("weights are computed from weights that have no data")
    filled: dict[int, ir.TensorProtocol] = {}
    for model in (region.before, region.after):
        for graph in graphs(model):
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None or not is_absent(tensor):
                    continue
                if id(tensor) not in filled:
                    filled[id(tensor)] = _random_weight(tensor, seed)
                value.const_value = filled[id(tensor)]
    return bool(filled)


def _random_weight(tensor: ir.TensorProtocol, seed: int) -> ir.TensorProtocol:
    generator = np.random.default_rng([seed, zlib.crc32((tensor.name or "").encode())])
    shape = tuple(int(d) for d in tensor.shape.numpy())
    return ir.tensor(fill("normal", tensor.dtype, shape, generator), dtype=tensor.dtype)


__all__ = ["Certificate", "Certifier", "certify_region"]
