"""The command line as a whole: letters that a terminal lacks, output that it does not take."""

import os
import sys
import traceback
from contextlib import suppress
from typing import Any

import typer

from server.cli.reporting import describe_error, print_error
from server.errors import FAILED, INTERRUPTED
from server.logs import spell_letters
from server.messages import redact, redact_tracebacks


class CommandLine(typer.Typer):
    """Runs a command to its exit code, whatever the terminal is like."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        spell_letters()
        redact_tracebacks()
        try:
            try:
                return super().__call__(*args, **kwargs)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except KeyboardInterrupt:  # before the command began, or at its end
            _drop_output()
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            _drop_output()  # the reader has gone, as `head` does
            sys.exit(FAILED)
        except OSError as error:
            _drop_output()
            with suppress(OSError):  # neither is there anybody to be told
                print_error(describe_error(error))
            sys.exit(FAILED)
        except Exception:  # a bug
            sys.stderr.write(redact(traceback.format_exc()))
            sys.exit(FAILED)


def _drop_output() -> None:
    """Let Python's own last flush succeed: what is left in its buffer goes nowhere."""
    if sys.__stdout__ is not None:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.__stdout__.fileno())
