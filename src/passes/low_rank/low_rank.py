"""Low-rank factorization: a layer written as two or three smaller ones, where that pays.

Here: the pass `low_rank`, its options and its notes. Not here: how (`low_rank_work` and what it
calls).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from ...errors import PassOptionError
from ..base import Context, Pass, PassResult, Stage
from .choice import Choice, Menu, Option, by_energy, by_share, fastest, removed
from .forms import Form
from .work import Wish, Work

MEASURES = ("macs", "time", "weights")
_RETREAT = (1.0, 0.75, 0.5, 0.25)
"""Shares of what was asked for that are tried where results are too far off."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """What was chosen for each layer: see `low_rank_choice`. `label`: how time was told."""

    menus: tuple[Menu, ...]
    choice: Choice
    refused: tuple[tuple[str, str], ...]
    label: str

    @property
    def time(self) -> tuple[float, float]:
        """Predicted for the layers that can be factorized, as they are and as chosen."""
        before = sum(menu.price.time for menu in self.menus)
        saved = sum(m.price.time - o.price.time for m, o in self._taken)
        return before, before - saved

    @property
    def macs(self) -> tuple[int, int]:
        """MACs of the layers that can be factorized, as they are and as chosen."""
        before = sum(menu.price.macs for menu in self.menus)
        return before, before - sum(m.price.macs - o.price.macs for m, o in self._taken)

    @property
    def weights(self) -> tuple[int, int]:
        """Weights of the layers that can be factorized, as they are and as chosen."""
        before = sum(menu.site.weights for menu in self.menus)
        return before, before - sum(m.site.weights - o.candidate.weights for m, o in self._taken)

    @property
    def _taken(self) -> list[tuple[Menu, Option]]:
        return [(m, o) for m, o in zip(self.menus, self.choice, strict=True) if o is not None]


@dataclasses.dataclass(frozen=True)
class LowRank(Pass):
    """Writes Conv, Gemm and MatMul as two or three smaller layers where the target is then faster.

    A matrix becomes a product of two; a k x k convolution the best of k x k and 1 x 1, k x 1 and
    1 x k, and 1 x 1, k x k and 1 x 1. With calibration samples errors are those of the layer's
    outputs, and biases are corrected; without, errors are those of the weight. Ranks are multiples
    of what the target's vectors hold.

    `ratio`: the share to remove of what all layers that can be factorized have together, from 0 to
    below 1, from those that suffer least. `measure`: of what: "macs", "time" as predicted for the
    target, or "weights". `energy`: in place of `ratio`, the share of its outputs' energy that each
    layer keeps, at the least rank. `rank`: in place of both, one rank for all. `margin`: by how
    much a layer must become faster, as predicted; below 0, how much slower it may get. `data`: use
    the samples if there are any. `weigh`: hold errors against what they do to the model's outputs
    (runs each layer once on a few samples). `refit`: solve last factors again, one layer after the
    other: slow, and of most use to "spatial" and "tucker". `limit`: the share of the outputs'
    variance that may be lost on samples held out: as much less is factorized. `forms`: "product",
    "pointwise", "spatial", "tucker"; all if empty. `exclude`: nodes, weights or operators.
    """

    name = "low_rank"
    stage = Stage.PRUNE
    lossless = False

    ratio: float = 0.3
    measure: str = "macs"
    energy: float = 0.0
    rank: int = 0
    margin: float = 0.05
    data: bool = True
    weigh: bool = True
    refit: bool = False
    limit: float = 0.5
    forms: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise _bad("ratio", f"a share of {self.ratio} can't be removed", "0 <= ratio < 1")
        if not 0.0 <= self.energy <= 1.0:
            raise _bad("energy", f"no layer keeps a share of {self.energy}", "0 <= energy <= 1")
        if self.rank < 0 or (self.rank and self.energy):
            raise _bad("rank", "it is below 0, or energy is given too", "rank or energy, above 0")
        if not self.margin < 1.0:
            raise _bad("margin", f"no layer gets {self.margin} faster", "a share below 1")
        if self.measure not in MEASURES:
            raise _bad("measure", f"{self.measure!r} is not counted", f"one of {list(MEASURES)}")
        if self.limit <= 0:
            raise _bad("limit", "no model is that close to another", "a limit over 0")
        known = [str(form) for form in Form]
        if set(self.forms) - set(known):
            raise _bad("forms", f"no forms {sorted(set(self.forms) - set(known))}", f"of {known}")

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """See `Pass.run`. The model is not changed: the result is a copy."""
        work = self._work(model, context)
        menus = self._menus(work)
        lost: float | None = None
        for part in _RETREAT:
            choice = self._choose(menus, part)
            selection = self._selection(work, menus, choice)
            if not any(choice):
                return PassResult(model, False, self._notes(selection, None, part))
            changed = work.apply(menus, choice, again=self.refit)
            lost = work.lost(changed)
            if lost is None or lost <= self.limit:
                return PassResult(changed, True, self._notes(selection, lost, part))
        text = (
            f"nothing factorized: a quarter of it already loses {lost:.0%} of the outputs' "
            f"variance on samples held out, over the limit of {self.limit:.0%}"
        )
        return PassResult(model, False, (text,))

    def select(self, model: ir.Model, context: Context) -> Selection:
        """What `run` would write, were it not for `limit`; the model is not changed."""
        work = self._work(model, context)
        menus = self._menus(work)
        return self._selection(work, menus, self._choose(menus, 1.0))

    def _work(self, model: ir.Model, context: Context) -> Work:
        wish = Wish(
            measure=self.measure,
            rank=self.rank,
            margin=self.margin,
            exclude=tuple(self.exclude),
            forms=tuple(self.forms),
        )
        samples = context.calibration if self.data and context.calibration else None
        return Work(model, context, wish, samples)

    def _menus(self, work: Work) -> list[Menu]:
        menus = work.menus()
        by_share_ = not self.rank and not self.energy
        return work.weighed(menus, self.ratio) if self.weigh and by_share_ else menus

    def _choose(self, menus: Sequence[Menu], part: float) -> Choice:
        if not self.rank and not self.energy:
            return by_share(menus, part * self.ratio)
        found = by_energy(menus, self.energy) if self.energy else fastest(menus)
        worst = sorted(
            (i for i, option in enumerate(found) if option is not None),
            key=lambda i: option.error if (option := found[i]) is not None else 0.0,
        )
        kept = set(worst[: round(part * len(worst))])
        return tuple(option if i in kept else None for i, option in enumerate(found))

    def _selection(self, work: Work, menus: Sequence[Menu], choice: Choice) -> Selection:
        return Selection(tuple(menus), choice, tuple(work.refused), work.prices.label)

    # --- notes ---------------------------------------------------------------------------------

    def _notes(self, selection: Selection, lost: float | None, part: float) -> tuple[str, ...]:
        menus, choice = selection.menus, selection.choice
        taken = [(m, o) for m, o in zip(menus, choice, strict=True) if o is not None]
        notes = [f"factorized {len(taken)} of {len(menus)} layers"]
        if taken:
            notes[0] += f": {_forms(choice)}"
            notes.append(_amounts(selection))
        share = removed(menus, choice)
        if part < 1:
            notes.append(f"{part:.0%} of what was asked for, to stay within the limit")
        elif not self.rank and not self.energy and menus and share < 0.98 * self.ratio:
            notes.append(
                f"{share:.0%} of {self.measure} removed, not {self.ratio:.0%}: no more pays"
            )
        if taken:
            worst = sorted(taken, key=lambda item: -item[1].error)[:3]
            named = ", ".join(f"{m.site.name} {o.candidate} {o.error:.1%}" for m, o in worst)
            notes.append(f"greatest errors of outputs, before biases and refitting: {named}")
        if lost is not None:
            notes.append(f"the outputs lose {lost:.1%} of their variance on samples held out")
        reasons: dict[str, list[str]] = {}
        for name, reason in [
            *((menu.site.name, menu.reason) for menu in menus if menu.reason),
            *selection.refused,
        ]:
            reasons.setdefault(reason, []).append(name)
        notes += [
            f"{len(names)} left: {reason} (first: {names[0]})" for reason, names in reasons.items()
        ]
        return tuple(notes)


def _forms(choice: Choice) -> str:
    counts: dict[str, int] = {}
    for option in choice:
        if option is not None:
            counts[option.candidate.form] = counts.get(option.candidate.form, 0) + 1
    return ", ".join(f"{count} {form}" for form, count in sorted(counts.items()))


def _amounts(selection: Selection) -> str:
    parts = []
    for what, (before, after) in (("MACs", selection.macs), ("weights", selection.weights)):
        parts.append(f"{1 - after / before:.1%} fewer {what}" if before else "")
    ms = selection.time
    if selection.label in ("calibrated", "assumed"):
        parts.append(f"predicted {ms[0]:.3g} > {ms[1]:.3g} ms ({selection.label})")
    return f"of these layers: {', '.join(part for part in parts if part)}"


def _bad(option: str, what: str, fix: str) -> PassOptionError:
    return PassOptionError(
        f"The option {option!r} does not fit: {what}", where="pass 'low_rank'", fix=fix
    )
