"""The rules: for each Relax operator, when a kernel of ours applies and with what configuration.

A rule returns an empty string if it took the node, else the reason why not; the node then goes to
TVM's own lowering and the generic schedule.
"""

from __future__ import annotations

from collections.abc import Callable

from .graph import Node
from .rewrite import FunctionWriter
from .rules_blocked import adaptive_pooling, blocked_elementwise, convolution, pooling
from .rules_matmul import matrix_product
from .rules_rows import layer_norm, reduction, softmax

Rule = Callable[[FunctionWriter, Node], str]

# "elementwise" stands for every operation of `epilogue.py`.
RULES: dict[str, Rule] = {
    "conv2d": convolution,
    "conv1d": convolution,
    "max_pool2d": pooling,
    "avg_pool2d": pooling,
    "max_pool1d": pooling,
    "avg_pool1d": pooling,
    "adaptive_avg_pool2d": adaptive_pooling,
    "mean": reduction,
    "sum": reduction,
    "max": reduction,
    "min": reduction,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "matmul": matrix_product,
    "elementwise": blocked_elementwise,
}
