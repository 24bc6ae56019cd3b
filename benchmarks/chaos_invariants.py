"""What must be true after `benchmarks.chaos`, one function each."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Engine
from sqlmodel import Session, col, select

from benchmarks.chaos_client import Client
from server.files.artifacts import JobFiles
from server.files.hashes import compute_sha256
from server.jobs.orphans import OrphanSweep
from server.jobs.records import list_named
from server.models.epochs import EpochMetrics
from server.models.tables import (
    TERMINAL_STATUSES,
    Artifact,
    ArtifactKind,
    EventKind,
    Job,
    JobEvent,
    JobStatus,
)

if TYPE_CHECKING:
    from benchmarks.chaos import Lab

#: How long after an outage the server may still say that there is one.
_GRACE_SECONDS: Final = 10.0
#: What differs from run to run.
_MEASURED: Final = {"job_id", "attempt", "recorded_at", "seconds", "grids_per_second"}
_LOST: Final = re.compile(r"worker \S+?/(\d+)/\w+ sent no heartbeat")
_STARTED: Final = re.compile(r"attempt (\d+) started")

#: The problems, and to how much the check applied.
Finding = tuple[list[str], str]


@dataclass(frozen=True)
class Evidence:
    """What is left of a run."""

    engine: Engine
    lab: "Lab"
    client: Client
    references: Mapping[str, str]
    faults: Counter[str]

    def files(self, job: Job) -> JobFiles:
        return JobFiles(self.lab.settings.runs_dir, job.id)

    def read_jobs(self) -> Iterator[tuple[Session, Job]]:
        with Session(self.engine) as session:
            for job in session.exec(select(Job).order_by(col(Job.created_at))):
                yield session, job

    def read_numbers(self, session: Session, job_id: str) -> list[dict[str, Any]]:
        rows = select(EpochMetrics).where(EpochMetrics.job_id == job_id)
        return [
            row.model_dump(exclude=_MEASURED)
            for row in session.exec(rows.order_by(col(EpochMetrics.epoch)))
        ]

    def read_events(self, session: Session, job_id: str) -> list[JobEvent]:
        rows = select(JobEvent).where(JobEvent.job_id == job_id)
        return list(session.exec(rows.order_by(col(JobEvent.id))))


def check_ends(evidence: Evidence) -> Finding:
    posted = {job.job_id: job for job in evidence.client.jobs}
    problems, ends = [], Counter[str]()
    found = set()
    for _, job in evidence.read_jobs():
        found.add(job.id)
        ends[job.status] += 1
        known = posted.get(job.id)
        may_end = {JobStatus.succeeded}
        if known is not None and known.is_cancelled:
            may_end.add(JobStatus.cancelled)
        if job.status not in may_end:
            problems.append(f"job {job.id} is {job.status}: {job.error_message}")
    problems += [f"job {job_id} was accepted and is gone" for job_id in posted.keys() - found]
    return problems, ", ".join(f"{count} {status}" for status, count in ends.items())


def check_numbers(evidence: Evidence) -> Finding:
    names = {job.job_id: job.name for job in evidence.client.jobs}
    problems, num_checked = [], 0
    for session, job in evidence.read_jobs():
        if job.status is JobStatus.succeeded and job.id in names:
            num_checked += 1
            expected = evidence.read_numbers(session, evidence.references[names[job.id]])
            if evidence.read_numbers(session, job.id) != expected:
                problems.append(f"job {job.id} has other numbers after {job.attempt} attempts")
    return problems, f"{num_checked} jobs"


def check_keys(evidence: Evidence) -> Finding:
    num_jobs = sum(1 for _ in evidence.read_jobs())
    num_keys = evidence.client.num_keys
    problems = [f"{num_keys} keys made {num_jobs} jobs"] if num_jobs != num_keys else []
    return problems, f"{num_keys} keys"


def check_losses(evidence: Evidence) -> Finding:
    problems, num_losses = [], 0
    for session, job in evidence.read_jobs():
        for event in evidence.read_events(session, job.id):
            for pid in map(int, _LOST.findall(event.message)):
                num_losses += 1
                if not evidence.lab.may_have_lost(pid):
                    problems.append(f"job {job.id} was taken from a living worker: {event.message}")
    return problems, f"{num_losses} losses"


def check_events(evidence: Evidence) -> Finding:
    problems, num_events = [], 0
    for session, job in evidence.read_jobs():
        events = evidence.read_events(session, job.id)
        num_events += len(events)
        problems += [f"job {job.id}: {fault}" for fault in _find_disorder(events, job=job)]
    return problems, f"{num_events} events"


def _find_disorder(events: list[JobEvent], *, job: Job) -> Iterator[str]:
    starts = [int(n) for event in events for n in _STARTED.findall(event.message)]
    if starts != list(range(1, job.attempt + 1)):
        yield f"its attempts are {starts}"
    status = ""
    for event in events:
        if event.kind in set(JobStatus):
            if status in TERMINAL_STATUSES:
                yield f"{event.kind} after {status}"
            if event.kind == EventKind.running and status != JobStatus.queued:
                yield f"running after {status}"
            status = event.kind
        elif event.kind == EventKind.epoch and status != JobStatus.running:
            yield f"an epoch while it was {status}"
    if status != job.status:
        yield f"its last event is {status}, and it is {job.status}"


def check_epochs(evidence: Evidence) -> Finding:
    problems, num_epochs = [], 0
    for session, job in evidence.read_jobs():
        epochs = [row["epoch"] for row in evidence.read_numbers(session, job.id)]
        num_epochs += len(epochs)
        if epochs != list(range(1, len(epochs) + 1)):
            problems.append(f"job {job.id} has epochs {epochs}")
    return problems, f"{num_epochs} epochs"


def check_files(evidence: Evidence) -> Finding:
    problems, num_files = [], 0
    for session, job in evidence.read_jobs():
        for row in session.exec(select(Artifact).where(Artifact.job_id == job.id)):
            if (job.id, row.file_name) in evidence.lab.touched:
                continue
            num_files += 1
            path = evidence.files(job).checkpoints_dir / row.file_name
            if not path.is_file():
                problems.append(f"{row.file_name} of job {job.id} is not there")
            elif compute_sha256(path) != row.sha256:
                problems.append(f"{row.file_name} of job {job.id} has another hash")
    return problems, f"{num_files} files"


def check_pictures(evidence: Evidence) -> Finding:
    problems, num_pictures = [], 0
    for session, job in evidence.read_jobs():
        if job.status is JobStatus.succeeded:
            rows = session.exec(select(Artifact).where(Artifact.job_id == job.id)).all()
            checkpoints = {row.epoch for row in rows if row.kind is ArtifactKind.checkpoint}
            pictures = {row.epoch for row in rows if row.kind is ArtifactKind.reconstruction}
            num_pictures += len(pictures)
            # One whose checkpoint was touched as well cannot be drawn again.
            kind = "checkpoint_epoch_{}.safetensors"
            lost = {e for e in checkpoints if (job.id, kind.format(e)) in evidence.lab.touched}
            if missing := checkpoints - pictures - lost:
                problems.append(f"job {job.id} has no picture of epochs {sorted(missing)}")
    return problems, f"{num_pictures} pictures"


def check_orphans(evidence: Evidence) -> Finding:
    """After the sweep, for which all files are made old."""
    num_files = 0
    for path in evidence.lab.settings.runs_dir.glob("*/checkpoints/*"):
        os.utime(path, (0, 0))
    sweep = OrphanSweep(evidence.engine, evidence.lab.settings)
    num_removed = sweep.run() + sweep.run()
    problems = []
    for session, job in evidence.read_jobs():
        found = evidence.files(job).list_found()
        num_files += len(found)
        for name in found.keys() - list_named(session, job):
            problems.append(f"nothing names {name} of job {job.id}")
    return problems, f"{num_files} files, {num_removed} swept"


def check_answers(evidence: Evidence) -> Finding:
    answers, outages = evidence.client.answers, evidence.lab.outages
    problems = []
    for answer in answers:
        is_outage = any(begin <= answer.at <= end + _GRACE_SECONDS for begin, end in outages)
        if answer.status >= 500 and not (answer.status == 503 and is_outage):
            problems.append(f"{answer.method} {answer.path} was answered {answer.status}")
    counts = Counter(answer.status for answer in answers)
    return problems, ", ".join(f"{count} x {status}" for status, count in sorted(counts.items()))


def list_invariants() -> list[tuple[str, Callable[[Evidence], Finding]]]:
    return [
        ("every accepted job ended as it was asked to", check_ends),
        ("the numbers are those of a run without faults", check_numbers),
        ("a key makes one job, however often it is sent", check_keys),
        ("no living worker lost its job", check_losses),
        ("events are in order", check_events),
        ("epochs are complete", check_epochs),
        ("what a row names is there and verifies", check_files),
        ("every kept epoch has its picture", check_pictures),
        ("no file is left that nothing names", check_orphans),
        ("no answer is an error of the server, but for 503 in an outage", check_answers),
    ]
