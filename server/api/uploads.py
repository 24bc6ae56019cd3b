"""The uploads that a server takes at the same time, and the space that they may fill."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Annotated, Final

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool

from server.errors import StorageFullError, TooLargeError, UnavailableError
from server.files.imports import Fit
from server.files.inspection import CheckedUpload, check_upload
from server.jobs.retention import describe_full
from server.settings import Settings

MAX_UPLOADS: Final = 32
#: Of one token, or of one address where no token is needed.
MAX_UPLOADS_OF_CLIENT: Final = 12
#: Seconds that a complete upload may wait until those before it are checked.
MAX_WAIT_SECONDS: Final = 60.0


@dataclass(slots=True, eq=False)
class Upload:
    """A body that arrives."""

    file: IO[bytes]
    settings: Settings
    uploads: "Uploads"
    num_bytes: int = 0
    #: What is stored apart from uploads that have not ended.
    num_stored_bytes: int = 0

    def check_size(self, num_bytes: int) -> None:
        """Raises TooLargeError and StorageFullError for so many bytes, which can never fit."""
        if num_bytes > self.settings.max_upload_bytes:
            limit = f"{self.settings.max_upload_bytes} bytes are allowed (LOSSLAB_MAX_UPLOAD_BYTES)"
            raise TooLargeError(f"the data set is too large; {limit}")
        limit_bytes = self.settings.max_storage_bytes
        if limit_bytes and num_bytes + self.num_stored_bytes > limit_bytes:
            raise StorageFullError(describe_full(self.settings))

    def write(self, chunk: bytes) -> None:
        """Raises what `check_size` raises, and UnavailableError if it would fit alone."""
        self.num_bytes += len(chunk)
        self.uploads.num_bytes += len(chunk)
        self.check_size(self.num_bytes)
        limit_bytes = self.settings.max_storage_bytes
        if limit_bytes and self.uploads.num_bytes + self.num_stored_bytes > limit_bytes:
            raise UnavailableError(
                "other uploads fill the rest of the bytes that may be stored "
                "(LOSSLAB_MAX_STORAGE_BYTES); nothing was stored, try again later"
            )
        self.file.write(chunk)


@dataclass(slots=True, eq=False)
class Uploads:
    """Those of one server that have not ended."""

    num_bytes: int = 0
    _num_of_clients: Counter[str] = field(default_factory=Counter)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @contextmanager
    def enter(self, client: str) -> Iterator[None]:
        """Count an upload of a client. Raises UnavailableError if there are too many."""
        if self._num_of_clients.total() >= MAX_UPLOADS:
            raise UnavailableError(f"{MAX_UPLOADS} uploads are going on; try again later")
        if self._num_of_clients[client] >= MAX_UPLOADS_OF_CLIENT:
            raise UnavailableError(
                f"{MAX_UPLOADS_OF_CLIENT} uploads of yours are going on; try again later"
            )
        self._num_of_clients[client] += 1
        try:
            yield
        finally:
            self._num_of_clients[client] -= 1
            if not self._num_of_clients[client]:
                del self._num_of_clients[client]

    @contextmanager
    def receive(
        self, file: IO[bytes], *, settings: Settings, num_stored_bytes: int
    ) -> Iterator[Upload]:
        """A body that arrives; its bytes count until it has been stored or refused."""
        upload = Upload(file, settings, self, num_stored_bytes=num_stored_bytes)
        try:
            yield upload
        finally:
            self.num_bytes -= upload.num_bytes

    async def check(self, file: IO[bytes], *, fit: Fit, shown_name: str) -> CheckedUpload:
        """Check a complete upload when it is its turn. Raises DatasetError and UnavailableError."""
        try:
            async with asyncio.timeout(MAX_WAIT_SECONDS):
                await self._turn.acquire()
        except TimeoutError:
            raise UnavailableError(
                f"other uploads were checked for {MAX_WAIT_SECONDS:g} s; nothing was stored, try "
                "again later"
            ) from None
        try:
            return await run_in_threadpool(check_upload, file, fit=fit, shown_name=shown_name)
        finally:
            self._turn.release()


def get_uploads(request: Request) -> Uploads:
    uploads: Uploads = request.app.state.uploads
    return uploads


UploadsDep = Annotated[Uploads, Depends(get_uploads)]
