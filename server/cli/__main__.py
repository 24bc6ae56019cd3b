"""The entry of the `losslab` command, also as `python -m server.cli`.

Ctrl-C ends it from its first moment on, without a traceback: until the command itself runs, there
is nothing to tidy up. So nothing slow is imported at the top.
"""

import os
import signal
from types import FrameType


def main() -> None:
    awaits_interrupt = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if awaits_interrupt:  # a shell lets commands in the background ignore it
        signal.signal(signal.SIGINT, _end_at_once)
    from server.cli.main import app  # noqa: PLC0415

    if awaits_interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app()


def _end_at_once(number: int, _frame: FrameType | None) -> None:
    # An exception could be taken for a failed import by what is being imported.
    os._exit(128 + number)


if __name__ == "__main__":
    main()
