"""The command line, `edgepass compile | estimate | run | targets | passes | show | ...`.

Here: `main`. The commands are in `build` (compile, estimate, run) and `look` (what only reads),
their options' text forms in `arguments`, output and errors in `console`. Nothing heavy is imported
before a command runs: `--help` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

INTERRUPTED = 130
UNEXPECTED = 70


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 is success, 2 a wrong call, 130 Ctrl-C, 70 a bug in edgepass; every `EdgepassError` has its
    own (`errors.py`, docs/cli.md).
    """
    import typer

    from ..errors import EdgepassError
    from . import console

    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        from .app import app

        code = app(given, standalone_mode=False, prog_name="edgepass")
        if code == INTERRUPTED:  # some versions of typer turn Ctrl-C into this code themselves
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except EdgepassError as error:
        console.show_error(error.diagnostic, as_json)
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        console.say(console.interruption())
        return INTERRUPTED
    except BrokenPipeError:  # the reader (`head`) has seen enough
        console.mute_stdout()
        return 0
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "format_message"):  # click's usage errors
            return console.show_usage_error(error, as_json)
        return console.show_unexpected(error, as_json, UNEXPECTED)
