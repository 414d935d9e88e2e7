"""How an operator goes over memory, read off shapes: innermost loops, pieces, permutations.

Here: what tells apart kernels that handle equally many elements. Not here: what is made of it
(`features`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .operand import Operand, log_size


def inner_and_run(
    family: str,
    present: Sequence[Operand],
    first: Operand,
    result: Operand,
    attributes: Mapping[str, Any],
) -> tuple[int, int]:
    """The extent that loops run over innermost, and the elements handled in one piece."""
    inner = result.shape[-1] if result.shape else 1
    axis = attributes.get("axis")
    if family == "elementwise/broadcast":
        return inner, _broadcast_run(present, result)
    if family == "movement/transpose":
        return inner, _copied_run(first, result, attributes)
    if family == "movement/copy":
        return inner, _piece(first, result)
    if family == "reduction":  # what is kept behind the last reduced axis, and what is reduced
        behind = _kept_behind(first.shape, result.shape)
        return behind, max(1, first.elements // max(1, result.elements)) if behind == 1 else 1
    if family == "softmax" and isinstance(axis, int) and first.shape:
        return first.shape[axis], math.prod(first.shape[axis % len(first.shape) + 1 :])
    if family == "gather" and isinstance(axis, int) and first.shape:
        return inner, math.prod(first.shape[axis % len(first.shape) + 1 :])
    if family == "quantization":  # how many scales, and the elements in a row that share one
        scales = present[1].elements if len(present) > 1 else 1
        if scales <= 1:
            return 1, first.elements
        behind = axis if isinstance(axis, int) else 1
        return scales, math.prod(first.shape[behind % max(1, len(first.shape)) + 1 :])
    return inner, inner


def _kept_behind(before: Sequence[int], after: Sequence[int]) -> int:
    """The product of the trailing extents that a reduction keeps; 1 where it takes the last."""
    wide = [extent for extent in before if extent != 1]
    kept = [extent for extent in after if extent != 1]
    if kept == wide[: len(kept)]:
        return 1
    behind = 1
    while wide and kept and wide[-1] == kept[-1]:
        behind *= wide.pop()
        kept.pop()
    return behind


def _piece(first: Operand, result: Operand) -> int:
    """Elements that a concatenation, a split, a slice or a padding copies in one piece."""
    if len(first.shape) != len(result.shape):
        return result.elements
    differing = [
        i for i, (a, b) in enumerate(zip(first.shape, result.shape, strict=True)) if a != b
    ]
    if not differing:
        return result.elements
    smaller = min(first, result, key=lambda o: o.elements)
    return math.prod(smaller.shape[differing[-1] :])


def transposed(first: Operand, attributes: Mapping[str, Any]) -> dict[str, float]:
    """A permutation without axes of one and with those that stay together as one.

    `rank`: of what is left; `single`: 1 where moving one axis does it; `before` and `after`: the
    innermost extents that change places.
    """
    order = [a for a in attributes.get("perm", ()) if a < len(first.shape) and first.shape[a] != 1]
    blocks: list[list[int]] = []
    for axis in order:
        between = range(blocks[-1][-1] + 1, axis) if blocks else ()
        if blocks and axis > blocks[-1][-1] and all(first.shape[i] == 1 for i in between):
            blocks[-1].append(axis)
        else:
            blocks.append([axis])
    sizes = [math.prod(first.shape[axis] for axis in block) for block in blocks]
    places = sorted(range(len(blocks)), key=lambda i: blocks[i][0])  # in the order of the input
    order = [places.index(i) for i in range(len(blocks))]
    rank = len(order)
    single = any(
        [x for x in order if x != moved] == [x for x in range(rank) if x != moved]
        for moved in range(rank)
    )
    inner = rank - 1
    while inner > 0 and order[inner] == inner:
        inner -= 1
    return {
        "rank": float(min(6, rank)),
        "single": 1.0 if single else 0.0,
        "before": log_size(sizes[places[inner]]) if rank else 0.0,
        "after": log_size(sizes[inner]) if rank else 0.0,
    }


def _broadcast_run(present: Sequence[Operand], result: Operand) -> int:
    """Elements of the result in a row for which the smaller operand stays one or moves along."""
    smaller = min(present, key=lambda o: o.elements)
    shape = (1,) * (len(result.shape) - len(smaller.shape)) + smaller.shape
    run = 1
    for extent, own in zip(reversed(result.shape), reversed(shape), strict=False):
        if own != 1 and run > 1 and extent == own and smaller.elements > own:
            run *= extent
            continue
        if own == 1 or run == 1:
            run *= extent
            if own != 1:
                break
            continue
        break
    return run


def _copied_run(first: Operand, result: Operand, attributes: Mapping[str, Any]) -> int:
    """Elements that a transposition moves in one piece: the extents that stay last."""
    permutation = attributes.get("perm")
    run = 1
    if permutation is None:
        for before, after in zip(reversed(first.shape), reversed(result.shape), strict=False):
            if before != after:
                break
            run *= after
        return run
    for axis in range(len(result.shape) - 1, -1, -1):
        if permutation[axis] != axis:
            break
        run *= result.shape[axis]
    return run
