"""Ledger lines for what a quantization plan left alone.

Here: `refusal_notes`. Not here: the reasons themselves (`plan` and the passes).
"""

from __future__ import annotations

from ...ir.quant import QuantPlan


def refusal_notes(plan: QuantPlan) -> tuple[str, ...]:
    """One line a reason: how many nodes, and the first of them."""
    by_reason: dict[str, list[str]] = {}
    for node, reason in plan.notes:
        by_reason.setdefault(reason, []).append(node)
    return tuple(
        f"{len(nodes)} node{'s' if len(nodes) > 1 else ''} kept: {reason} (first: {nodes[0]})"
        for reason, nodes in by_reason.items()
    )
