"""What one-shot L1 pruning leaves of the image classifiers: the peers of `prune`.

    pip install --no-deps torch-pruning            # optional: without it, unstructured only
    python benchmarks/pruning_peers.py [NAME...] [--ratios 0.3 0.5]

Each network of `image_tasks` is pruned without training, in torch:

unstructured  torch.nn.utils.prune.l1_unstructured, in each convolution and linear layer
structured    torch_pruning.pruner.BasePruner with GroupMagnitudeImportance(p=1), each group by the
              ratio, the classifier's outputs excepted
in blocks     the same, residual streams left as they are: only what lies inside a block
+ BatchNorm   its statistics afterwards taken anew from the calibration pictures
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import warnings

import numpy as np
import torch
from image_nets import NETS, Residual
from image_tasks import calibration_pictures, test_pictures, trained
from torch import nn


def accuracy(network: nn.Module) -> float:
    """Top-1 on the test pictures."""
    pictures, classes = test_pictures()
    with torch.no_grad():
        parts = [network(torch.from_numpy(part)).argmax(1) for part in np.split(pictures, 10)]
    return float(np.mean(torch.cat(parts).numpy() == classes))


def recalibrated(network: nn.Module) -> nn.Module:
    """With the statistics of its BatchNorms from the calibration pictures."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    with torch.no_grad():
        network.train()(torch.from_numpy(calibration_pictures()))
    return network.eval()


def unstructured(network: nn.Module, ratio: float) -> nn.Module:
    """The smallest weights of each layer zeroed."""
    from torch.nn.utils import prune

    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            prune.l1_unstructured(layer, "weight", ratio)
            prune.remove(layer, "weight")
    return network


def structured(network: nn.Module, ratio: float, inside: bool) -> nn.Module:
    """Channels removed by torch-pruning; with `inside`, residual streams stay."""
    import torch_pruning

    network = copy.deepcopy(network)
    kept = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1:]
    if inside:
        kept += _on_streams(network)
    heads = {m.qkv: m.heads for m in network.modules() if hasattr(m, "qkv")}
    pruner = torch_pruning.pruner.BasePruner(
        network,
        torch.zeros(1, 3, 32, 32),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=ratio,
        ignored_layers=kept,
        num_heads=heads,
    )
    pruner.step()
    return network


def _on_streams(network: nn.Module) -> list[nn.Module]:
    """The layers whose outputs are added to a residual stream."""
    found = []
    for block in network.modules():
        if isinstance(block, Residual):
            for part in (block.body, block.shortcut):
                found += [m for m in part.modules() if isinstance(m, nn.Conv2d | nn.Linear)][-1:]
    return found


def macs(network: nn.Module) -> int:
    """Multiply-accumulates of convolutions and linear layers for one picture."""
    total = 0

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    hooks = [
        layer.register_forward_hook(count)
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return total


def main() -> None:
    """The table."""
    from host import describe_host

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NETS))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(describe_host(), "\n")
    print("| network | how | ratio | top-1 | + BatchNorm | parameters | MACs |")
    print("|---|---|---:|---:|---:|---:|---:|")
    ways = {"unstructured": unstructured}
    if importlib.util.find_spec("torch_pruning"):
        ways["structured"] = lambda network, ratio: structured(network, ratio, False)
        ways["in blocks"] = lambda network, ratio: structured(network, ratio, True)
    for name in options.names or NETS:
        network = trained(name)
        weights, products = sum(p.numel() for p in network.parameters()), macs(network)
        print(f"| {name} | float | 0 | {accuracy(network):.3f} | | {weights:,} | {products:,} |")
        for how, way in ways.items():
            for ratio in options.ratios:
                try:
                    pruned = way(network, ratio)
                    scores = f"{accuracy(pruned):.3f} | {accuracy(recalibrated(pruned)):.3f}"
                except Exception as error:  # a peer that can't is a result
                    print(f"| {name} | {how} | {ratio} | {type(error).__name__}: {error} |")
                    continue
                left = sum(int(p.count_nonzero()) for p in pruned.parameters()) / weights
                spent = macs(pruned) / products
                print(
                    f"| {name} | {how} | {ratio} | {scores} | {left:.0%} | {spent:.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
