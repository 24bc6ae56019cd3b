"""Live events of jobs: one database reader for all streams."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlalchemy import Engine, and_, or_
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session, col, select

from server.api.schemas import Event
from server.jobs.events import read_events, read_newest_events
from server.models.tables import TERMINAL_STATUSES, JobEvent

_POLL_SECONDS = 0.25
_RETRY_SECONDS = 1.0
#: Jobs in one statement; SQLite limits how deep a condition may nest.
_BATCH_SIZE = 200
_PAGE_SIZE = 500
_TAIL_LENGTH = 1000

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
        self.num_streams = 0

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
        self.num_streams += 1
        try:
            yield tail
        finally:
            tail.num_streams -= 1
            self.num_streams -= 1
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
