"""`python -m worker`."""

import gc
import os
import signal

# Ctrl-C while torch is imported ends the process without a traceback: it has claimed nothing yet.
signal.signal(signal.SIGINT, lambda number, _frame: os._exit(128 + number))
# Nothing that is imported is garbage: to look for it would take a tenth of the time.
gc.disable()
from worker.main import main  # noqa: E402

gc.freeze()
gc.enable()
main()
