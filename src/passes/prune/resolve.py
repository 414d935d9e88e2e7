"""From labels to groups: which labels are one, which may go, and which are alike.

Not here: how labels are united (`labels`, `rules`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from .labels import Labels


def components(count: int, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The least label that each label is connected with.

    Labels hand their least neighbour on, and pointers are halved after every round.
    """
    root = np.arange(count)
    if not pairs:
        return root
    a = np.concatenate([p[0] for p in pairs])
    b = np.concatenate([p[1] for p in pairs])
    apart = a != b
    a, b = a[apart], b[apart]
    while a.size:
        x, y = root[a], root[b]
        least = np.minimum(x, y)
        np.minimum.at(root, x, least)
        np.minimum.at(root, y, least)
        while True:
            halved = root[root]
            if (halved == root).all():
                break
            root = halved
        apart = root[a] != root[b]
        a, b = a[apart], b[apart]
    return root


@dataclasses.dataclass(frozen=True)
class Resolved:
    """By label: its root. By root: why it is blocked (index into `reasons`, 0 is not), its row
    (-1: none), and the cluster of rows that stay equally long (-1: none).
    """

    root: np.ndarray
    blocked: np.ndarray
    reasons: list[tuple[str, str]]
    row: np.ndarray
    cluster: np.ndarray


def resolve(
    labels: Labels, extra_rows: Sequence[np.ndarray], heads: str, held: np.ndarray
) -> Resolved:
    """What all that was united, blocked and balanced comes to.

    `heads`: "whole" removes stems, "dimensions" what is in their rows, "auto" decides for each set
    of united stems: rows where nothing blocks any of them, else stems if these are free. Stems also
    where these have many weights of their own (queries and keys that are normalized in each head):
    `held` is how many a label has.
    """
    rows = [*labels.rows, *extra_rows]
    first = _resolve(labels, rows, [False] * len(labels.stems), [False] * len(labels.columns))
    if heads == "dimensions" or not labels.stems:
        return first
    if heads == "whole":
        whole = [True] * len(labels.stems)
        return _resolve(labels, rows, whole, _fixed(labels, first, whole))
    stuck = _heavy(labels, first, held)
    for stems, members in labels.stems:
        stuck[first.root[stems]] |= bool((first.blocked[first.root[members]] > 0).all())
    whole = [bool(stuck[first.root[stems]].any()) for stems, _ in labels.stems]
    if not any(whole):
        return first
    found = _resolve(labels, rows, whole, _fixed(labels, first, whole))
    futile = np.zeros(labels.count, bool)
    for (stems, _), united in zip(labels.stems, whole, strict=True):
        futile[first.root[stems]] |= united and bool((found.blocked[found.root[stems]] > 0).all())
    better = [
        united and not bool(futile[first.root[stems]].any())
        for (stems, _), united in zip(labels.stems, whole, strict=True)
    ]
    if better == whole:
        return found
    return _resolve(labels, rows, better, _fixed(labels, first, better))


def _heavy(labels: Labels, first: Resolved, held: np.ndarray) -> np.ndarray:
    """Stems (roots) with more than half as many weights as what is in their rows."""
    weight = np.bincount(first.root, held, labels.count)
    pairs = []
    for stems, members in labels.stems:
        rows = first.root[members].reshape(-1)
        both = np.stack([first.root[stems].repeat(members.shape[1]), rows])
        pairs.append(np.unique(both, axis=1))
    stems, rows = np.unique(np.concatenate(pairs, axis=1), axis=1)
    apart = stems != rows
    inside = np.bincount(stems[apart], weight[rows[apart]], labels.count)
    heavy: np.ndarray = (inside > 0) & (weight > inside / 2)
    return heavy


def _fixed(labels: Labels, first: Resolved, whole: Sequence[bool]) -> list[bool]:
    """Which columns stay, since rows that they run through are removed whole."""
    touched = np.zeros(labels.count, bool)
    for (_, members), united in zip(labels.stems, whole, strict=True):
        if united:
            touched[first.root[members]] = True
    return [bool(touched[first.root[ids]].any()) for _, ids in labels.columns]


def _resolve(
    labels: Labels, rows: Sequence[np.ndarray], whole: Sequence[bool], fixed: Sequence[bool]
) -> Resolved:
    pairs = list(labels.pairs)
    blocks = list(labels.blocks)
    for (columns, ids), stay in zip(labels.columns, fixed, strict=True):
        if stay:
            pairs.append((ids.reshape(-1), ids[:, :1].repeat(ids.shape[1], 1).reshape(-1)))
            reason = "heads are removed whole: dimensions inside them stay"
            blocks.append((columns, reason, "heads"))
        else:
            pairs.append((ids.reshape(-1), np.broadcast_to(columns, ids.shape).reshape(-1)))
    for (stems, members), united in zip(labels.stems, whole, strict=True):
        if united:
            pairs.append((stems.repeat(members.shape[1]), members.reshape(-1)))
    root = components(labels.count, pairs)
    single = []
    for (stems, members), united in zip(labels.stems, whole, strict=True):
        if united:
            continue
        blocks.append((stems, "heads stay whole: dimensions inside them are removed", "heads"))
        one = (root[members] == root[members[:, :1]]).all(axis=1)
        if one.any():
            single.append((stems[one], members[one, 0]))
    if single:
        root = components(labels.count, [*pairs, *single])
    reasons: list[tuple[str, str]] = [("", "")]
    blocked = np.zeros(labels.count, np.int32)
    for ids, reason, wish in blocks:
        reasons.append((reason, wish))
        roots = root[ids]
        # what no option allows is said first
        mild = np.array([bool(w) for _, w in reasons])
        free = (blocked[roots] == 0) | (mild[blocked[roots]] & (not wish))
        blocked[roots[free]] = len(reasons) - 1
    row, cluster = _cells(labels.count, _constraints(root, rows), blocked, reasons)
    return Resolved(root, blocked, reasons, row, cluster)


def _constraints(root: np.ndarray, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Distinct matrices of roots [rows, positions] whose rows must stay equally long."""
    found: dict[bytes, np.ndarray] = {}
    for ids in rows:
        roots = _stripped(root[ids])
        if roots.ndim < 2:
            continue
        matrix = roots.reshape(-1, roots.shape[-1])
        matrix = np.unique(np.sort(matrix, axis=1), axis=0)
        if len(matrix) > 1:
            found.setdefault(matrix.tobytes() + str(matrix.shape).encode(), matrix)
    return list(found.values())


def _stripped(roots: np.ndarray) -> np.ndarray:
    """Without axes along which all is one."""
    for axis in reversed(range(roots.ndim)):
        if bool((roots == roots.take([0], axis)).all()):
            roots = roots.take(0, axis)
    return roots


def _cells(
    count: int,
    constraints: Sequence[np.ndarray],
    blocked: np.ndarray,
    reasons: list[tuple[str, str]],
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all constraints cut into cells, and clusters of cells that stay equally long."""
    row = np.full(count, -1, np.int64)
    cluster = np.full(count, -1, np.int64)
    if not constraints:
        return row, cluster
    key = np.zeros(count, np.uint64)
    memberships = []
    for number, matrix in enumerate(constraints):
        places = np.repeat(np.arange(len(matrix)), matrix.shape[1])
        pair, times = np.unique(np.stack([matrix.reshape(-1), places]), axis=1, return_counts=True)
        # positions of one cell are as many times in a row (rotary pairs twice, say)
        cells = mixed(times.astype(np.uint64) + np.uint64((number + 1) << 32))
        np.add.at(key, pair[0], mixed(pair[1].astype(np.uint64) + cells))
        memberships.append((pair[0], pair[1], cells))
    bound = np.flatnonzero(key)
    row[bound] = np.unique(key[bound], return_inverse=True)[1].reshape(-1)
    sizes = np.bincount(row[bound])
    kind = _kinds(row, sizes, memberships)
    cluster[bound] = kind[row[bound]]
    for number in np.unique(cluster[bound]):
        members = bound[cluster[bound] == number]
        lengths = sizes[row[members]]
        stuck = blocked[members]
        if lengths.min() != lengths.max():
            _block(blocked, reasons, members, "rows of different lengths depend on one another")
        elif stuck.any():
            reason, wish = reasons[stuck[stuck > 0][0]]
            _block(blocked, reasons, members[stuck == 0], reason, wish)
    return row, cluster


def _kinds(
    row: np.ndarray,
    sizes: np.ndarray,
    memberships: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> np.ndarray:
    """Cells of one kind stay equally long: then so do all rows.

    Cells are of one kind when as many of them, equally long, are as often in the same constraints;
    where rows of a constraint are made of different kinds, these are one.
    """
    key = sizes.astype(np.uint64)
    cells_of = []
    for roots, places, times in memberships:
        pairs, first = np.unique(np.stack([row[roots], places]), axis=1, return_index=True)
        cells_of.append(pairs)
        np.add.at(key, pairs[0], mixed(times[first]))
    kind: np.ndarray = np.unique(key, return_inverse=True)[1].reshape(-1)
    links = []
    for cells, places in cells_of:
        made_of = np.zeros((int(places.max()) + 1, int(kind.max()) + 1), np.int32)
        np.add.at(made_of, (places, kind[cells]), 1)
        if (made_of != made_of[:1]).any():
            kinds = np.unique(kind[cells])
            links.append((kinds, np.full(kinds.size, kinds[0])))
    found: np.ndarray = components(int(kind.max()) + 1, links)[kind]
    return found


def _block(
    blocked: np.ndarray,
    reasons: list[tuple[str, str]],
    roots: np.ndarray,
    reason: str,
    wish: str = "",
) -> None:
    reasons.append((reason, wish))
    blocked[roots[blocked[roots] == 0]] = len(reasons) - 1


def mixed(values: np.ndarray) -> np.ndarray:
    """Integers spread over 64 bits (Steele et al. 2014, the finalizer of SplitMix64)."""
    with np.errstate(over="ignore"):
        x = values + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = x ^ (x >> np.uint64(31))
        return mixed
