"""Multiply-accumulates counted from the graph against torch's own FLOP counter.

    python benchmarks/macs.py [NAME ...]

Each architecture is built without trained weights, exported, and counted by `edgepass.estimate`;
torch counts the same module while it runs (`torch.utils.flop_counter`, two operations a
multiply-accumulate). Transformers' configurations of several modalities, and nets of our own.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import torch
from architectures import CASES
from host import describe_host
from torch.utils.flop_counter import FlopCounterMode

import edgepass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of cases")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(describe_host())
    print(f"{'architecture':32} {'torch':>14} {'edgepass':>14}")
    chosen = [n for n in CASES if not options.names or any(part in n for part in options.names)]
    equal = 0
    for name in chosen:
        torch.manual_seed(0)
        module, inputs = CASES[name]()
        module.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*inputs)
        truth = counter.get_total_flops() // 2
        macs = edgepass.estimate(module, "arm64", ["fp32"], example_inputs=inputs)["fp32"].macs
        equal += macs == truth
        mark = "" if macs == truth else f"  {(macs or 0) / truth - 1:+.3%}"
        print(f"{name:32} {truth:14} {macs!s:>14}{mark}", flush=True)
    print(f"equal on {equal} of {len(chosen)} architectures")
    sys.exit(0 if equal == len(chosen) else 1)


if __name__ == "__main__":
    main()
