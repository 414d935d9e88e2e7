"""Use 1: a pass, a rule and a target of your own, in a few lines each (see my_passes.py)."""

from pathlib import Path

import torch
from digits import build

import edgepass

net, example = build()
edgepass.load_plugin(Path(__file__).with_name("my_passes.py"))

compiled = edgepass.compile(
    net.eval(),
    target="my-board",
    recipe="cleanup,fuse,relu_to_clip{limit=4},rename_nodes",
    example_inputs=example,
)
print(compiled.ledger)
print([node.name for node in compiled.model.graph])

# why did a rule not fire? every Relu is a Clip now, so there is nothing to match at a Conv
from my_passes import ReluToClip  # noqa: E402

conv = next(node for node in compiled.model.graph if node.op_type == "Conv")
print(edgepass.explain(ReluToClip(), conv))

# which pass first changes results by more than 1e-4 of their range?
print(
    edgepass.bisect(
        net,
        target="my-board",
        recipe="cleanup,fuse,relu_to_clip{limit=0.1}",
        example_inputs=(torch.rand(1, 1, 8, 8),),
    )
)
