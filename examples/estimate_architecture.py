"""Use 3: what an architecture costs on a device, before it has weights."""

import torch
from digits import DigitsNet
from rich.console import Console

import edgepass

for width in (32, 128, 512):
    with torch.device("meta"):  # no weight is ever allocated
        net = DigitsNet(width)
    estimate = edgepass.estimate(
        net,
        target="arm64",
        recipes=["fp32", "fp16", "int8", "int8-weights"],
        input_shapes={"image": "1x1x8x8"},
    )
    print(f"width {width}")
    print(estimate)

Console(width=160).print(estimate.per_node_table("int8"))
