"""The examples and the demo run as written, and print what they are about."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
pytest.importorskip("torch", reason="the examples use torch")


def run(name: str) -> str:
    with tempfile.TemporaryDirectory() as cache:
        result = subprocess.run(
            [sys.executable, name],
            cwd=EXAMPLES,
            env={**os.environ, "OMP_NUM_THREADS": "1", "EDGEPASS_CACHE": cache},
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_a_custom_pass_rule_and_target():
    output = run("custom_pass.py")
    assert "relu_to_clip{limit=4.0}" in output
    assert "conv_0" in output
    assert "does not match" in output
    assert "relu_to_clip{limit=0.1} is the first to exceed" in output


def test_compiling_a_model():
    output = run("compile_model.py")
    assert "int8" in output
    assert "saved in" in output


def test_estimating_an_architecture():
    output = run("estimate_architecture.py")
    assert output.count("assumed") >= 12
    assert "width 512" in output


def test_a_sweep():
    output = run("sweep.py")
    assert "to ship: " in output
    assert "within" in output
    assert "best, pareto.png, sweep.json, table.txt" in output


def test_pruning():
    output = run("prune.py")
    assert "in reach" in output
    assert "keeps the limits" in output
    assert "to compile: prune{ratio=" in output


def test_the_demo():
    output = run("demo.py")
    # "host int8 33,057 bytes accuracy 0.9944", and "emulated" likewise where there is a machine
    lines = [line for line in output.splitlines() if line.startswith(("host ", "emulated "))]
    shares = [float(line.split("accuracy ")[1]) for line in lines]
    assert len(shares) in (2, 4), output
    assert min(shares) > 0.95
    assert abs(shares[0] - shares[1]) <= 0.01
