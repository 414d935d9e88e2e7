"""A plugin: one pass, one rewrite rule and one target of your own. See docs/passes.md.

    edgepass compile model.onnx --plugin my_passes.py --target my-board \
        --recipe "cleanup,relu_to_clip{limit=4}" -o out/
"""

from dataclasses import dataclass

import numpy as np

import edgepass
from edgepass import Pass, PassResult, RewriteRule, Stage, op, var


@dataclass(frozen=True)
class ReluToClip(RewriteRule):
    """Relu(x) -> Clip(x, 0, limit): bounded activations quantize better."""

    lossless = False
    limit: float = 6.0

    def pattern(self):
        return op.Relu(var("x"))

    def rewrite(self, m, build):
        low, high = (np.array(v, np.float32) for v in (0, self.limit))
        return build.Clip(m["x"], low, high)


@dataclass(frozen=True)
class RenameNodes(Pass):
    """Names every node after its operator, in order: conv_0, conv_1, relu_0."""

    stage = Stage.FUSE
    separator: str = "_"

    def run(self, model, context):
        counts: dict[str, int] = {}
        for node in model.graph:
            number = counts.setdefault(node.op_type, 0)
            node.name = f"{node.op_type.lower()}{self.separator}{number}"
            counts[node.op_type] += 1
        return PassResult(model, False, (f"named {sum(counts.values())} nodes",))


MY_BOARD = edgepass.get_target("arm64").replace(
    name="my-board", description="Cortex-A55, 2 cores", cores=2, frequency_ghz=1.8, l2_kb=256
)
