"""What the command line prints: results to stdout, everything else to stderr.

Here: tables or JSON, errors, progress. Colours and progress bars only on a terminal.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import Diagnostic


def print_json(data: Any) -> None:
    """One JSON document on stdout. NaN and infinity, which JSON lacks, become null."""
    sys.stdout.write(json_text(data))
    sys.stdout.flush()


def json_text(data: Any) -> str:
    """The document that `print_json` prints."""
    return json.dumps(_plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple | set | frozenset):
        return [_plain(value) for value in data]
    if isinstance(data, float):
        return data if abs(data) < float("inf") else None
    if data is None or isinstance(data, bool | int | str):
        return data
    if hasattr(data, "item"):  # a numpy scalar
        return _plain(data.item())
    return str(data)


def show(*things: Any) -> None:
    """Tables and text on stdout: rich on a terminal, plain text of full width elsewhere."""
    from rich.console import Console

    # A file or a pipe has no width: do not fold its lines.
    console = Console() if sys.stdout.isatty() else Console(width=200, color_system=None)
    for thing in things:
        if isinstance(thing, str):
            console.print(thing, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(thing)


def say(text: str) -> None:
    """A remark for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def show_error(diagnostic: Diagnostic, as_json: bool) -> None:
    """What, where, why and fix on stderr; with `--json` also `{"error": ...}` on stdout."""
    if as_json:
        print_json({"error": diagnostic.as_dict()})
    if not sys.stderr.isatty():
        say(f"error: {diagnostic}")
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    body = Text(diagnostic.what, style="bold")
    for label in ("where", "why", "fix"):
        if text := getattr(diagnostic, label):
            body.append(f"\n{label:>5}  ", style="cyan")
            body.append(text, style="not bold")
    Console(stderr=True).print(
        Panel(body, title=diagnostic.code, title_align="left", border_style="red")
    )


def show_usage_error(error: Any, as_json: bool) -> int:
    """A wrong flag or a missing argument, as typer found it; returns its exit code."""
    if as_json:
        print_json({"error": Diagnostic(code="usage", what=error.format_message()).as_dict()})
    error.show()
    return int(error.exit_code)


def show_unexpected(error: Exception, as_json: bool, code: int) -> int:
    """A bug: a short message and how to report it; the traceback with EDGEPASS_DEBUG=1."""
    if os.environ.get("EDGEPASS_DEBUG"):
        traceback.print_exc()
    first = (str(error).strip().splitlines() or [""])[0]
    diagnostic = Diagnostic(
        code="internal",
        what="edgepass failed in a way it did not expect",
        why=f"{type(error).__name__}: {first}",
        fix="run it again with EDGEPASS_DEBUG=1 for the traceback, and report that as a bug, with "
        "the command line and the model, or `edgepass show` of it",
    )
    show_error(diagnostic, as_json)
    return code


_NOTHING_CHANGED = "interrupted; nothing was changed"
_on_interrupt = _NOTHING_CHANGED


@contextlib.contextmanager
def told_on_interrupt(text: str) -> Iterator[None]:
    """What `interruption` says where Ctrl-C ends what is inside."""
    global _on_interrupt
    _on_interrupt = text
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException:
        _on_interrupt = _NOTHING_CHANGED
        raise
    _on_interrupt = _NOTHING_CHANGED


def interruption() -> str:
    """What to say after Ctrl-C."""
    global _on_interrupt
    text, _on_interrupt = _on_interrupt, _NOTHING_CHANGED
    return text


def mute_stdout() -> None:
    """After a broken pipe: what Python flushes at exit goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def progress() -> Iterator[Callable[[int, int, str], None] | None]:
    """A callback (done, total, what) that draws a bar on stderr; None when not on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield update
