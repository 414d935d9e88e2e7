"""What the outputs lose when units of one group alone are gone: the weights of its errors.

Here: `Alone`, which measures that, and `weighed` and `weighed_together`, which turn errors of
layers into errors of outputs.
Not here: what follows for how many units each group loses (`allocation`).

A layer's error says little of how much the outputs mind it: the channels of a residual stream that
a whole stage reads matter more than those inside one block. Measuring one group at a time, and
adding up, is what Molchanov et al. 2017 ("Pruning convolutional neural networks for resource
efficient inference", arXiv:1611.06440) call the oracle; here on outputs, not on a loss, so that no
labels are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import graphs, is_absent, is_onnx_op
from ..base import Feed
from ..quantize.layers import LinearLayer, linear_layer
from .choice import Ranked
from .divergence import Outputs, thinned
from .groups import Group, Site, find_groups
from .layer_bias import add_to_bias
from .remove import remove
from .selection import DAMPING
from .statistics import Statistics

SHARES = (0.25, 0.5, 0.75)
"""Of the units of a group are left out, one after the other."""
_SAMPLES = 32
_FEWEST_SAMPLES = 8
_RUNS = 6144
"""Of the model, all groups together, about: with more groups there are fewer samples."""
_RUINED = 4.0
"""A divergence beyond which nothing is to be learnt."""


class Alone:
    """A model from which the units of one group at a time are left out.

    Where all layers that sum over the units are known by their statistics, their weights are
    solved again in a copy in which the inputs stay, as zeros; elsewhere the units are removed.
    """

    def __init__(
        self,
        model: ir.Model,
        samples: Sequence[Feed],
        groups: int,
        heads: str = "auto",
        widths: bool = False,
    ) -> None:
        most = max(_FEWEST_SAMPLES, min(_SAMPLES, _RUNS // max(1, groups * len(SHARES))))
        self._model = _before_probabilities(model.clone())
        self._outputs = Outputs(self._model, thinned(samples, most))
        self._options = (heads, widths)
        self._copy = self._model.clone()
        nodes = (node for graph in graphs(self._copy) for node in graph)
        self._nodes = {node.outputs[0].name: node for node in nodes if node.outputs}
        self._biases: dict[str, tuple[ir.Value, np.ndarray] | None] = {}

    def solved_again(
        self, group: Group, units: Sequence[int], statistics: Mapping[Site, Statistics]
    ) -> float | None:
        """What the outputs lose, as a share of their variance, without those units.

        None where not all layers that read the units can be solved by the statistics.
        """
        if not self.knows(group, statistics):
            return None
        changed: list[tuple[ir.Value, ir.TensorProtocol | None]] = []
        try:
            if all(self._leave_out(s, statistics[s], units, changed) for s in group.consumers):
                return self._lost(self._copy)
        finally:
            for value, tensor in changed:
                value.const_value = tensor
        return None

    def removed(self, chosen: Mapping[int, tuple[Group, Sequence[int]]]) -> float | None:
        """The same for units of several groups, by their places among all, with no repair."""
        copy = self._model.clone()
        heads, widths = self._options
        groups = find_groups(copy, heads=heads, widths=widths)
        own: dict[Group, Sequence[int]] = {}
        for index, (group, units) in chosen.items():
            # outputs are others here, which may have parted groups
            if index >= len(groups) or (groups[index].name, groups[index].size) != (
                group.name, group.size,
            ):  # fmt: skip
                return None
            own[groups[index]] = units
        remove(copy, groups, own)
        return self._lost(copy)

    @staticmethod
    def knows(group: Group, statistics: Mapping[Site, Statistics]) -> bool:
        """Whether all that reads the units is there to be solved again."""
        readers = group.consumers
        return bool(readers) and all(s in statistics and _own(s) for s in readers)

    def _lost(self, model: ir.Model) -> float:
        lost = self._outputs.divergence(model)
        return min(lost, _RUINED) if np.isfinite(lost) else _RUINED

    def _leave_out(
        self,
        site: Site,
        known: Statistics,
        units: Sequence[int],
        changed: list[tuple[ir.Value, ir.TensorProtocol | None]],
    ) -> bool:
        """Solve the layer's weights again without the units, in the copy; whether that worked."""
        name = site.node.outputs[0].name
        node = self._nodes.get(name)
        layer = None if node is None else linear_layer(node)
        if name is None or layer is None or layer.weight.dtype is None:
            return False
        bias = self._bias(name, layer)
        if bias is None:
            return False
        matrix = known.without(np.asarray(units), DAMPING)
        shift = np.einsum("gi,gio->go", known.gram.mean, known.weight - matrix)
        dtype = layer.weight.dtype.numpy()
        value, base = bias
        changed += [(layer.weight, layer.weight.const_value), (value, value.const_value)]
        layer.weight.const_value = ir.Tensor(
            layer.restore(matrix).astype(dtype), name=layer.weight.name
        )
        value.const_value = ir.Tensor((base + shift.reshape(-1)).astype(dtype), name=value.name)
        return True

    def _bias(self, name: str, layer: LinearLayer) -> tuple[ir.Value, np.ndarray] | None:
        """The layer's bias in the copy, made where there was none, and what it is."""
        if name not in self._biases:
            groups, _, out = layer.shape
            made = add_to_bias(layer, np.zeros(groups * out))
            if made is None or made[0].const_value is None:
                self._biases[name] = None
            else:
                base = np.asarray(made[0].const_value.numpy(), np.float64).reshape(-1)
                self._biases[name] = made[0], base
        return self._biases[name]


def _before_probabilities(model: ir.Model) -> ir.Model:
    """With what goes into a Softmax or Sigmoid at the end as outputs, in place.

    Probabilities are near 0 and 1 mostly: on few samples their errors are those of one decision
    or other, or none.
    """
    for i, output in enumerate(model.graph.outputs):
        node = output.producer()
        if node is None or not is_onnx_op(node, "Softmax", "LogSoftmax", "Sigmoid"):
            continue
        given = node.inputs[0]
        if given is not None and given.producer() is not None and not given.is_graph_output():
            model.graph.outputs[i] = given
    return model


def _own(site: Site) -> bool:
    """Whether the weight is an initializer that this node alone reads."""
    weight = site.weight
    tensor = weight.const_value
    return weight.is_initializer() and len(weight.uses()) == 1 and not is_absent(tensor)


def weighed(item: Ranked, alone: Alone, statistics: Mapping[Site, Statistics]) -> Ranked | None:
    """The same order, with errors of the outputs in place of those of the layers behind.

    Measured at `SHARES` of the units; between them the errors have the shape they had. None where
    the group can't be measured by itself (`weighed_together`).
    """

    def lost(count: int) -> float | None:
        return alone.solved_again(item.group, item.first(count), statistics)

    return _scaled(item, lost)


def weighed_together(
    members: Sequence[Ranked], alone: Alone, places: Sequence[int]
) -> list[Ranked]:
    """The same for groups that lose as many units each, without repair; the first has all errors.

    `places` are those of the groups among all of the model.
    """
    first, *others = members

    def lost(count: int) -> float | None:
        pairs = zip(places, members, strict=True)
        return alone.removed({place: (item.group, item.first(count)) for place, item in pairs})

    whole = _scaled(first, lost) or first
    return [whole, *(Ranked(x.group, x.order, np.zeros_like(x.errors)) for x in others)]


def _scaled(item: Ranked, lost: Callable[[int], float | None]) -> Ranked | None:
    places: list[int] = []
    factors, most = [], 0.0
    for share in SHARES:
        count = min(round(share * item.length), (len(item.errors) - 1) // item.rows)
        if count < 1 or count * item.rows in places:
            continue
        found = lost(count)
        if found is None:
            return None
        most = max(most, found)
        places.append(count * item.rows)
        factors.append(np.log(max(most, 1e-9)) - np.log(max(item.error(count), 1e-12)))
    if not places:
        return item
    factor = np.exp(np.interp(np.arange(len(item.errors)), places, factors))
    return Ranked(item.group, item.order, np.maximum.accumulate(item.errors * factor))
