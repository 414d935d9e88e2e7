"""Running passes: what every pass needs and none writes.

Here: order by stage, shapes for every value, verification before and after, the interface check,
repetition to a fixpoint, timing, the ledger line, numeric error, and errors that name the pass. Not
here: which passes a recipe means (`pipelines`), finding a guilty pass (`bisect`).
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from ..errors import EdgepassError, InvalidGraphError, PassFailedError, WeightsAbsentError
from ..ir.graph import absent_weights, index_names
from ..ir.shapes import infer_shapes
from ..ir.verify import Signature, interface, interface_difference, verify
from .base import Context, Pass, PassResult, Stage
from .ledger import Ledger, LedgerRow, Measure, measure
from .probe import Probe, numeric_error

MAX_ROUNDS = 10
"""Rounds of a fixpoint group. Reaching it is noted in the ledger; it has not been seen."""


@dataclasses.dataclass
class _Progress:
    """The state of one run over a list of passes."""

    model: ir.Model
    context: Context
    ledger: Ledger
    current: Measure
    reference: dict[str, np.ndarray] | None = None
    unchecked: str = ""
    probe: Probe | None = None
    first: dict[str, np.ndarray] | None = None
    before_names: list[str] = dataclasses.field(default_factory=list)
    quick: bool = False
    indexed: bool = False


def sort_by_stage(passes: Sequence[Pass]) -> list[Pass]:
    """Passes in order of stage; those of one stage keep the order given."""
    return sorted(passes, key=lambda item: item.stage)


def run_passes(
    model: ir.Model,
    passes: Sequence[Pass],
    context: Context | None = None,
    *,
    probe: Probe | None = None,
    after_pass: Callable[[Pass, ir.Model], None] | None = None,
    quick: bool = False,
    shaped: bool = False,
) -> tuple[ir.Model, Ledger]:
    """Run passes over a model, which may be changed in place.

    `probe` makes each modifying pass report its numeric error against the model before it.
    `after_pass` is called with each pass that changed the model, and the model. `quick` leaves the
    MACs of models with dynamic shapes out of the ledger. `shaped`: every value has its shape.

    Raises:
        InvalidGraphError: the model is unsound before the first pass.
        ShapeError: a node's shapes contradict its operator.
        WeightsAbsentError: a pass needs weights that the model lacks.
        PassFailedError: a pass raised, or left an unsound model or another interface.
    """
    context = context or Context()
    verify(model)
    reference, unchecked = _reference(model, probe)
    mended = () if shaped else infer_shapes(model, mend=True).mended
    state = _Progress(
        model,
        context,
        Ledger(remarks=[f"the model declares a shape that can't be: {text}" for text in mended]),
        measure(model, context.dims, infer=not quick),
        reference,
        unchecked,
        None if reference is None else probe,
        reference,
        quick=quick,
    )
    ordered = sort_by_stage(passes)
    total = len(ordered)
    done = 0
    for repeat, group in itertools.groupby(ordered, key=lambda p: (p.stage, p.fixpoint)):
        members = list(group)
        rows: dict[int, LedgerRow] = {}
        rounds = MAX_ROUNDS if repeat[1] else 1
        clean = [False] * len(members)
        for _ in range(rounds):
            for i, item in enumerate(members):
                # a pass that left the model alone need not look again until another changed it
                if clean[i]:
                    continue
                context.progress(done, total, str(item))
                row = _run_one(state, item)
                rows[i] = _merge(rows.get(i), row)
                if row.modified:
                    clean = [False] * len(members)
                    if after_pass is not None:
                        after_pass(item, state.model)
                clean[i] = not row.modified or item.idempotent
            if all(clean):
                break
        else:
            if repeat[1]:
                last = max(rows)
                rows[last] = dataclasses.replace(
                    rows[last],
                    notes=(*rows[last].notes, f"stopped after {MAX_ROUNDS} rounds"),
                )
        done += len(members)
        state.ledger.rows.extend(rows[i] for i in sorted(rows))
    context.progress(total, total, "")
    if state.first is not None and state.reference is not None:
        state.ledger.total_error = numeric_error(state.first, state.reference)
    return state.model, state.ledger


def _reference(model: ir.Model, probe: Probe | None) -> tuple[dict[str, np.ndarray] | None, str]:
    """The source's own results, or None and why not. Taken before anything is written to it:
    shapes that we infer for a branch never taken can make the runtime refuse the model."""
    if probe is None:
        return None, ""
    try:
        return probe.run(model), ""
    except EdgepassError as error:
        return None, f"not checked: {error.diagnostic.what}"


def _run_one(state: _Progress, item: Pass) -> LedgerRow:
    model = state.model
    if item.needs_weights and (missing := absent_weights(model)):
        raise WeightsAbsentError(
            f"The pass {str(item)!r} needs weights, and {len(missing)} have no data",
            where=f"the first is {missing[0]!r}",
            why="the model is an architecture without weights",
            fix="use `edgepass.estimate` to price the recipe, or provide the weights",
        )
    signature = interface(model.graph.inputs), interface(model.graph.outputs)
    if not state.indexed:  # what a pass that changed nothing left is still right
        index_names(model)
        state.indexed = True
    started = time.perf_counter()
    result = _call(state, item, model)
    seconds = time.perf_counter() - started
    state.model = result.model
    before = state.current
    error, note = None, state.unchecked
    if result.modified:
        state.indexed = False
        _check_after(state, item, signature)
        state.current = measure(result.model, state.context.dims, infer=not state.quick)
        if state.probe is not None:
            after = dict(state.probe.run(result.model))
            assert state.reference is not None
            error = numeric_error(state.reference, after)
            state.reference, note = after, ""
    state.before_names.append(str(item))
    return LedgerRow(
        str(item),
        before,
        state.current,
        seconds,
        result.modified,
        1,
        error,
        note,
        result.notes,
        result.rewrites,
    )


def _call(state: _Progress, item: Pass, model: ir.Model) -> PassResult:
    try:
        result = item.run(model, state.context)
    except EdgepassError:
        raise
    except Exception as error:
        raise PassFailedError(
            f"The pass {str(item)!r} raised {type(error).__name__}: {error}",
            where=f"after {', '.join(state.before_names) or 'nothing'}",
            fix="leave the pass out to go on; `edgepass bisect` writes a minimal reproducer",
        ) from error
    if not isinstance(result, PassResult):
        raise PassFailedError(
            f"The pass {str(item)!r} returned {type(result).__name__}, not a PassResult",
            where=f"{type(item).__module__}.{type(item).__qualname__}.run",
            fix="return PassResult(model, modified)",
        )
    return result


def _check_after(state: _Progress, item: Pass, before: tuple[Signature, Signature]) -> None:
    model = state.model
    try:
        verify(model)
    except InvalidGraphError as error:
        raise PassFailedError(
            f"The pass {str(item)!r} left an unsound graph: {error.diagnostic.what}",
            where=error.diagnostic.where,
            why=error.diagnostic.why,
            fix="this is an error of the pass, not of your model; leave it out to go on",
        ) from error
    text = interface_difference("input", before[0], interface(model.graph.inputs))
    text = text or interface_difference("output", before[1], interface(model.graph.outputs))
    if text:
        raise PassFailedError(
            f"The pass {str(item)!r} changed the model's interface",
            why=text,
            fix="this is an error of the pass, not of your model; leave it out to go on",
        )


def _merge(first: LedgerRow | None, row: LedgerRow) -> LedgerRow:
    """One line for the rounds of a pass: the worst error, all notes, the time together."""
    if first is None:
        return row
    if not row.modified:
        return dataclasses.replace(first, seconds=first.seconds + row.seconds)
    error = max(
        (e for e in (first.error, row.error) if e is not None),
        key=lambda e: e.relative,
        default=None,
    )
    return LedgerRow(
        first.name,
        first.before if first.modified else row.before,
        row.after,
        first.seconds + row.seconds,
        True,
        first.runs + 1,
        error,
        row.error_note,
        tuple(dict.fromkeys((*first.notes, *row.notes))),
        (*first.rewrites, *row.rewrites),
    )


__all__ = ["MAX_ROUNDS", "Stage", "run_passes", "sort_by_stage"]
