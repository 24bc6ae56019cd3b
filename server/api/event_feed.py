"""Live events of jobs: one database reader for all streams."""

import asyncio
import json
import logging
import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi.sse import EventSourceResponse, format_sse_event
from sqlalchemy import Engine, and_, or_
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session, col, select
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from server.api.problems import RETRY_LATER, respond
from server.api.schemas import Event
from server.jobs.events import read_events, read_newest_events
from server.models.tables import TERMINAL_STATUSES, JobEvent

_POLL_SECONDS = 0.25
_RETRY_SECONDS = 1.0
#: Jobs in one statement; SQLite limits how deep a condition may nest.
_BATCH_SIZE = 200
_PAGE_SIZE = 500
_TAIL_LENGTH = 1000
_SHARE_OF_ONE_CLIENT = 3 / 4

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Tail:
    """The newest events of a watched job: all events with an id above `since`."""

    since: int
    last_kind: str | None
    events: deque[Event] = field(default_factory=deque)
    num_streams: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def last_id(self) -> int:
        return self.events[-1].id if self.events else self.since

    def append(self, event: Event) -> None:
        self.events.append(event)
        self.last_kind = event.kind
        if len(self.events) > _TAIL_LENGTH:
            self.since = self.events.popleft().id

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class EventFeed:
    """Reads the new events of all watched jobs together and passes them to the streams.

    `run` does the reading. No stream holds a transaction, nor a connection while it waits.
    """

    def __init__(self, engine: Engine, *, keep_alive_seconds: float = 15.0) -> None:
        self._engine = engine
        self._keep_alive_seconds = keep_alive_seconds
        self._tails: dict[str, _Tail] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_closed = False
        self._num_streams: Counter[str] = Counter()

    async def run(self) -> None:
        """Read until cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            positions = {job_id: tail.last_id for job_id, tail in self._tails.items()}
            if not positions:
                continue
            try:
                self._distribute(await asyncio.to_thread(self._read_new, positions))
            except SQLAlchemyError as error:
                _logger.warning("events cannot be read and will be tried again: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception:
                # If this loop ended, no stream would get another event.
                _logger.exception("events cannot be passed to their streams; trying again")
                await asyncio.sleep(_RETRY_SECONDS)

    @property
    def num_streams(self) -> int:
        """The streams that are open, of all clients."""
        return self._num_streams.total()

    @contextmanager
    def admit(self, client: str, *, max_streams: int) -> Iterator[bool]:
        """Count a stream of this client while the context is entered, if there is room for it.

        Gives False if there is none. A client gets at most three quarters of all. For the event
        loop alone, where nothing comes between the question and the count.
        """
        share = math.ceil(max_streams * _SHARE_OF_ONE_CLIENT)
        if self.num_streams >= max_streams or self._num_streams[client] >= share:
            yield False
            return
        self._num_streams[client] += 1
        try:
            yield True
        finally:
            self._num_streams[client] -= 1
            self._num_streams += Counter()  # forgets those that have none

    def close(self) -> None:
        """End all streams, so that the server can stop; clients reconnect and get the rest.

        May be called from any thread.
        """
        self.is_closed = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        for tail in self._tails.values():
            tail.wake()

    async def follow(self, job_id: str, *, after: int) -> AsyncIterator[Event | None]:
        """Yield the events after id `after`, oldest first, then new events as they are recorded.

        Yields None after `keep_alive_seconds` without an event. Ends when the job has ended.
        """
        first = await asyncio.to_thread(self._read_last, job_id)
        with self._watch(job_id, last=first) as tail:
            position = after
            while not self.is_closed:
                changed = tail.changed
                if position < tail.since:
                    events = await asyncio.to_thread(self._read_page, job_id, position)
                    position = position if events else tail.since
                else:
                    events = [event for event in tail.events if event.id > position]
                for event in events:
                    yield event
                    position = event.id
                if events or position < tail.last_id:
                    continue
                if tail.last_kind in TERMINAL_STATUSES:
                    return
                try:
                    await asyncio.wait_for(changed.wait(), self._keep_alive_seconds)
                except TimeoutError:
                    if await asyncio.to_thread(self._read_last, job_id) is None:
                        return  # deleted, with its events
                    yield None

    @contextmanager
    def _watch(self, job_id: str, *, last: JobEvent | None) -> Iterator[_Tail]:
        since, kind = (last.id or 0, last.kind) if last is not None else (0, None)
        tail = self._tails.setdefault(job_id, _Tail(since, kind))
        tail.num_streams += 1
        try:
            yield tail
        finally:
            tail.num_streams -= 1
            if not tail.num_streams:
                del self._tails[job_id]

    def _distribute(self, events: list[Event]) -> None:
        for event in events:
            tail = self._tails.get(event.job_id)
            if tail is not None and event.id > tail.last_id:
                tail.append(event)
        for job_id in {event.job_id for event in events} & self._tails.keys():
            self._tails[job_id].wake()

    def _read_new(self, positions: dict[str, int]) -> list[Event]:
        newer = [
            and_(col(JobEvent.job_id) == job_id, col(JobEvent.id) > last_id)
            for job_id, last_id in positions.items()
        ]
        events = []
        with Session(self._engine) as session:
            for start in range(0, len(newer), _BATCH_SIZE):
                rows = select(JobEvent).where(or_(*newer[start : start + _BATCH_SIZE]))
                events += [Event.of(row) for row in session.exec(rows.order_by(col(JobEvent.id)))]
        return events

    def _read_last(self, job_id: str) -> JobEvent | None:
        with Session(self._engine) as session:
            return next(iter(read_newest_events(session, job_id, limit=1)), None)

    def _read_page(self, job_id: str, after: int) -> list[Event]:
        with Session(self._engine) as session:
            events = read_events(session, job_id, after=after, limit=_PAGE_SIZE)
            return [Event.of(event) for event in events]


class EventStream(EventSourceResponse):
    """The live events of a job as server-sent events (WHATWG HTML, 9.2), or 429 if there is no room
    for one more stream.

    Whether there is room is decided when the answer begins, and the place is free again when it
    ends, however it does.
    """

    def __init__(
        self, feed: EventFeed, job_id: str, *, after: int, client: str, max_streams: int
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_encode_events(feed, job_id, after=after), headers=headers)
        self._feed, self._client, self._max_streams = feed, client, max_streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._feed.admit(self._client, max_streams=self._max_streams) as is_admitted:
            if is_admitted:
                await super().__call__(scope, receive, send)
                return
        detail = (
            f"no more live streams are open at once: {self._max_streams} of all clients, of which "
            "one gets three quarters (LOSSLAB_MAX_STREAMS); read pages instead, or try again later"
        )
        answer = respond(Request(scope), 429, detail, headers=RETRY_LATER)
        await answer(scope, receive, send)


async def _encode_events(feed: EventFeed, job_id: str, *, after: int) -> AsyncIterator[bytes]:
    """Comments keep the connection alive."""
    async for event in feed.follow(job_id, after=after):
        if event is None:
            yield format_sse_event(comment="ping")
        else:
            data = event.model_dump_json()
            yield format_sse_event(data_str=data, event=event.kind, id=str(event.id))
    if not feed.is_closed:
        yield format_sse_event(data_str=json.dumps({"job_id": job_id}), event="end")
