"""Estimate a 1.2 B-parameter Llama shape without weights: seconds and peak memory.

Built on torch's meta device from a transformers config; needs transformers.

    python benchmarks/llama_estimate.py [--length 128]
"""

from __future__ import annotations

import argparse
import time

from host import describe_host


def build():
    """The module on the meta device: 1.24 billion parameters, embeddings tied."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=128)
    length = parser.parse_args().length
    print(describe_host())

    import edgepass

    started = time.perf_counter()
    estimate = edgepass.estimate(
        build,
        target="arm64",
        recipes=["fp32", "fp16", "int8", "int8-weights", "int4-weights"],
        input_shapes={"input_ids": f"1x{length}:int64"},
    )
    seconds = time.perf_counter() - started
    with open("/proc/self/status", encoding="utf-8") as file:  # kB; of this process alone
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1e6
    print(estimate)
    print(f"{seconds:.1f} s, peak resident memory {peak:.2f} GB, imports included")


if __name__ == "__main__":
    main()
