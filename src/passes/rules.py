"""Rewrite rules: pattern, check, rewrite; and the worklist that applies them.

Here: `RewriteRule` (a pass that applies itself until nothing matches), `RuleGroup` (several rules
in one worklist), `explain` (why a rule did not fire). Not here: the pattern language (`ir.match`).

A rule of your own, about 15 lines:

    @dataclass(frozen=True)
    class SiLU(RewriteRule):
        '''Mul(x, Sigmoid(x)) -> com.example.SiLU(x)'''
        def pattern(self):
            x = var("x")
            return op.Mul(x, op.Sigmoid(x))
        def rewrite(self, m, build):
            return build.SiLU(m["x"], _domain="com.example")
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import onnx_ir as ir

from ..errors import EdgepassError, PassFailedError
from ..ir.edit import Builder, Editor, Listener
from ..ir.graph import CONTRIB_DOMAIN, all_nodes, describe_node, graph_tree, node_name, source_line
from ..ir.match import Match, Mismatch, OpPattern, match
from .base import Context, Pass, PassResult, Rewrite, Stage

_FAN_OUT = 4
"""Users of a changed value that are looked at again. A value with more users can't be private to
any of them, and following it would make the worklist quadratic."""


@dataclasses.dataclass(frozen=True)
class RewriteRule(Pass):
    """One local rewrite. Override `pattern` and `rewrite`, and `check` where a match may be wrong.

    The docstring draws before -> after.
    """

    stage: ClassVar[Stage] = Stage.FUSE
    idempotent: ClassVar[bool] = True

    @abc.abstractmethod
    def pattern(self) -> OpPattern | Sequence[OpPattern]:
        """What to look for; the root is its last node. Several: the first that fits."""

    def check(self, m: Match, context: Context) -> str | None:
        """Why the match must not be rewritten, or None when it may."""
        return None

    @abc.abstractmethod
    def rewrite(self, m: Match, build: Builder) -> ir.Value | tuple[ir.Value | None, ...]:
        """Build the replacement and return the values for the root's outputs, in order.

        Nodes of the match whose results are no longer used are removed afterwards.
        """

    def run(self, model: ir.Model, context: Context) -> PassResult:
        return run_rules(model, (self,), context)


@dataclasses.dataclass(frozen=True)
class RuleGroup(Pass):
    """A pass made of rules that share one worklist: `rules` lists the classes."""

    rules: ClassVar[tuple[type[RewriteRule], ...]] = ()
    idempotent: ClassVar[bool] = True
    fixpoint: ClassVar[bool] = True

    def run(self, model: ir.Model, context: Context) -> PassResult:
        return run_rules(model, tuple(rule() for rule in self.rules), context)


def run_rules(model: ir.Model, rules: Sequence[RewriteRule], context: Context) -> PassResult:
    """Apply rules until none matches; the notes say how often each fired."""
    rewrites = apply_rules(model, rules, context)
    counts = collections.Counter(item.rule for item in rewrites)
    notes = tuple(f"{name} x{count}" for name, count in sorted(counts.items()))
    return PassResult(model, bool(rewrites), notes, tuple(rewrites))


class _Worklist:
    """Nodes to look at, in graph order; hears from the editor what is worth another look."""

    def __init__(self, nodes: Iterable[ir.Node], reach: int) -> None:
        self._queue = collections.deque(nodes)
        self._waiting = {id(node) for node in self._queue}
        self._reach = reach
        self.made: list[ir.Node] = []

    def __iter__(self) -> Iterator[ir.Node]:
        while self._queue:
            node = self._queue.popleft()
            self._waiting.discard(id(node))
            if node.graph is not None:
                yield node

    def push(self, node: ir.Node) -> None:
        if id(node) not in self._waiting:
            self._waiting.add(id(node))
            self._queue.append(node)

    def inserted(self, node: ir.Node) -> None:
        self.made.append(node)
        self.changed(node)

    def erased(self, node: ir.Node) -> None:
        pass

    def changed(self, node: ir.Node) -> None:
        level = [node]
        for _ in range(self._reach):
            following: list[ir.Node] = []
            for item in level:
                self.push(item)
                for value in item.outputs:
                    if 0 < len(value.uses()) <= _FAN_OUT:
                        following.extend(value.consumers())
            level = following


class _RecordingEditor(Editor):
    """Remembers what was replaced by what, for certificates."""

    def __init__(self, *listeners: Listener) -> None:
        super().__init__(*listeners)
        self.replaced: list[tuple[ir.Value, ir.Value]] = []

    def replace_value(self, old: ir.Value, new: ir.Value) -> None:
        self.replaced.append((old, new))
        super().replace_value(old, new)


def apply_rules(model: ir.Model, rules: Sequence[RewriteRule], context: Context) -> list[Rewrite]:
    """Apply rules over the graph and its subgraphs with one worklist; which fired where.

    Functions of the model are left as they are: they can hold no initializers.

    Raises:
        PassFailedError: a rule raised; the rule and the node are named.
    """
    index, depth = _indexed(tuple(rules))
    context = dataclasses.replace(context, opsets=dict(model.opset_imports))
    rewrites: list[Rewrite] = []
    candidates = [
        node for graph in graph_tree(model.graph) for node in graph if node.op_type in index
    ]
    worklist = _Worklist(candidates, depth)
    editor = Editor(worklist) if context.certify is None else _RecordingEditor(worklist)
    for node in worklist:
        for rule, pattern in index.get(node.op_type, ()):
            if node.graph is None:
                break
            name, source = node_name(node), source_line(node)
            if _try_rule(rule, pattern, node, editor, context, model):
                rewrites.append(Rewrite(rule.name, name, source))
    if any(node.domain == CONTRIB_DOMAIN for node in worklist.made):
        model.opset_imports.setdefault(CONTRIB_DOMAIN, 1)
    return rewrites


_Index = dict[str, list[tuple[RewriteRule, OpPattern]]]


@functools.lru_cache(maxsize=256)
def _indexed(rules: tuple[RewriteRule, ...]) -> tuple[_Index, int]:
    """The patterns of rules by the operators they end in, and how deep the deepest is.

    Remembered, since a pipeline applies the same rules many times, and small models are over before
    a hundred patterns are built.
    """
    index: _Index = {}
    depth = 1
    for rule in rules:
        for pattern in _patterns(rule):
            depth = max(depth, _depth(pattern))
            for op_type in pattern.op_types:
                index.setdefault(op_type, []).append((rule, pattern))
    return index, depth


def _try_rule(
    rule: RewriteRule,
    pattern: OpPattern,
    node: ir.Node,
    editor: Editor,
    context: Context,
    model: ir.Model,
) -> bool:
    found = match(pattern, node)
    if isinstance(found, Mismatch):
        return False
    try:
        if not _replaceable(found, editor) or rule.check(found, context) is not None:
            return False
        seen = None
        if context.certify is not None and isinstance(editor, _RecordingEditor):
            seen = context.certify.before(found)
            editor.replaced.clear()
        values = rule.rewrite(found, Builder(editor, node, context.opsets.get("", 0)))
    except EdgepassError:
        raise
    except Exception as error:
        raise PassFailedError(
            f"The rule {rule.name!r} raised {type(error).__name__}: {error}",
            where=describe_node(node),
            fix="mend the rule's check or rewrite; leave the rule out to go on without it",
        ) from error
    replacements = values if isinstance(values, tuple) else (values,)
    if context.certify is not None and isinstance(editor, _RecordingEditor):
        own = ((o, n) for o, n in zip(node.outputs, replacements, strict=False) if n is not None)
        context.certify.after(rule.name, seen, [*editor.replaced, *own], model)
    for old, new in zip(node.outputs, replacements, strict=False):
        if new is not None:
            editor.replace_value(old, new)
    for inner in found.matched_nodes:
        if inner.graph is not None and not any(_used(v) for v in inner.outputs):
            editor.erase(inner)
    return True


def _replaceable(found: Match, editor: Editor) -> bool:
    return all(editor.can_replace(value, value) for value in found.root.outputs)


def _used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _patterns(rule: RewriteRule) -> tuple[OpPattern, ...]:
    pattern = rule.pattern()
    return (pattern,) if isinstance(pattern, OpPattern) else tuple(pattern)


def _depth(pattern: object) -> int:
    if isinstance(pattern, OpPattern):
        return 1 + max((_depth(i) for i in pattern.inputs), default=0)
    alternatives = getattr(pattern, "alternatives", ())
    return max((_depth(a) for a in alternatives), default=0)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Whether a rule matches at a node; if not, why and where it stopped."""

    rule: str
    node: str
    matched: bool
    reason: str
    source: str = ""

    def __str__(self) -> str:
        verdict = "matches" if self.matched else "does not match"
        lines = [f"{self.rule} {verdict} at {self.node}"]
        if self.reason:
            lines.append(f"  why: {self.reason}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """Plain data, for `--json`."""
        return dataclasses.asdict(self)


def explain(rule: RewriteRule, node: ir.Node, context: Context | None = None) -> Explanation:
    """Why `rule` does or does not apply with `node` as the root of the match.

    The reason is that of the alternative that came furthest.
    """
    best: Mismatch | None = None
    context = context or Context()
    if not context.opsets and node.graph is not None:
        context = dataclasses.replace(context, opsets=dict(node.graph.opset_imports))
    for pattern in _patterns(rule):
        found = match(pattern, node)
        if isinstance(found, Match):
            refusal = rule.check(found, context)
            if refusal is None and not _replaceable(found, Editor()):
                refusal = "the result is returned from another graph (an If or Loop body)"
            return Explanation(
                rule.name, describe_node(node), refusal is None, refusal or "", source_line(node)
            )
        if best is None or found.depth > best.depth:
            best = found
    return Explanation(
        rule.name,
        describe_node(node),
        False,
        str(best) if best is not None else "",
        source_line(node),
    )


def explain_all(
    rule: RewriteRule, model: ir.Model, context: Context | None = None
) -> list[Explanation]:
    """`explain` at every node whose op type the rule's pattern could end in."""
    roots = {op_type for pattern in _patterns(rule) for op_type in pattern.op_types}
    return [explain(rule, node, context) for node in all_nodes(model) if node.op_type in roots]
