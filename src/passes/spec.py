"""The text form of passes: `prune{ratio=0.5,scope="global"},int8`, both ways.

Here: reading and writing options, checked against the pass's dataclass fields. Not here: which
names exist (`registry`) and what a recipe name stands for (`pipelines`).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from ..errors import PassOptionError
from .base import Pass


@dataclasses.dataclass(frozen=True)
class PassSpec:
    """A name and its options, as read from text; values are Python literals."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()


def format_pass(item: Pass) -> str:
    """The shortest text that gives this pass back: options at their default are left out."""
    shown = []
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING or value != default:
            shown.append(f"{field.name}={_format_value(value)}")
    return f"{item.name}{{{','.join(shown)}}}" if shown else item.name


def format_passes(items: Sequence[Pass]) -> str:
    """The text form of a list of passes."""
    return ",".join(format_pass(item) for item in items)


def parse_specs(text: str) -> list[PassSpec]:
    """Split `a,b{x=1,y=[1,2]},c` into names and options.

    Raises:
        PassOptionError: unbalanced braces, a missing `=`, or an empty name, with the position.
    """
    specs = []
    for item in _split(text, text):
        name, brace, rest = item.partition("{")
        name = name.strip()
        if not name or not all(c.isalnum() or c in "_-." for c in name):
            raise _syntax_error(text, f"{item.strip()!r} does not begin with a pass name")
        if brace and not rest.rstrip().endswith("}"):
            raise _syntax_error(text, f"the options of {name!r} do not end with '}}'")
        options = []
        for option in _split(rest.rstrip()[:-1], text) if brace else ():
            key, equals, value = option.partition("=")
            if not equals:
                raise _syntax_error(text, f"the option {option.strip()!r} has no '='")
            options.append((key.strip(), _parse_value(value.strip())))
        specs.append(PassSpec(name, tuple(options)))
    return specs


def build_pass(cls: type[Pass], spec: PassSpec) -> Pass:
    """The pass with the options of `spec`, each checked against the field's type.

    Raises:
        PassOptionError: an option the pass does not have, or a value that does not fit.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in spec.options:
        name = key.replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise PassOptionError(
                f"The pass {spec.name!r} has no option {key!r}",
                where=f"recipe item {spec.name!r}",
                fix=f"{hint}its options are: {', '.join(fields) or 'none'}",
            )
        values[name] = _coerce(spec.name, name, value, hints[name])
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and name not in values
    ]
    if missing:
        raise PassOptionError(
            f"The pass {spec.name!r} needs the option {missing[0]!r}",
            where=f"recipe item {spec.name!r}",
            fix=f"write {spec.name}{{{missing[0]}=...}}",
        )
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise PassOptionError(
            f"The pass {spec.name!r} refuses its options: {error}",
            where=f"recipe item {spec.name!r}",
            fix=f"see `edgepass passes {spec.name}`",
        ) from error


def describe_options(cls: type[Pass]) -> list[dict[str, Any]]:
    """Name, type, default and choices of every option, for help texts and `--json`."""
    hints = typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        hint = hints[field.name]
        is_enum = isinstance(hint, type) and issubclass(hint, enum.Enum)
        rows.append(
            {
                "name": field.name,
                "type": _type_name(hint),
                "default": None if default is dataclasses.MISSING else _format_value(default),
                "required": default is dataclasses.MISSING,
                "choices": [str(member.value) for member in hint] if is_enum else [],
            }
        )
    return rows


# --- values ----------------------------------------------------------------------------------


def _split(text: str, whole: str) -> list[str]:
    """Split at top-level commas; quotes and nested brackets are respected."""
    items, depth, start, quote, escaped = [], 0, 0, "", False
    for i, c in enumerate(text):
        if escaped:
            escaped = False
        elif quote:
            escaped = c == "\\"
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
            if depth < 0:
                raise _syntax_error(whole, f"unexpected {c!r}")
        elif c == "," and depth == 0:
            items.append(text[start:i])
            start = i + 1
    if depth or quote:
        raise _syntax_error(whole, "brackets or quotes are not closed")
    items.append(text[start:])
    return [item for item in items if item.strip()]


def _syntax_error(text: str, why: str) -> PassOptionError:
    return PassOptionError(
        f"The recipe {text!r} can't be read",
        why=why,
        fix='write names separated by commas, options in braces: "cleanup,prune{ratio=0.5},int8"',
    )


def _parse_value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() == "none":
        return None
    if text[:1] in "[(" and text[-1:] in "])":
        return tuple(_parse_value(item.strip()) for item in _split(text[1:-1], text))
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a bare word is a string


def _format_value(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return _format_value(value.value)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ",".join(_format_value(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def _coerce(pass_name: str, option: str, value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        arms = typing.get_args(hint)
        if value is None and type(None) in arms:
            return None
        hint = next(arm for arm in arms if arm is not type(None))
        origin = typing.get_origin(hint)
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        items = value if isinstance(value, tuple) else (value,)
        return tuple(_coerce(pass_name, option, item, inner) for item in items)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            choices = ", ".join(str(member.value) for member in hint)
            raise _wrong(pass_name, option, value, f"one of: {choices}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(hint, type) and (
        not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)
    ):
        raise _wrong(pass_name, option, value, _type_name(hint))
    return value


def _wrong(pass_name: str, option: str, value: Any, wanted: str) -> PassOptionError:
    return PassOptionError(
        f"The option {option!r} of {pass_name!r} can't be {value!r}",
        where=f"recipe item {pass_name!r}",
        why=f"it takes {wanted}",
        fix=f"see `edgepass passes {pass_name}`",
    )


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
