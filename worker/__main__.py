"""`python -m worker`."""

import gc

# Nothing that is imported is garbage: to look for it would take a tenth of the time.
gc.disable()
from worker.main import main  # noqa: E402

gc.freeze()
gc.enable()
main()
