"""Labels of tensor positions: what must be removed together carries labels that are united.

Here: `Track`, labels along some axes of one tensor; `Labels`, which unites and blocks them; and
what happens to tracks under the few motions that all operators are made of: `merge` (elementwise
with broadcasting), `contract` (sums over axes), `reshape`, `concat`. Not here: which operator does
what (`rules`), what the groups are in the end (`groups`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Dim = object
"""An int, or anything else where the size is not known."""


@dataclasses.dataclass(frozen=True, eq=False)
class Track:
    """Labels along `axes` of a tensor, outer to inner; `ids` has the sizes of those axes.

    A position of the tensor goes when its label goes. Along several axes (heads, and dimensions
    in each) what stays must be a rectangle: whole positions of outer axes go, or as many inner ones
    of each. An axis is in one track at most; axes in none keep their size.
    """

    axes: tuple[int, ...]
    ids: np.ndarray

    def moved(self, axis_of: Mapping[int, int]) -> Track:
        """The same labels on other axes."""
        return Track(tuple(axis_of[a] for a in self.axes), self.ids)


class Labels:
    """Allots labels, and remembers what was united and blocked."""

    def __init__(self) -> None:
        self.count = 0
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self.blocks: list[tuple[np.ndarray, str, str]] = []
        self.stems: list[tuple[np.ndarray, np.ndarray]] = []
        self.columns: list[tuple[np.ndarray, np.ndarray]] = []
        self.rows: list[np.ndarray] = []

    def new(self, *shape: int) -> np.ndarray:
        """Labels that nothing else has."""
        size = math.prod(shape)
        self.count += size
        return np.arange(self.count - size, self.count).reshape(shape)

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Each label of `a` with that of `b` at the same (broadcast) place."""
        a, b = np.broadcast_arrays(a, b)
        if a.size:
            self.pairs.append((a.reshape(-1), b.reshape(-1)))

    def unite_along(self, ids: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Unite labels that differ in `axes` only; the first of each, with these axes gone."""
        first = ids
        for axis in sorted(axes, reverse=True):
            first = first.take(0, axis)
        kept = np.expand_dims(first, tuple(sorted(axes)))
        self.unite(ids, np.broadcast_to(kept, ids.shape))
        return first

    def block(self, ids: np.ndarray, reason: str, wish: str = "") -> None:
        """These can't be removed. `wish` names the option that would allow it, if one would."""
        if ids.size:
            self.blocks.append((ids.reshape(-1), reason, wish))

    def block_tracks(self, tracks: Sequence[Track], reason: str, wish: str = "") -> None:
        """All labels of the tracks can't be removed."""
        for track in tracks:
            self.block(track.ids, reason, wish)

    def must_balance(self, rows: np.ndarray) -> None:
        """As many of each row ([rows, positions]) must stay."""
        if rows.shape[0] > 1:
            self.rows.append(rows)

    def stem(self, stems: np.ndarray, rows: np.ndarray) -> None:
        """`stems[i]` goes exactly when all of `rows[i]` go: a head, and its dimensions.

        Which of the two may be removed is decided in the end (`resolve`).
        """
        self.stems.append((stems.reshape(-1), rows.reshape(stems.size, -1)))

    def column(self, columns: np.ndarray, rows: np.ndarray) -> None:
        """`columns[j]` goes exactly when all of `rows[:, j]` go: a dimension, alike in all heads.

        Where heads are removed whole (`resolve`), columns stay.
        """
        self.columns.append((columns.reshape(-1), rows.reshape(-1, columns.size)))

    def hold(self, track: Track, axes: Sequence[int], reason: str) -> None:
        """Positions along outer `axes` of the tensor stay; what is inside of them may go."""
        kept = [i for i, a in enumerate(track.axes) if a in axes]
        rest = [i for i in range(track.ids.ndim) if i not in kept]
        stems = self.new(*(track.ids.shape[i] for i in kept))
        self.block(stems, reason)
        self.stem(stems, track.ids.transpose([*kept, *rest]))

    # --- motions -------------------------------------------------------------------------------

    def tie(self, track: Track, part: Track) -> None:
        """Unite a track with one along all or some of its axes."""
        kept = [a for a in track.axes if a in part.axes]
        order = [part.axes.index(a) for a in kept]
        ids = part.ids.transpose(order)
        missing = [i for i, a in enumerate(track.axes) if a not in part.axes]
        if track.axes[-1] in part.axes:
            if order != sorted(order):
                self.unite_along(track.ids, range(track.ids.ndim - 1))
            if ids.ndim == 1 and missing:
                self.column(ids, track.ids)
                return
            self.unite(track.ids, np.expand_dims(ids, tuple(missing)))
            return
        lead = [i for i in range(track.ids.ndim) if i not in missing]
        self.stem(ids, track.ids.transpose([*lead, *missing]))

    def contract(self, track: Track, axes: Sequence[int]) -> Track | None:
        """What a sum over `axes` of the tensor leaves of the track (axes not yet renumbered)."""
        gone = [i for i, a in enumerate(track.axes) if a in axes]
        if not gone:
            return track
        kept = [i for i in range(len(track.axes)) if i not in gone]
        if not kept:
            return None
        left = tuple(track.axes[i] for i in kept)
        if track.ids.ndim - 1 not in gone:
            return Track(left, self.unite_along(track.ids, gone))
        sizes = [track.ids.shape[i] for i in kept]
        rows = track.ids.transpose([*kept, *gone]).reshape(math.prod(sizes), -1)
        # the same row twice (a batch of heads in one axis) is one stem
        distinct, which = np.unique(rows, axis=0, return_inverse=True)
        stems = self.new(len(distinct))
        self.stem(stems, distinct)
        return Track(left, stems[which.reshape(-1)].reshape(sizes))

    def uniform(self, track: Track, axes: Sequence[int], reason: str) -> Track | None:
        """The track where `axes` of the tensor keep their size: labels along them are united."""
        gone = [i for i, a in enumerate(track.axes) if a in axes]
        if not gone:
            return track
        left = tuple(a for a in track.axes if a not in axes)
        if not left:
            self.block(track.ids, reason)
            return None
        return Track(left, self.unite_along(track.ids, gone))


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor as one of several that are broadcast against each other.

    `dims` are its sizes along the axes of the result (1 where it is repeated); `tracks` are on
    those axes too. `adopt` takes a track in place of `tracks`, where nothing used these yet.
    """

    what: str
    dims: tuple[Dim, ...]
    tracks: tuple[Track, ...]
    adopt: Callable[[Track], None] | None = None


def merge(labels: Labels, operands: Sequence[Operand], where: str) -> tuple[Track, ...]:
    """The tracks of an elementwise result: labels at one position are united."""
    found = []
    operands = _narrowed(labels, operands, where)
    for cluster in _clusters([t for o in operands for t in o.tracks]):
        reference = max(cluster, key=lambda t: len(t.axes))
        reason = _misfit(labels, operands, cluster, reference, where)
        if reason:
            labels.block_tracks(cluster, f"{where}: {reason}")
            continue
        for operand in operands:
            own = [t for t in operand.tracks if set(t.axes) <= set(reference.axes)]
            if len(own) > 1 and operand.adopt is not None:
                axes = [a for a in reference.axes if operand.dims[a] != 1]
                sizes = [reference.ids.shape[reference.axes.index(a)] for a in axes]
                own = [Track(tuple(axes), labels.new(*sizes))]
                operand.adopt(own[0])
            for track in own:
                if track is not reference:
                    labels.tie(reference, track)
        found.append(reference)
    return tuple(found)


def _narrowed(labels: Labels, operands: Sequence[Operand], where: str) -> Sequence[Operand]:
    """Tracks without inner axes that can't be united: what is inside of outer ones goes whole.

    Such are axes that differ inside a shared one (two kinds of dimensions inside heads), and those
    that an operand has without a track.
    """
    for cluster in _clusters([t for o in operands for t in o.tracks]):
        axes = {a for t in cluster for a in t.axes}
        kept = _united_axes(operands, cluster)
        if not kept or kept == axes:
            continue
        reason = f"{where}: channels are not followed along all of its axes"
        less = {t: labels.uniform(t, sorted(set(t.axes) - kept), reason) for t in cluster}
        operands = [
            dataclasses.replace(
                o, tracks=tuple(t for t in (less.get(t, t) for t in o.tracks) if t is not None)
            )
            for o in operands
        ]
    return operands


def _united_axes(operands: Sequence[Operand], cluster: Sequence[Track]) -> set[int]:
    """The axes along which the tracks of a cluster can be united."""
    widest = max(cluster, key=lambda t: len(t.axes))
    kept = list(widest.axes)
    if not all(set(t.axes) <= set(kept) for t in cluster):
        shared = set.intersection(*[set(t.axes) for t in cluster if len(t.axes) > 1])
        kept = [a for a in kept if a in shared]
    while kept and any(
        o.dims[kept[-1]] != 1 and all(kept[-1] not in t.axes for t in o.tracks) for o in operands
    ):
        kept.pop()
    return set(kept)


def _misfit(
    labels: Labels,
    operands: Sequence[Operand],
    cluster: Sequence[Track],
    reference: Track,
    where: str,
) -> str:
    """Why the tracks of one cluster can't be united, or nothing."""
    if any(not set(t.axes) <= set(reference.axes) for t in cluster):
        return "axes are combined in two ways"
    for operand in operands:
        own = {a for t in operand.tracks for a in t.axes}
        loose = [a for a in reference.axes if operand.dims[a] != 1 and a not in own]
        if not loose:
            continue
        reason = f"meets {operand.what}, which is not followed"
        if reference.axes[-1] in loose:
            return reason
        labels.hold(reference, loose, f"{where}: {reason}")
    return ""


def _clusters(tracks: Sequence[Track]) -> list[list[Track]]:
    """Tracks that share axes, transitively."""
    clusters: list[tuple[set[int], list[Track]]] = []
    for track in tracks:
        axes, members = set(track.axes), [track]
        apart = []
        for other_axes, others in clusters:
            if other_axes & axes:
                axes |= other_axes
                members = [*others, *members]
            else:
                apart.append((other_axes, others))
        clusters = [*apart, (axes, members)]
    return [members for _, members in clusters]


def reshape(
    labels: Labels,
    tracks: Sequence[Track],
    before: Sequence[Dim],
    after: Sequence[Dim],
    where: str,
) -> tuple[Track, ...]:
    """The tracks after a reshape from `before` to `after`."""
    pieces = factor(before, after)
    if pieces is None:
        labels.block_tracks(tracks, f"{where}: the sizes do not say where axes go")
        return ()
    found: list[Track] = []
    for whole in tracks:
        others = [t for t in tracks if t is not whole]
        cut = _cut_or_joined(labels, whole, pieces, before, after)
        if cut is not None:
            found.append(cut)
            continue
        reason = f"{where}: the sizes do not say where axes go"
        track = _away_from_unknown(labels, whole, pieces, before, after, reason)
        if track is None:
            continue
        touched = [p for p in pieces if set(p[0]) & set(track.axes)]
        inputs = [a for p in touched for a in p[0]]
        if len(inputs) > 1 and any(set(inputs) & set(t.axes) for t in others):
            labels.block(track.ids, f"{where}: two kinds of channels become one axis")
            continue
        moved = _reshaped(labels, track, touched, before, after)
        if moved is not None:
            found.append(moved)
    return tuple(found)


def _cut_or_joined(
    labels: Labels,
    track: Track,
    pieces: Sequence[Piece],
    before: Sequence[Dim],
    after: Sequence[Dim],
) -> Track | None:
    """Channels that become groups before axes of unknown size, or groups that become channels.

    [batch, 64, h, w] -> [batch, 8, n] has 8 runs of 8 channels, whatever h and w are.
    """
    for ins, outs in pieces:
        if track.axes != ins[:1] or not outs:
            continue
        old, new = before[ins[0]], after[outs[0]]
        if all(isinstance(d, int) for d in [*(before[a] for a in ins), *(after[a] for a in outs)]):
            continue
        if not isinstance(old, int) or not isinstance(new, int) or min(old, new) < 2:
            continue
        if old % new == 0:
            rows = track.ids.reshape(new, -1)
            labels.unite(rows, rows[:, :1])
            return Track(outs[:1], rows[:, 0])
        if new % old == 0:
            return Track(outs[:1], np.repeat(track.ids, new // old))
    return None


def _away_from_unknown(
    labels: Labels,
    track: Track,
    pieces: Sequence[Piece],
    before: Sequence[Dim],
    after: Sequence[Dim],
    reason: str,
) -> Track | None:
    """The track without axes that become one with an axis of unknown size."""
    vague = []
    for ins, outs in pieces:
        sizes = [before[a] for a in ins] + [after[a] for a in outs]
        if (len(ins), len(outs)) != (1, 1) and not all(isinstance(d, int) for d in sizes):
            vague += [a for a in ins if a in track.axes]
    return labels.uniform(track, vague, reason) if vague else track


Piece = tuple[tuple[int, ...], tuple[int, ...]]
"""Axes before, and those after, that hold the same elements."""


def factor(before: Sequence[Dim], after: Sequence[Dim]) -> list[Piece] | None:
    """The smallest runs of axes with equal products; axes of size 1 go with what they touch."""
    matched = _up_to_ones(before, after)
    if matched is not None:
        return matched
    pieces: list[Piece] = []
    i = j = 0
    while i < len(before) or j < len(after):
        if i < len(before) and j < len(after) and _same(before[i], after[j]):
            pieces.append(((i,), (j,)))
            i, j = i + 1, j + 1
            continue
        ins, outs = [], []
        a = b = 1
        if i < len(before):
            ins.append(i)
        if j < len(after):
            outs.append(j)
        sizes = _run_sizes(before, after, ins, outs)
        while sizes is None or sizes[0] != sizes[1] or not ins or not outs:
            if sizes is None:
                return _from_the_end(before, after, i, j, pieces)
            a, b = sizes
            if (a <= b and ins and ins[-1] + 1 < len(before)) or (not ins and i < len(before)):
                ins.append(ins[-1] + 1 if ins else i)
            elif (outs and outs[-1] + 1 < len(after)) or (not outs and j < len(after)):
                outs.append(outs[-1] + 1 if outs else j)
            elif a == b:
                break
            else:
                return None
            sizes = _run_sizes(before, after, ins, outs)
        pieces.append((tuple(ins), tuple(outs)))
        i, j = i + len(ins), j + len(outs)
    return pieces


def _up_to_ones(before: Sequence[Dim], after: Sequence[Dim]) -> list[Piece] | None:
    """Equal axes in pairs, where what is left over can only be of size 1.

    [batch, 128, t] -> [1, batch, 128]: as many elements before as after, so t is 1.
    """
    ins = [i for i, d in enumerate(before) if d != 1]
    outs = [j for j, d in enumerate(after) if d != 1]
    long, short = (before, after) if len(ins) >= len(outs) else (after, before)
    waiting = ins if long is before else outs
    pairs, spare = [], []
    for b in outs if long is before else ins:
        while waiting and not _same(long[waiting[0]], short[b]):
            spare.append(waiting.pop(0))
        if not waiting:
            return None
        pairs.append((waiting.pop(0), b))
    spare += waiting
    if not spare or any(isinstance(long[a], int) for a in spare):
        return None
    same = [(a, b) if long is before else (b, a) for a, b in pairs]
    pieces: list[Piece] = []
    i = j = 0
    for a, b in [*same, (len(before), len(after))]:
        pieces += [((k,), ()) for k in range(i, a)]
        pieces += [((), (k,)) for k in range(j, b)]
        if a < len(before):
            pieces.append(((a,), (b,)))
        i, j = a + 1, b + 1
    return pieces


def _run_sizes(
    before: Sequence[Dim], after: Sequence[Dim], ins: Sequence[int], outs: Sequence[int]
) -> tuple[int, int] | None:
    dims = [before[k] for k in ins] + [after[k] for k in outs]
    if not all(isinstance(d, int) for d in dims):
        return None
    a = math.prod(int(before[k]) for k in ins)  # type: ignore[call-overload]
    b = math.prod(int(after[k]) for k in outs)  # type: ignore[call-overload]
    return a, b


def _from_the_end(
    before: Sequence[Dim], after: Sequence[Dim], i: int, j: int, pieces: list[Piece]
) -> list[Piece] | None:
    """The rest read backwards, with one run of unknown size left between (batch and time, say)."""
    tail: list[Piece] = []
    m, n = len(before), len(after)
    while m > i and n > j:
        known = isinstance(before[m - 1], int) and isinstance(after[n - 1], int)
        if not known and not _same(before[m - 1], after[n - 1]):
            break
        if _same(before[m - 1], after[n - 1]):
            tail.append(((m - 1,), (n - 1,)))
            m, n = m - 1, n - 1
            continue
        a, b, p, q = int(before[m - 1]), int(after[n - 1]), m - 1, n - 1  # type: ignore[call-overload]
        while a != b:
            if a < b and p > i and isinstance(before[p - 1], int):
                p -= 1
                a *= int(before[p])  # type: ignore[call-overload]
            elif b < a and q > j and isinstance(after[q - 1], int):
                q -= 1
                b *= int(after[q])  # type: ignore[call-overload]
            else:
                break
        if a != b:
            break
        tail.append((tuple(range(p, m)), tuple(range(q, n))))
        m, n = p, q
    middle: list[Piece] = [(tuple(range(i, m)), tuple(range(j, n)))] if m > i or n > j else []
    return [*pieces, *middle, *reversed(tail)]


def _same(a: Dim, b: Dim) -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    text = str(a)
    return text == str(b) and text not in ("None", "?")


def _reshaped(
    labels: Labels,
    track: Track,
    touched: Sequence[Piece],
    before: Sequence[Dim],
    after: Sequence[Dim],
) -> Track | None:
    inputs = [a for ins, _ in touched for a in ins]
    outputs = [a for _, outs in touched for a in outs]
    simple = all(len(i) == 1 == len(o) for i, o in touched)
    if simple:
        return track.moved({i[0]: o[0] for i, o in touched})
    sizes = [int(before[a]) for a in inputs]  # type: ignore[call-overload]
    ids = track.ids
    order = sorted(range(len(track.axes)), key=lambda k: track.axes[k])
    joins = any(len([a for a in ins if a in track.axes]) > 1 for ins, _ in touched)
    if joins and order != list(range(len(track.axes))):
        # flattened in another order than that in which positions inside rows are counted
        labels.unite_along(ids, range(ids.ndim - 1))
    ids = ids.transpose(order)
    missing = [k for k, a in enumerate(inputs) if a not in track.axes]
    full = np.broadcast_to(np.expand_dims(ids, tuple(missing)), sizes)
    new = full.reshape([int(after[a]) for a in outputs])  # type: ignore[call-overload]
    axes = list(outputs)
    for k in reversed(range(len(axes))):
        if new.shape[k] == 1 or bool((new == new.take([0], k)).all()):
            new = new.take(0, k)
            del axes[k]
    if not axes:  # one label only
        labels.block(track.ids, "the only channel")
        return None
    return Track(tuple(axes), new)
