"""What a runtime's attention operator works through, read off the shapes of its operands.

Here: `Heads` and `attention_heads`. Not here: its features (`features`), which graphs become such
operators (`passes.fuse`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .operand import Operand


@dataclasses.dataclass(frozen=True)
class Heads:
    """`count` of heads, batch included, each with `queries` x `keys` scores of vectors of `width`.

    `projection_macs`: of the operator's own projections. `biased`: scores get a bias or a mask.
    """

    count: int
    queries: int
    keys: int
    width: int
    projection_macs: float = 0.0
    biased: bool = False

    @property
    def rows(self) -> float:
        """Rows of scores, each with a softmax of its own."""
        return float(self.count * self.queries)

    @property
    def scores(self) -> float:
        """Elements of all scores."""
        return self.rows * self.keys

    @property
    def score_macs(self) -> float:
        """MACs of the two products, with keys and with values."""
        return 2.0 * self.scores * self.width


_BIASES: Mapping[str, tuple[int, ...]] = {
    "Attention": (3, 5),
    "MultiHeadAttention": (4, 5),
    "GroupQueryAttention": (),
}


def attention_heads(
    op_type: str,
    domain: str,
    inputs: Sequence[Operand | None],
    outputs: Sequence[Operand],
    attributes: Mapping[str, Any],
) -> Heads | None:
    """The heads of an attention operator; None for one, or a layout, that is not known.

    Layouts are those of ONNX Runtime's contrib operators and of ONNX Attention (opset 23).
    """
    first = inputs[0] if inputs else None
    if first is None or len(first.shape) < 3:
        return None
    if op_type in ("Attention", "QAttention") and domain:
        return _packed(first, inputs, attributes)
    if op_type in ("MultiHeadAttention", "GroupQueryAttention") or not domain:
        return _separate(op_type, first, inputs, outputs, attributes)
    return None


def _packed(
    first: Operand, inputs: Sequence[Operand | None], attributes: Mapping[str, Any]
) -> Heads | None:
    weight = inputs[1] if len(inputs) > 1 else None
    count = int(attributes.get("num_heads", 0))
    if weight is None or len(weight.shape) != 2 or count < 1:
        return None
    batch, length, hidden = first.shape
    past = inputs[4] if len(inputs) > 4 else None
    keys = length + (past.shape[-2] if past is not None and len(past.shape) == 5 else 0)
    width = max(1, weight.shape[1] // 3 // count)
    projection = float(batch * length * hidden * weight.shape[1])
    biased = any(i < len(inputs) and inputs[i] is not None for i in _BIASES["Attention"])
    return Heads(batch * count, length, keys, width, projection, biased)


def _separate(
    op_type: str,
    query: Operand,
    inputs: Sequence[Operand | None],
    outputs: Sequence[Operand],
    attributes: Mapping[str, Any],
) -> Heads | None:
    if len(query.shape) == 4:  # batch, heads, length, width
        batch, count, length, width = query.shape
    elif len(query.shape) == 3:
        count = int(attributes.get("num_heads") or attributes.get("q_num_heads") or 0)
        if count < 1:
            return None
        batch, length, hidden = query.shape
        others = int(attributes.get("kv_num_heads", 0)) if len(inputs) < 2 or not inputs[1] else 0
        width = max(1, hidden // (count + 2 * others))
    else:  # batch, length, heads, 3, width
        return _interleaved(query)
    keys = length
    key = inputs[1] if len(inputs) > 1 else None
    if key is not None and len(key.shape) in (3, 4):
        keys = key.shape[-2]
    present = outputs[1] if len(outputs) > 1 else None
    if present is not None and len(present.shape) == 4:
        keys = max(keys, present.shape[-2])
    indices = _BIASES.get(op_type, (3,))
    biased = any(i < len(inputs) and inputs[i] is not None for i in indices)
    return Heads(batch * count, length, keys, width, biased=biased)


def _interleaved(query: Operand) -> Heads | None:
    if len(query.shape) != 5:
        return None
    batch, length, count, _, width = query.shape
    return Heads(batch * count, length, length, width)
