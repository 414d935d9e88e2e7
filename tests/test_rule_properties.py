"""Every rewrite rule on models made from its own pattern: wherever it fires, results stay equal.

Rules are found through the registry, so a new one is tested as soon as it exists. From its pattern
many small models are made; those on which it fires get a certificate each, and so do near-misses:
the same models with one thing changed. A rule whose pattern does not say enough for that needs an
entry in `rule_examples`; one that is never reached fails.

`EDGEPASS_RULE_ATTEMPTS` raises the number of models per rule.
"""

import contextlib
import itertools
import os
import zlib

import numpy as np
import onnx_ir as ir
import pytest

from edgepass.errors import EdgepassError
from edgepass.frontends import load_model
from edgepass.ir.graph import index_names
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.text import format_model
from edgepass.ir.verify import interface, interface_difference, verify
from edgepass.passes.base import Context
from edgepass.passes.equality import Certificate, Certifier
from edgepass.passes.equality.feeds import adversarial, assignments
from edgepass.passes.registry import rules
from edgepass.targets.onnxruntime import OrtRunner
from edgepass.targets.registry import get_target
from pattern_models import DiscardError, PatternModel, forget_shapes, near_misses, patterns
from rule_examples import EXAMPLES, examples

ATTEMPTS = int(os.environ.get("EDGEPASS_RULE_ATTEMPTS", "250"))
FIRINGS = max(6, ATTEMPTS // 40)
OPSETS = (13, 16, 17, 18, 20, 21, 22, 23)
RULES = {name: cls for name, cls in rules().items() if cls.__module__.startswith("edgepass.")}


def runs(model: ir.Model) -> bool:
    """Whether the runtime takes the model, and runs it on an input: rules need not bear others."""
    values = list(model.graph.inputs)
    try:
        with OrtRunner(model, optimize=False) as runner:
            for sizes in assignments(values, {})[:3]:
                for case in itertools.islice(adversarial(values, sizes, 0, positive=True), 2):
                    with contextlib.suppress(EdgepassError):
                        runner.run(case.feed)
                        return True
    except EdgepassError:
        return False
    return False


def only_noise(model: ir.Model) -> bool:
    """Whether it norms single numbers: 0 in exact arithmetic, what rounding leaves in ours."""
    return any(
        node.op_type == "InstanceNormalization"
        and node.inputs[0].shape is not None
        and all(d == 1 for d in node.inputs[0].shape.dims[2:])
        for node in model.graph
    )


def certificates(rule, model: ir.Model) -> list[Certificate]:
    """Run a rule on a copy of a model; the certificates of its firings.

    Where the runtime takes the model at all, the rule must not raise, the result must be sound
    and have the same interface, and no certificate may find a difference.
    """
    shown = format_model(model)
    copy = model.clone()
    index_names(copy)
    certifier = Certifier()
    failure = ""
    try:
        result = rule.run(copy, Context(target=get_target("x86_64"), certify=certifier))
        verify(result.model)
        assert result.modified == bool(certifier.certificates)
    except EdgepassError as error:
        failure = str(error)
    failure = failure or "\n".join(
        str(found) for found in certifier.certificates if found.holds is False
    )
    for kind in ("inputs", "outputs"):
        old, new = (interface(getattr(m.graph, kind)) for m in (model, copy))
        failure = failure or interface_difference(kind[:-1], old, new)
    if (failure or certifier.certificates) and (only_noise(model) or not runs(model)):
        return []
    assert not failure, f"{failure}\n{shown}"
    return certifier.certificates


def attempts(name: str):
    """Sound models made from the rule's patterns, alike at every run."""
    rule = RULES[name]()
    choices = patterns(rule)
    for seed in range(ATTEMPTS):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        maker = PatternModel(rng, int(rng.choice(OPSETS)))
        try:
            model = maker.make(choices[seed % len(choices)])
            verify(model)
        except (EdgepassError, DiscardError):
            continue
        yield model, rng


def example_models(name: str):
    """(index, model) of the rule's examples, at every opset whose operators they are written in."""
    for opset in (17, 18, 20, 22, 23):
        for index, proto in enumerate(examples(name, opset)):
            model = load_model(proto)
            with contextlib.suppress(EdgepassError):
                verify(model)
                infer_shapes(model)
                yield index, model


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_keeps_results_wherever_it_fires(name):
    rule = RULES[name]()
    reached = checked = 0
    for model, rng in attempts(name):
        found = certificates(rule, model)
        if not found:
            continue
        reached += 1
        checked += any(item.holds for item in found)
        for what, miss in near_misses(model, rng):
            forget_shapes(miss)
            try:
                verify(miss)
                infer_shapes(miss)
            except EdgepassError:
                continue  # no sound model
            try:
                certificates(rule, miss)
            except AssertionError as error:
                raise AssertionError(f"near-miss, {what}: {error}") from error
        if checked >= FIRINGS:
            break
    for _, model in example_models(name):
        checked += any(item.holds for item in certificates(rule, model))
    assert checked, (
        f"{name} fired on {reached} of {ATTEMPTS} models made from its pattern, on none that the "
        "runtime takes; add an example to rule_examples.EXAMPLES"
    )


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_are_of_rules_that_exist_and_fire(name):
    fired = {
        index
        for index, model in example_models(name)
        if any(item.holds for item in certificates(RULES[name](), model))
    }
    assert fired == set(range(len(EXAMPLES[name])))
