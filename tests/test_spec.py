"""The text form of passes: round trip, types, messages."""

import dataclasses
import enum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepass import Pass, PassResult
from edgepass.errors import PassOptionError, UnknownPassError
from edgepass.passes.registry import passes
from edgepass.passes.spec import build_pass, describe_options, format_pass, parse_specs
from edgepass.pipelines import parse_recipe


class Scope(enum.StrEnum):
    TENSOR = "tensor"
    GLOBAL = "global"


@dataclasses.dataclass(frozen=True)
class Everything(Pass):
    """A pass with an option of every type."""

    count: int = 1
    ratio: float = 0.5
    on: bool = False
    label: str = "a"
    names: tuple[str, ...] = ()
    scope: Scope = Scope.TENSOR
    limit: int | None = None

    def run(self, model, context):
        return PassResult(model, False)


def parse(text: str) -> Pass:
    (spec,) = parse_specs(text)
    return build_pass(Everything, spec)


TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    st.builds(
        Everything,
        count=st.integers(-(10**6), 10**6),
        ratio=st.floats(allow_nan=False, allow_infinity=False),
        on=st.booleans(),
        label=TEXTS,
        names=st.lists(TEXTS, max_size=3).map(tuple),
        scope=st.sampled_from(Scope),
        limit=st.none() | st.integers(0, 9),
    )
)
def test_text_form_round_trips(item):
    assert parse(format_pass(item)) == item


def test_defaults_are_left_out():
    assert format_pass(Everything()) == "everything"
    assert format_pass(Everything(scope=Scope.GLOBAL)) == 'everything{scope="global"}'


def test_every_known_pass_round_trips_at_its_defaults():
    for name, cls in passes().items():
        if any(option["required"] for option in describe_options(cls)):
            continue
        item = cls()
        (spec,) = parse_specs(str(item))
        assert spec.name == name
        assert build_pass(cls, spec) == item


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("everything{cuont=2}", "has no option 'cuont'"),
        ("everything{count=two}", "'count' of 'everything' can't be 'two'"),
        ("everything{on=1}", "'on' of 'everything' can't be 1"),
        ("everything{scope=local}", "one of: tensor, global"),
        ("everything{count}", "has no '='"),
        ("everything{count=1", "not closed"),
        ("everything}count=1", "unexpected '}'"),
    ],
)
def test_wrong_options_are_named(text, message):
    with pytest.raises(PassOptionError, match="(?s)" + message.replace("'", ".")):
        parse(text)


def test_a_near_name_is_suggested():
    with pytest.raises(PassOptionError, match="did you mean 'count'"):
        parse("everything{cuont=2}")
    with pytest.raises(UnknownPassError, match="did you mean fold_constants"):
        parse_recipe("cleanup,fold_constant")


def test_one_item_is_a_whole_pipeline_and_a_list_is_taken_as_written():
    whole = [p.name for p in parse_recipe("fp16")]
    assert whole.index("fold_constants") < whole.index("fold_affine") < whole.index("fp16")
    assert [p.name for p in parse_recipe("dead_code,identities")] == ["dead_code", "identities"]
    joined = parse_recipe("sparsify50+int8")
    assert next(p for p in joined if p.name == "sparsify").ratio == 0.5
    names = [p.name for p in joined]
    assert names.index("sparsify") < names.index("int8") < names.index("runtime_forms")


def test_stages_order_passes():
    assert [p.name for p in parse_recipe("int8,fold_affine,dead_code")] == [
        "dead_code",
        "fold_affine",
        "int8",
    ]
