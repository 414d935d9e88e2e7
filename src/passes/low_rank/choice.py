"""Which layers are factorized, in which form and at which ranks.

Here: `Option`, `Menu`, and the three ways to choose from menus: a share to remove from all layers
together, an energy to keep in each, a rank for each. Not here: prices and errors themselves.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

from .forms import Candidate
from .price import Price
from .sites import Site


@dataclasses.dataclass(frozen=True)
class Option:
    """A candidate of a layer, its price, and the error's share of the output's energy.

    `gain` is what it takes away of what is to be reduced, in whatever unit that is counted.
    """

    candidate: Candidate
    price: Price
    error: float
    gain: float


@dataclasses.dataclass(frozen=True)
class Menu:
    """A layer, what it costs as it is, and its options that pay; `reason` where there are none.

    `whole` is the layer's share of what is to be reduced. `weight` multiplies its errors: how much
    the model's outputs suffer of them.
    """

    site: Site
    price: Price
    whole: float
    options: tuple[Option, ...]
    reason: str = ""
    weight: float = 1.0


Choice = tuple[Option | None, ...]
"""For each menu what is taken; None: the layer stays as it is."""


def by_share(menus: Sequence[Menu], share: float) -> Choice:
    """The options of least error together that remove `share` of the whole, as far as they can.

    Each layer goes along the lower convex hull of its errors over its gains, the step of least
    error for its gain first: but for the last step that is the least sum there is (Shoham and
    Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers"). Then each layer,
    the worst bargain first, takes back what is not needed.
    """
    wanted = share * sum(menu.whole for menu in menus)
    hulls = [_hull(menu) for menu in menus]
    at = [-1] * len(menus)
    queue: list[tuple[float, int]] = []

    def offer(index: int) -> None:
        if at[index] + 1 < len(hulls[index]):
            gain, error = _step(hulls[index], at[index])
            heapq.heappush(queue, (error * menus[index].weight / gain, index))

    for index in range(len(menus)):
        offer(index)
    reached = 0.0
    order: list[int] = []
    while queue and reached < wanted:
        _, index = heapq.heappop(queue)
        reached += _step(hulls[index], at[index])[0]
        at[index] += 1
        order.append(index)
        offer(index)
    taken = [hull[i] if i >= 0 else None for hull, i in zip(hulls, at, strict=True)]
    for index in dict.fromkeys(reversed(order)):
        current = taken[index]
        assert current is not None
        spare = reached - wanted
        if spare <= 0:
            break
        fitting = [o for o in menus[index].options if o.gain >= current.gain - spare]
        best = min(fitting, key=lambda o: (o.error, -o.gain))
        if current.gain <= spare:
            taken[index] = None
            reached -= current.gain
        elif best.error < current.error:
            taken[index] = best
            reached -= current.gain - best.gain
    return tuple(taken)


def by_energy(menus: Sequence[Menu], energy: float) -> Choice:
    """For each layer the fastest option that keeps that share of its output's energy."""
    return tuple(
        min(
            (o for o in menu.options if o.error <= 1.0 - energy),
            key=lambda o: (o.price.time, o.error),
            default=None,
        )
        for menu in menus
    )


def fastest(menus: Sequence[Menu]) -> Choice:
    """For each layer the fastest option."""
    return tuple(
        min(menu.options, key=lambda o: (o.price.time, o.error), default=None) for menu in menus
    )


def removed(menus: Sequence[Menu], choice: Choice) -> float:
    """The share of the whole that a choice takes away."""
    whole = sum(menu.whole for menu in menus)
    return sum(option.gain for option in choice if option is not None) / whole if whole else 0.0


def _hull(menu: Menu) -> list[Option]:
    """Options on the lower convex hull of error over gain, from no gain at no error."""
    hull: list[Option] = []
    for option in sorted(menu.options, key=lambda o: (o.gain, o.error)):
        if option.gain <= 0 or (hull and option.gain == hull[-1].gain):
            continue
        while hull and _slope(hull[-2] if len(hull) > 1 else None, hull[-1]) >= _slope(
            hull[-2] if len(hull) > 1 else None, option
        ):
            hull.pop()
        hull.append(option)
    return hull


def _slope(start: Option | None, end: Option) -> float:
    gain, error = (0.0, 0.0) if start is None else (start.gain, start.error)
    return (end.error - error) / (end.gain - gain) if end.gain > gain else float("inf")


def _step(hull: Sequence[Option], index: int) -> tuple[float, float]:
    """Gain and error of the step from one option of a hull (-1: none) to the next."""
    start, end = (hull[index] if index >= 0 else None), hull[index + 1]
    gain, error = (0.0, 0.0) if start is None else (start.gain, start.error)
    return end.gain - gain, end.error - error
