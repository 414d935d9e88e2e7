"""The smaller layers that a layer can be written as, by shape.

Here: `Form`, `Candidate`, `Step` and the candidates of a site. Not here: their numbers
(`low_rank_factors`), their time (`low_rank_price`), writing them (`low_rank_write`).

    product    x W               ->  (x A) B
    pointwise  k x k convolution ->  k x k to r channels, then 1 x 1
    spatial    k x k convolution ->  k x 1 to r channels, then 1 x k: Jaderberg et al. 2014,
               "Speeding up convolutional neural networks with low rank expansions", arXiv:1405.3866
    tucker     k x k convolution ->  1 x 1 to r channels, k x k to s channels, 1 x 1: Kim et al.
               2016, "Compression of deep convolutional neural networks for fast and low power
               mobile applications", arXiv:1511.06530
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

from ...ir.graph import attribute
from .sites import Site

_GRID = 24
"""Ranks of one form that are looked at, at most."""


class Form(enum.StrEnum):
    """How a layer is written as several."""

    PRODUCT = "product"
    POINTWISE = "pointwise"
    SPATIAL = "spatial"
    TUCKER = "tucker"


@dataclasses.dataclass(frozen=True)
class Step:
    """One of the layers: its operator, the shape of its weight, its attributes; `bias` on it."""

    op_type: str
    shape: tuple[int, ...]
    attributes: tuple[tuple[str, Any], ...] = ()
    bias: bool = False

    @property
    def weights(self) -> int:
        """How many weights it has, bias left out."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A form of one site at certain ranks, one for each seam between its steps."""

    form: Form
    ranks: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def weights(self) -> int:
        """How many weights the steps have, biases left out."""
        return sum(step.weights for step in self.steps)

    def __str__(self) -> str:
        return f"{self.form} {'/'.join(map(str, self.ranks))}"


def original(site: Site) -> Step:
    """The layer as it is."""
    shape = (site.outputs, site.inputs, *site.kernel)
    if not site.is_conv:
        shape = (site.inputs, site.outputs)
    attributes = {name: a.value for name, a in site.node.attributes.items()}
    return Step(site.node.op_type, shape, _plain(attributes), site.node.op_type != "MatMul")


def candidates(site: Site, multiple: int, rank: int = 0) -> list[Candidate]:
    """All forms of a site with fewer weights than it has, ranks in multiples of `multiple`.

    `rank`: of this rank only, as it is.
    """
    found = [
        candidate
        for form in forms_of(site)
        for ranks in _ranks(site, form, multiple, rank)
        if (candidate := make(site, form, ranks)).weights < site.weights
    ]
    return list(dict.fromkeys(found))


def forms_of(site: Site) -> tuple[Form, ...]:
    """The forms that a layer has."""
    if not site.is_conv or math.prod(site.kernel) == 1:
        return (Form.PRODUCT,)
    if len(site.kernel) == 2 and min(site.kernel) > 1:
        return Form.POINTWISE, Form.SPATIAL, Form.TUCKER
    return Form.POINTWISE, Form.TUCKER


def make(site: Site, form: Form, ranks: tuple[int, ...]) -> Candidate:
    """One form at given ranks."""
    return Candidate(form, ranks, _steps(site, form, ranks))


def _ranks(site: Site, form: Form, multiple: int, rank: int) -> list[tuple[int, ...]]:
    k = math.prod(site.kernel)
    if form is Form.TUCKER:
        if rank:
            return [(rank, rank)] if rank < min(site.inputs, site.outputs) else []
        # a share of the input channels, and the same of the outputs
        longest = max(site.inputs, site.outputs)
        found = []
        for top in _grid(longest, multiple):
            share = top / longest
            pair = [_near(share * size, multiple, size) for size in (site.inputs, site.outputs)]
            found.append((pair[0], pair[1]))
        return [pair for pair in found if pair[0] < site.inputs or pair[1] < site.outputs]
    if form is Form.SPATIAL:
        limit = min(site.inputs * site.kernel[0], site.kernel[1] * site.outputs)
    else:
        limit = min(site.inputs * k, site.outputs)
    if rank:
        return [(rank,)] if rank < limit else []
    # no rank with as many weights as the layer has
    alone = make(site, form, (1,)).weights
    return [(r,) for r in _grid(min(limit - 1, (site.weights - 1) // alone), multiple)]


def _grid(limit: int, multiple: int) -> list[int]:
    """Multiples up to a limit, evenly spaced where they are many."""
    count = limit // multiple
    step = max(1, -(-count // _GRID))
    return [multiple * i for i in range(step, count + 1, step)]


def _near(width: float, multiple: int, limit: int) -> int:
    return min(limit, max(multiple, round(width / multiple) * multiple))


def _steps(site: Site, form: Form, ranks: tuple[int, ...]) -> tuple[Step, ...]:
    op, i, o = site.node.op_type, site.inputs, site.outputs
    if op != "Conv":
        last = op == "Gemm"
        return Step(op, (i, ranks[0])), Step(op, (ranks[0], o), (), last)
    options = {name: a.value for name, a in site.node.attributes.items()}
    ones = (1,) * len(site.kernel)
    if form in (Form.PRODUCT, Form.POINTWISE):
        first = Step(op, (ranks[0], i, *site.kernel), _plain(options))
        return first, Step(op, (o, ranks[0], *ones), (), True)
    if form is Form.TUCKER:
        return (
            Step(op, (ranks[0], i, *ones)),
            Step(op, (ranks[1], ranks[0], *site.kernel), _plain(options)),
            Step(op, (o, ranks[1], *ones), (), True),
        )
    height, width = site.kernel
    return (
        Step(op, (ranks[0], i, height, 1), _along(site, 0)),
        Step(op, (o, ranks[0], 1, width), _along(site, 1), True),
    )


def _along(site: Site, axis: int) -> tuple[tuple[str, Any], ...]:
    """The attributes of the convolution along one of two axes; the other is left as it is."""
    node = site.node
    options: dict[str, Any] = {}
    for name in ("strides", "dilations"):
        given = attribute(node, name)
        if given is not None:
            options[name] = tuple(given[i] if i == axis else 1 for i in range(2))
    pads = attribute(node, "pads")
    if pads is not None:
        options["pads"] = tuple(pads[i] if i % 2 == axis else 0 for i in range(4))
    auto = attribute(node, "auto_pad")
    if auto is not None:
        options["auto_pad"] = auto
    options["kernel_shape"] = tuple(site.kernel[i] if i == axis else 1 for i in range(2))
    return _plain(options)


def _plain(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Attributes as they compare; `group` and those of Gemm that linear layers lack left out."""
    dropped = ("group", "transA", "transB", "alpha", "beta")
    return tuple(
        (name, tuple(value) if isinstance(value, list | tuple) else value)
        for name, value in sorted(options.items())
        if name not in dropped
    )
