"""The process that reads a file of a user: `python -P -m server.files.checking TASK`.

How much memory a file takes is known only once it is read. So it is read by a process of its own,
which sets itself limits of memory and time, and which ends with the process that started it.
`server.files.inspection` starts it.
"""

import base64
import ctypes
import json
import os
import resource
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from server.files.datasets import DatasetContents, have_same_content
from server.files.imports import Fit, convert_upload, open_grids
from server.files.npz import MAX_DATASET_BYTES, MAX_UNPACKED_BYTES, DatasetError
from server.files.orbits import Overlap

Json = dict[str, Any]

#: Others on this machine, such as the server and its workers, go first.
_NICENESS: Final = 5
_STATM: Final = Path("/proc/self/statm")
#: Of <linux/prctl.h>.
_PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """Carry out the task of the command line; the answer is one JSON object."""
    task = json.loads(sys.argv[1])
    os.nice(_NICENESS)
    end_with_parent()
    limit_memory(task["max_bytes"])
    limit_time(task["max_processor_seconds"])
    try:
        answer = run_task(task)
    except DatasetError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"is_out_of_memory": True}
    sys.stdout.write(json.dumps(answer))


def run_task(task: Json) -> Json:
    """What `task["do"]` says with a file. Raises DatasetError and MemoryError."""
    path = Path(task["path"])
    match task["do"]:
        case "check":
            with open_grids(path) as packed:
                packed.check()
            return {}
        case "describe":
            return {"contents": _describe(path, name=path.name, max_bytes=MAX_DATASET_BYTES)}
        case "convert":
            name = task["shown_name"]
            with path.open("rb+") as file:
                note = convert_upload(file, fit=Fit(task["pad"], task["crop"]), shown_name=name)
            contents = _describe(path, name=name, max_bytes=MAX_UNPACKED_BYTES)
            return {"note": note, "contents": contents}
        case "compare":
            return {"is_same": have_same_content(path, Path(task["other"]))}
    raise AssertionError(task["do"])


def _describe(path: Path, *, name: str, max_bytes: int) -> Json:
    with open_grids(path, shown_name=name, max_bytes=max_bytes) as packed:
        return pack_contents(DatasetContents.of(packed))


def pack_contents(contents: DatasetContents) -> Json:
    """The contents of a data set as JSON."""
    return {
        "num_grids": contents.num_grids,
        "grid_size": contents.grid_size,
        "colour_counts": contents.colour_counts,
        "overlap": contents.overlap,
        "sample": base64.b64encode(contents.sample.tobytes()).decode(),
    }


def unpack_contents(packed: Json) -> DatasetContents:
    """The opposite of `pack_contents`."""
    size = packed["grid_size"]
    cells = np.frombuffer(base64.b64decode(packed["sample"]), dtype=np.uint8)
    overlap = {key: Overlap(*each) for key, each in packed["overlap"].items()}
    return DatasetContents(
        **{**packed, "overlap": overlap, "sample": cells.reshape(-1, size, size)}
    )


def limit_memory(max_bytes: int) -> None:
    """Let this process have so many bytes more than it has now. Systems that know no such limit, or
    do not say what a process has, go on without."""
    try:
        num_pages = int(_STATM.read_text().split()[0])
    except OSError:
        return
    limit = num_pages * resource.getpagesize() + max_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def limit_time(max_seconds: int) -> None:
    """Let this process have so many seconds of the processor; then SIGXCPU ends it."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = max_seconds if hard == resource.RLIM_INFINITY else min(max_seconds, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def end_with_parent() -> None:
    """End with the process that started this one, however it ends.

    Linux sends a signal when the thread that started this process ends, which waits for it. Others
    only close the other end of the standard input. To read that takes the lock of the interpreter,
    which one call may hold for seconds.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_wait_for_end_of_parent, daemon=True).start()


def _wait_for_end_of_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    main()
