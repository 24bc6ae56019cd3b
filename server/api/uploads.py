"""The uploads that a server takes at the same time, and the space that they may fill."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Annotated, Final

import anyio
from fastapi import Depends, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from server.api.rates import find_client
from server.api.turns import Turns
from server.errors import StorageFullError, TooLargeError, UnavailableError
from server.files.imports import Fit
from server.files.inspection import CheckedUpload, CheckStoppedError, check_upload
from server.jobs.retention import describe_full
from server.settings import Settings

MAX_UPLOADS: Final = 32
#: Of one token, or of one address where no token is needed.
MAX_UPLOADS_OF_CLIENT: Final = 12
#: Seconds that a complete upload may wait until its turn to be checked comes.
MAX_WAIT_SECONDS: Final = 60.0
#: The bytes per second that must have come on average, after the first seconds.
MIN_BYTES_PER_SECOND, GRACE_SECONDS = 10_000, 30.0


@dataclass(slots=True, eq=False)
class Upload:
    """A body that arrives, and then waits to be checked."""

    client: str
    settings: Settings
    uploads: "Uploads"
    num_bytes: int = 0
    #: What is stored apart from uploads that have not ended.
    num_stored_bytes: int = 0
    _began_at: float = 0.0
    _is_displaced: bool = False
    #: Only while it arrives.
    _arrival: anyio.CancelScope | None = None

    @property
    def is_arriving(self) -> bool:
        return self._arrival is not None

    @property
    def bytes_per_second(self) -> float:
        """On average; one that has just begun is not judged by its first moments."""
        return self.num_bytes / (1 + anyio.current_time() - self._began_at)

    def check_size(self, num_bytes: int) -> None:
        """Raises TooLargeError and StorageFullError for so many bytes, which can never fit."""
        if num_bytes > self.settings.max_upload_bytes:
            limit = f"{self.settings.max_upload_bytes} bytes are allowed (LOSSLAB_MAX_UPLOAD_BYTES)"
            raise TooLargeError(f"the data set is too large; {limit}")
        limit_bytes = self.settings.max_storage_bytes
        if limit_bytes and num_bytes + self.num_stored_bytes > limit_bytes:
            raise StorageFullError(describe_full(self.settings))

    async def receive(self, chunks: AsyncIterator[bytes], *, file: IO[bytes]) -> None:
        """Write what arrives. A trickle would keep its place from others, so each byte earns time.

        Raises what `check_size` raises, UnavailableError if others need the space or the place, and
        HTTPException 408 if the bytes come too slowly.
        """
        self._began_at = anyio.current_time()
        try:
            with anyio.CancelScope() as self._arrival:
                self._allow_time(self._arrival)
                async for chunk in chunks:
                    self._write(chunk, file=file)
                    self._allow_time(self._arrival)
                return
        finally:
            self._arrival = None
        if self._is_displaced:
            raise UnavailableError(
                "others need the place of your slowest upload; nothing was stored, try again later"
            )
        detail = (
            f"the upload came too slowly: {self.num_bytes} bytes so far, and after "
            f"{GRACE_SECONDS:g} s at least {MIN_BYTES_PER_SECOND} per second are needed"
        )
        # If the connection stayed open, the rest of the body would be read as the next request.
        raise HTTPException(408, detail, headers={"Connection": "close"})

    def displace(self) -> None:
        """Give the place of an upload that arrives to another one."""
        assert self._arrival is not None
        self._is_displaced = True
        self._arrival.cancel()

    def _allow_time(self, arrival: anyio.CancelScope) -> None:
        arrival.deadline = self._began_at + GRACE_SECONDS + self.num_bytes / MIN_BYTES_PER_SECOND

    def _write(self, chunk: bytes, *, file: IO[bytes]) -> None:
        self.num_bytes += len(chunk)
        self.uploads.num_bytes += len(chunk)
        self.check_size(self.num_bytes)
        limit_bytes = self.settings.max_storage_bytes
        if limit_bytes and self.uploads.num_bytes + self.num_stored_bytes > limit_bytes:
            raise UnavailableError(
                "other uploads fill the rest of the bytes that may be stored "
                "(LOSSLAB_MAX_STORAGE_BYTES); nothing was stored, try again later"
            )
        file.write(chunk)


def _make_turns() -> Turns:
    return Turns(1, purpose="have their uploads checked", wait_seconds=MAX_WAIT_SECONDS)


@dataclass(slots=True, eq=False)
class Uploads:
    """Those of one server that have not ended."""

    num_bytes: int = 0
    _placed: list[Upload] = field(default_factory=list)
    _turns: Turns = field(default_factory=_make_turns)

    @contextmanager
    def enter(self, client: str, *, settings: Settings) -> Iterator[Upload]:
        """An upload of a client; it has a place, and its bytes count, until it has been stored or
        refused. Raises UnavailableError if there are too many."""
        num = self._count()
        if num[client] >= MAX_UPLOADS_OF_CLIENT:
            raise UnavailableError(
                f"{MAX_UPLOADS_OF_CLIENT} uploads of yours are going on; try again later"
            )
        if num.total() >= MAX_UPLOADS:
            self._displace_one_for(client)
        upload = Upload(client, settings, self)
        self._placed.append(upload)
        try:
            yield upload
        finally:
            self.num_bytes -= upload.num_bytes
            if upload in self._placed:
                self._placed.remove(upload)

    async def check(
        self, file: IO[bytes], *, request: Request, fit: Fit, shown_name: str
    ) -> CheckedUpload:
        """Check a complete upload when it is its turn, which goes round the clients that wait.

        Raises DatasetError and UnavailableError, and ClientDisconnect if the client has gone, whom
        nothing is checked for.
        """
        stop = threading.Event()
        with anyio.CancelScope() as scope:
            watch = asyncio.create_task(_stop_when_gone(request, stop=stop, scope=scope))
            try:
                async with self._turns.hold(find_client(request)):
                    return await run_in_threadpool(
                        check_upload, file, fit=fit, shown_name=shown_name, stop=stop
                    )
            except CheckStoppedError:
                raise ClientDisconnect from None
            finally:
                watch.cancel()
        raise ClientDisconnect

    def _displace_one_for(self, client: str) -> None:
        """Take the place of the slowest upload of whoever has most, and would still have as many as
        this client. Raises UnavailableError if there is none."""
        num = self._count()
        arriving = [
            each for each in self._placed if each.is_arriving and num[each.client] > num[client] + 1
        ]
        if not arriving:
            raise UnavailableError(f"{MAX_UPLOADS} uploads are going on; try again later")
        chosen = max(arriving, key=lambda each: (num[each.client], -each.bytes_per_second))
        self._placed.remove(chosen)
        chosen.displace()

    def _count(self) -> Counter[str]:
        return Counter(each.client for each in self._placed)


async def _stop_when_gone(
    request: Request, *, stop: threading.Event, scope: anyio.CancelScope
) -> None:
    """Wait until the client of a complete request has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    stop.set()
    scope.cancel()


def get_uploads(request: Request) -> Uploads:
    uploads: Uploads = request.app.state.uploads
    return uploads


UploadsDep = Annotated[Uploads, Depends(get_uploads)]
