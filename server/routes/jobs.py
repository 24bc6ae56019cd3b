"""Jobs: post one, follow it, look at its pictures, stop it."""

import json
import re
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Annotated

from fastapi import APIRouter, Header, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.sse import EventSourceResponse, format_sse_event
from sqlmodel import Session, col, select, tuple_

from server import job_queue
from server.artifacts import JobFiles
from server.criteria import Thresholds, Verdict, judge
from server.datasets import check_dataset
from server.dependencies import (
    EngineDep,
    EventFeedDep,
    JobDep,
    JobFilesDep,
    SessionDep,
    SettingsDep,
    find_job,
    read_epochs,
)
from server.event_feed import EventFeed, read_events
from server.models import Artifact, ArtifactKind, Job, JobStatus, Option
from server.problems import PROBLEM_RESPONSES
from server.schemas import (
    Checkpoint,
    CheckpointList,
    EventList,
    JobList,
    JobPublic,
    JobRequest,
    MetricsList,
    Reconstruction,
    ReconstructionList,
    ResumeRequest,
)

MAX_PAGE_SIZE = 100
MAX_LOG_LINES = 10_000
MAX_EVENTS = 1000
MAX_ID = 2**31 - 1
_STREAM_RESPONSE = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
_METADATA_PARAMETER = re.compile(r"metadata\[(.{1,64})\]")

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=PROBLEM_RESPONSES)


@router.post("", status_code=201, responses={429: PROBLEM_RESPONSES[409]})
def create_job(
    request: JobRequest, *, response: Response, engine: EngineDep, settings: SettingsDep
) -> JobPublic:
    """Queue a job. It is committed before the answer, which has its whole configuration."""
    config = request.resolve_config()
    check_dataset(config.dataset, datasets_dir=settings.datasets_dir)
    job = job_queue.submit(
        engine,
        option=request.option,
        config=config,
        quick_test=request.quick_test,
        name=request.name,
        labels=request.metadata,
        priority=request.priority,
        max_queued_jobs=settings.max_queued_jobs,
    )
    response.headers["Location"] = f"/jobs/{job.id}"
    return JobPublic.of(job)


@router.get("")
def list_jobs(
    request: Request,
    session: SessionDep,
    *,
    status: Annotated[list[JobStatus] | None, Query()] = None,
    option: Option | None = None,
    name: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = 20,
    after: Annotated[str | None, Query(description="the last id of the page before")] = None,
) -> JobList:
    """Newest first. `metadata[key]=value` keeps jobs with that label."""
    labels = {
        match[1]: value
        for parameter, value in request.query_params.multi_items()
        if (match := _METADATA_PARAMETER.fullmatch(parameter))
    }
    jobs, has_more = find_jobs(
        session, status=status, option=option, name=name, labels=labels, limit=limit, after=after
    )
    return JobList(data=[JobPublic.of(job) for job in jobs], has_more=has_more)


def find_jobs(
    session: Session,
    *,
    status: Collection[JobStatus] | None = None,
    option: Option | None = None,
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
    limit: int,
    after: str | None = None,
) -> tuple[Sequence[Job], bool]:
    """The newest jobs, or those that come after one, and whether there are more."""
    jobs = select(Job).order_by(col(Job.created_at).desc(), col(Job.id).desc())
    if status:
        jobs = jobs.where(col(Job.status).in_(status))
    if option:
        jobs = jobs.where(Job.option == option)
    if name:
        jobs = jobs.where(Job.name == name)
    for key, value in (labels or {}).items():
        jobs = jobs.where(col(Job.labels)[key].as_string() == value)
    if after:
        last = find_job(session, after)
        position = tuple_(col(Job.created_at), col(Job.id))
        jobs = jobs.where(position < tuple_(last.created_at, last.id))
    page = session.exec(jobs.limit(limit + 1)).all()
    return page[:limit], len(page) > limit


@router.get("/{job_id}")
def read_job(job: JobDep) -> JobPublic:
    return JobPublic.of(job)


@router.delete("/{job_id}", status_code=204)
def delete_job(job: JobDep, *, engine: EngineDep, files: JobFilesDep) -> None:
    """Delete a job that has ended, with its files."""
    job_queue.remove(engine, job.id)
    files.delete()


@router.post("/{job_id}/cancel")
def cancel_job(job: JobDep, *, engine: EngineDep) -> JobPublic:
    """Stop a queued job at once, a running one at its next step; asking again is harmless."""
    return JobPublic.of(job_queue.cancel(engine, job.id))


@router.post("/{job_id}/pause")
def pause_job(job: JobDep, *, engine: EngineDep) -> JobPublic:
    """Stop a job until it is resumed: a queued one at once, a running one at its next step."""
    return JobPublic.of(job_queue.pause(engine, job.id))


@router.post("/{job_id}/resume")
def resume_job(
    job: JobDep, *, engine: EngineDep, request: ResumeRequest | None = None
) -> JobPublic:
    """Let a paused, failed or cancelled job go on from its last good checkpoint, or a succeeded
    one up to more `epochs`. A job that waits or runs is left alone."""
    num_epochs = request.epochs if request is not None else None
    return JobPublic.of(job_queue.resume(engine, job.id, num_epochs=num_epochs))


@router.get("/{job_id}/metrics")
def read_metrics(job: JobDep, *, session: SessionDep) -> MetricsList:
    """One row an epoch, oldest first."""
    return MetricsList(data=read_epochs(session, [job.id])[job.id], has_more=False)


@router.get("/{job_id}/events", response_model=EventList, responses={200: _STREAM_RESPONSE})
def list_events(
    job: JobDep,
    *,
    request: Request,
    session: SessionDep,
    feed: EventFeedDep,
    after: Annotated[int, Query(ge=0, le=MAX_ID, description="the id of the last event seen")] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = MAX_EVENTS,
    last_event_id: Annotated[int | None, Header(ge=0, le=MAX_ID)] = None,
) -> EventList | EventSourceResponse:
    """What happened to the job, oldest first. With `Accept: text/event-stream` a live stream,
    which closes after an event `end` when the job has ended."""
    after = after if last_event_id is None else last_event_id
    if "text/event-stream" in request.headers.get("Accept", ""):
        return EventSourceResponse(
            _encode_events(feed, job.id, after=after),
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    events = read_events(session, job.id, after=after, limit=limit + 1)
    return EventList(data=events[:limit], has_more=len(events) > limit)


@router.get("/{job_id}/log", response_class=PlainTextResponse)
def read_log(
    files: JobFilesDep, *, tail: Annotated[int | None, Query(ge=1, le=MAX_LOG_LINES)] = None
) -> str:
    """The run's log, or its last `tail` lines."""
    return files.read_log(tail=tail)


@router.get("/{job_id}/verdict")
def read_verdict(
    job: JobDep, *, session: SessionDep, thresholds: Annotated[Thresholds, Query()]
) -> Verdict:
    """Judged on the spot; every threshold can be overridden."""
    return judge(job, read_epochs(session, [job.id])[job.id], thresholds)


@router.get("/{job_id}/reconstructions")
def list_reconstructions(job: JobDep, *, session: SessionDep) -> ReconstructionList:
    """One entry a picture, oldest first."""
    artifacts = _read_artifacts(session, job, kind=ArtifactKind.reconstruction)
    return ReconstructionList(
        data=[Reconstruction.of(artifact, job=job) for artifact in artifacts], has_more=False
    )


@router.get("/{job_id}/reconstructions/{epoch}.png", response_class=FileResponse)
def read_reconstruction(
    job: JobDep, *, epoch: str, request: Request, session: SessionDep, files: JobFilesDep
) -> Response:
    """The picture of an epoch, or of `best` or `latest`."""
    artifact = _find_artifact(session, job, kind=ArtifactKind.reconstruction, epoch=epoch)
    return _send_file(request, files, artifact, media_type="image/png")


@router.get("/{job_id}/checkpoints")
def list_checkpoints(job: JobDep, *, session: SessionDep) -> CheckpointList:
    """One entry a checkpoint, oldest first, with the metrics of its epoch."""
    artifacts = _read_artifacts(session, job, kind=ArtifactKind.checkpoint)
    metrics = {row.epoch: row for row in read_epochs(session, [job.id])[job.id]}
    checkpoints = [
        Checkpoint.of(artifact, job=job, metrics=metrics.get(artifact.epoch))
        for artifact in artifacts
    ]
    return CheckpointList(data=checkpoints, has_more=False)


@router.get("/{job_id}/checkpoints/{epoch}", response_class=FileResponse)
def read_checkpoint(
    job: JobDep, *, epoch: str, request: Request, session: SessionDep, files: JobFilesDep
) -> Response:
    """Download the checkpoint of an epoch, or of `best` or `latest`, as safetensors."""
    artifact = _find_artifact(session, job, kind=ArtifactKind.checkpoint, epoch=epoch)
    return _send_file(request, files, artifact, media_type="application/octet-stream")


async def _encode_events(feed: EventFeed, job_id: str, *, after: int) -> AsyncIterator[bytes]:
    """Server-sent events (WHATWG HTML, 9.2); comments keep the connection alive."""
    async for event in feed.follow(job_id, after=after):
        if event is None:
            yield format_sse_event(comment="ping")
        else:
            data = event.model_dump_json()
            yield format_sse_event(data_str=data, event=event.kind, id=str(event.id))
    if not feed.is_closed:
        yield format_sse_event(data_str=json.dumps({"job_id": job_id}), event="end")


def _read_artifacts(session: Session, job: Job, *, kind: ArtifactKind) -> list[Artifact]:
    artifacts = select(Artifact).where(Artifact.job_id == job.id, Artifact.kind == kind)
    return list(session.exec(artifacts.order_by(col(Artifact.epoch))))


def _find_artifact(session: Session, job: Job, *, kind: ArtifactKind, epoch: str) -> Artifact:
    """Raises HTTPException 404, which names the epochs that there are."""
    artifacts = {a.epoch: a for a in _read_artifacts(session, job, kind=kind)}
    match epoch:
        case "best":
            number = job.best_epoch
        case "latest":
            number = max(artifacts, default=None)
        case _:
            number = int(epoch) if re.fullmatch("[0-9]{1,6}", epoch) else None
    if number not in artifacts:
        known = ", ".join(map(str, artifacts)) or "none yet"
        raise HTTPException(
            404,
            f"job {job.id} has no {kind} of epoch {epoch!r}; there are best, latest and {known}",
        )
    return artifacts[number]


def _send_file(
    request: Request, files: JobFiles, artifact: Artifact, *, media_type: str
) -> Response:
    """The file with its hash as ETag, or 304 if the client has it."""
    headers = {
        "ETag": f'"{artifact.sha256}"',
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
    }
    if headers["ETag"] in request.headers.get("If-None-Match", ""):
        return Response(status_code=304, headers=headers)
    try:
        path = files.path(artifact.file_name)
    except FileNotFoundError as error:
        raise HTTPException(404, str(error)) from None
    return FileResponse(
        path,
        media_type=media_type,
        headers=headers,
        filename=f"{artifact.job_id}_{artifact.file_name}",
        content_disposition_type="inline" if media_type == "image/png" else "attachment",
    )
