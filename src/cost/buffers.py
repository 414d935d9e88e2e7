"""Buffers with lifetimes, and how much memory a runtime takes for a set of them.

Here: `Buffer`, the bytes alive at each tick, and ONNX Runtime's way of planning. Not here: which
buffers a graph needs (`memory`).
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Hashable, Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class ActivationMemory:
    """What activations take, in bytes.

    `peak_bytes`: what the runtime holds, by its own plan. `live_bytes`: the most that is needed at
    once, which no plan can do with less than. Both are None when a size is not known, and `reason`
    then names the value. `alive`: what is needed while each node of the main graph runs, in
    graph order (what is known of it); `peak_node` is the position of the most (-1: no nodes).
    """

    peak_bytes: int | None
    live_bytes: int | None
    alive: tuple[int, ...]
    peak_node: int = -1
    reason: str = ""


@dataclasses.dataclass(slots=True, eq=False)
class Buffer:
    """Memory from tick `start` to tick `until`, both included.

    Buffers of one `shape` (any hashable) can be reused for one another. Those that are not `own`
    belong to the caller or are handed out as results: the runtime does not plan them.
    """

    size: int
    shape: Hashable
    start: int
    until: int
    own: bool = True


def alive_bytes(buffers: Iterable[Buffer], ticks: int) -> list[int]:
    """Bytes alive at each tick."""
    change = [0] * (ticks + 1)
    for buffer in buffers:
        change[min(buffer.start, ticks)] += buffer.size
        change[min(buffer.until + 1, ticks)] -= buffer.size
    alive, now = [], 0
    for step in change[:ticks]:
        now += step
        alive.append(now)
    return alive


def planned_bytes(buffers: Sequence[Buffer]) -> int:
    """The block that ONNX Runtime holds for buffers, given in order of their starts.

    Its planner works in two steps, found by holding its blocks against ours. First, a buffer takes
    over an earlier one of the same shape that is no longer needed, latest first; the two are one
    from then on, and its memory is tied up in between too. Deep networks whose layers differ in
    their shapes pay for that. Then each is put, in order, into the gap of least waste between what
    is there at its start, or behind all of it.
    """
    return _packed(_reused(buffers))


def _reused(buffers: Sequence[Buffer]) -> list[Buffer]:
    merged: list[Buffer] = []
    free: dict[Hashable, list[Buffer]] = {}
    ending: dict[int, list[tuple[Hashable, Buffer]]] = {}
    pending: list[int] = []
    for buffer in buffers:
        if not buffer.own or not buffer.size:
            continue
        while pending and pending[0] < buffer.start:
            for key, ended in ending.pop(heapq.heappop(pending)):
                free.setdefault(key, []).append(ended)
        key = (buffer.shape, buffer.size)
        stack = free.get(key)
        if stack:
            host = stack.pop()
            host.until = max(host.until, buffer.until)
        else:
            host = dataclasses.replace(buffer)
            merged.append(host)
        if buffer.until not in ending:
            ending[buffer.until] = []
            heapq.heappush(pending, buffer.until)
        ending[buffer.until].append((key, host))
    return merged


def _packed(buffers: Sequence[Buffer]) -> int:
    placed: list[tuple[int, int, int]] = []  # offset, end, until; by offset
    height = 0
    for buffer in buffers:
        placed = [block for block in placed if block[2] >= buffer.start]
        offset = _best_gap(placed, buffer.size)
        placed.append((offset, offset + buffer.size, buffer.until))
        placed.sort()
        height = max(height, offset + buffer.size)
    return height


def _best_gap(placed: Sequence[tuple[int, int, int]], size: int) -> int:
    top, best, waste = 0, None, 0
    for offset, end, _ in placed:
        gap = offset - top
        if gap >= size and (best is None or gap - size < waste):
            best, waste = top, gap - size
        top = max(top, end)
    return top if best is None else best
