"""Reading files of users from a server: by a process of its own with little memory, one at a time.

What was found is kept, so that an unchanged file is read only once.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from server.errors import UnavailableError
from server.files.checking import unpack_contents
from server.files.datasets import (
    DatasetContents,
    DatasetExistsError,
    add_upload,
    find_npz,
    seal_upload,
)
from server.files.hashes import FileVersion, find_sha256, read_version
from server.files.imports import Fit
from server.files.npz import DatasetError
from server.models.configuration import BuiltInDataset

#: Memory that the check of a file may take: enough for JSON of ARC tasks of the allowed size.
MAX_CHECK_BYTES: Final = 384 * 2**20
#: Seconds that it may take, and that another one may wait for its turn.
MAX_CHECK_SECONDS, MAX_WAIT_SECONDS = 180.0, 20.0
#: Seconds that the check of an upload may take, and of these on the processor: others wait for it.
#: One of the largest that are taken needs about six of them.
MAX_UPLOAD_SECONDS, MAX_UPLOAD_PROCESSOR_SECONDS = 60.0, 20
#: Requests that may wait. Each has one of the server's threads, of which there are forty.
MAX_WAITING: Final = 8

#: -P keeps the working directory out of the search path, as for a worker.
_COMMAND: Final = (sys.executable, "-P", "-m", "server.files.checking")
#: Threads and arenas reserve memory that they do not use.
_FRUGAL: Final = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
_MAX_KNOWN: Final = 128
#: How often a check looks whether somebody still waits for it.
_LOOK_SECONDS: Final = 0.2

Json = dict[str, Any]
_logger = logging.getLogger(__name__)


class CheckLimitError(DatasetError):
    """To read a file takes more memory or time than it may."""


class CheckStoppedError(UnavailableError):
    """Nobody waits for the check any more."""


class CheckedUpload(NamedTuple):
    """An upload that is a valid `.npz` now."""

    contents: DatasetContents
    note: str | None  #: what was done to it, if anything was


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found in a file, as it was then."""

    version: FileVersion
    contents: DatasetContents | None = None
    fault: str = ""  #: why it cannot be used


class _Checks:
    """The turn to check a file, and what was found."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._places = threading.BoundedSemaphore(MAX_WAITING + 1)
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[Path, _Known] = {}

    @contextmanager
    def take_turn(self) -> Iterator[None]:
        """Raises UnavailableError if too many wait, or for too long."""
        message = "other files are being checked; try again later"
        if not self._places.acquire(blocking=False):
            raise UnavailableError(f"{MAX_WAITING} requests wait while {message}")
        try:
            if not self._turn.acquire(timeout=MAX_WAIT_SECONDS):
                raise UnavailableError(f"after {MAX_WAIT_SECONDS:g} s {message}")
            try:
                yield
            finally:
                self._turn.release()
        finally:
            self._places.release()

    def run_upload(self, task: Json, *, name: str, stop: threading.Event | None = None) -> Json:
        """The answer about an upload. Raises DatasetError and CheckStoppedError."""
        return self.run(
            task,
            name=name,
            stop=stop or threading.Event(),
            max_seconds=MAX_UPLOAD_SECONDS,
            max_processor_seconds=MAX_UPLOAD_PROCESSOR_SECONDS,
        )

    def run(
        self,
        task: Json,
        *,
        name: str,
        stop: threading.Event,
        max_seconds: float,
        max_processor_seconds: int,
    ) -> Json:
        """The answer of `server.files.checking`, which `stop` ends. Raises DatasetError and
        CheckStoppedError."""
        # The child ends once nobody holds the other end of its standard input.
        child_end, own_end = os.pipe()
        try:
            limits = {
                "max_bytes": MAX_CHECK_BYTES,
                "max_processor_seconds": max_processor_seconds,
            }
            given = json.dumps({**task, **limits})
            self._process = subprocess.Popen(
                [*_COMMAND, given],
                env=os.environ | _FRUGAL,
                stdin=child_end,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            with self._process as process:
                try:
                    output, errors = _communicate(process, seconds=max_seconds, stop=stop)
                except BaseException as error:
                    process.kill()
                    if isinstance(error, subprocess.TimeoutExpired):
                        raise CheckLimitError(
                            f"{name}: to check it takes longer than {max_seconds:g} s"
                        ) from None
                    raise
        finally:
            self._process = None
            os.close(child_end)
            os.close(own_end)
        if process.returncode == -signal.SIGXCPU:
            raise CheckLimitError(
                f"{name}: to check it takes longer than {max_processor_seconds} s of the "
                "processor; send fewer grids, or send them as an .npz of uint8"
            )
        return _read_answer(output, errors, code=process.returncode, name=name)

    def end(self) -> None:
        """End the check that runs, if one does."""
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()

    def find(self, path: Path) -> _Known | None:
        """What is known of a file as it is now. Raises FileNotFoundError, and DatasetError for one
        that is known to be none."""
        known = self._known.get(path)
        if known is None or known.version != read_version(path):
            return None
        if known.fault:
            raise DatasetError(known.fault)
        return known

    def inspect(self, path: Path, *, task: str) -> DatasetContents | None:
        """What a task finds in a stored file, which is kept, and so is a fault. Raises
        DatasetError."""
        version = read_version(path)
        try:
            answer = self.run(
                {"do": task, "path": str(path)},
                name=path.name,
                stop=threading.Event(),
                max_seconds=MAX_CHECK_SECONDS,
                max_processor_seconds=int(MAX_CHECK_SECONDS) + 1,
            )
        except CheckLimitError:
            raise  # on a machine that does less, it may be within the limits
        except DatasetError as error:
            self.keep(path, _Known(version, fault=str(error)))
            raise
        contents = unpack_contents(answer["contents"]) if "contents" in answer else None
        self.keep(path, _Known(version, contents))
        return contents

    def keep(self, path: Path, known: _Known) -> None:
        self._known.pop(path, None)
        self._known[path] = known
        for oldest in list(self._known)[:-_MAX_KNOWN]:
            self._known.pop(oldest, None)


_checks = _Checks()


def check_dataset(name: str, *, datasets_dir: Path) -> str | None:
    """The SHA-256 of an uploaded data set's file; None for a built-in one.

    Raises DatasetError unless `name` is built in or a valid file, and UnavailableError.
    """
    if name in set(BuiltInDataset):
        return None
    path = find_npz(name, datasets_dir=datasets_dir)
    if _checks.find(path) is None:
        with _checks.take_turn():
            if _checks.find(path) is None:
                _checks.inspect(path, task="check")
    return find_sha256(path)


def read_contents(name: str, *, datasets_dir: Path) -> DatasetContents:
    """The contents of an uploaded data set. Raises DatasetError and UnavailableError."""
    path = find_npz(name, datasets_dir=datasets_dir)
    if contents := _find_contents(path):
        return contents
    with _checks.take_turn():
        if contents := _find_contents(path):
            return contents
        contents = _checks.inspect(path, task="describe")
        assert contents is not None
        return contents


def check_upload(
    file: IO[bytes], *, fit: Fit, shown_name: str, stop: threading.Event | None = None
) -> CheckedUpload:
    """Read a temporary file, and rewrite it as an `.npz` unless it is one already and stays as it
    is. Raises DatasetError, UnavailableError, and CheckStoppedError once `stop` is set."""
    file.flush()
    task: Json = {"do": "convert", "path": file.name, "shown_name": shown_name}
    with _checks.take_turn():
        task |= {"pad": fit.pad, "crop": fit.crop}
        answer = _checks.run_upload(task, name=shown_name, stop=stop)
    return CheckedUpload(unpack_contents(answer["contents"]), answer["note"])


def admit_upload(
    file: IO[bytes],
    checked: CheckedUpload,
    *,
    name: str,
    datasets_dir: Path,
    turn: AbstractContextManager[None] | None = None,
) -> bool:
    """Store a checked upload as `name.npz`, while `turn` is entered, which may refuse it; returns
    False if the same grids are already stored.

    Raises DatasetExistsError if another data set has the name, and what `turn` raises.
    """
    seal_upload(file)
    path = datasets_dir / f"{name}.npz"
    try:
        if os.path.lexists(path):
            raise FileExistsError(path)
        with turn or nullcontext():
            add_upload(file, path)
    except FileExistsError:
        if path.is_file() and _have_same_content(Path(file.name), path):
            return False
        message = f"there is another data set {name!r}; delete it first, or use another name"
        raise DatasetExistsError(message) from None
    # Its other name would go soon, and a change of a file's names is a change of the file.
    Path(file.name).unlink(missing_ok=True)
    _checks.keep(path, _Known(read_version(path), checked.contents))
    return True


def end_checks() -> None:
    """End what still runs when the server stops."""
    _checks.end()


def _find_contents(path: Path) -> DatasetContents | None:
    known = _checks.find(path)
    return None if known is None else known.contents


def _have_same_content(upload_path: Path, path: Path) -> bool:
    task = {"do": "compare", "path": str(upload_path), "other": str(path)}
    with _checks.take_turn():
        is_same: bool = _checks.run_upload(task, name=path.name)["is_same"]
    return is_same


def _communicate(
    process: subprocess.Popen[bytes], *, seconds: float, stop: threading.Event
) -> tuple[bytes, bytes]:
    """What a process wrote. Raises TimeoutExpired and CheckStoppedError; it goes on then."""
    ends_at = time.monotonic() + seconds
    while True:
        if stop.is_set():
            raise CheckStoppedError("nobody waits for the check any more; nothing was stored")
        left = max(0.0, ends_at - time.monotonic())
        try:
            return process.communicate(timeout=min(left, _LOOK_SECONDS))
        except subprocess.TimeoutExpired:
            if left <= _LOOK_SECONDS:
                raise


def _read_answer(output: bytes, errors: bytes, *, code: int, name: str) -> Json:
    if code == 0:
        answer: Json = json.loads(output)
        if message := answer.get("error"):
            raise DatasetError(message)
        if not answer.get("is_out_of_memory"):
            return answer
    elif code > 0:
        raise RuntimeError(f"the check of {name} failed: {errors.decode(errors='replace')[-2000:]}")
    # By a signal: the system ends what takes too much memory as well.
    _logger.warning("the check of %s ended for its memory (exit code %d)", name, code)
    raise CheckLimitError(
        f"{name}: to check it takes more than {MAX_CHECK_BYTES // 2**20} MiB of memory; send fewer "
        "grids, or send them as an .npz of uint8"
    )
