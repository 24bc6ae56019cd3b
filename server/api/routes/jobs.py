"""Routes for jobs: create, follow, control, and read their metrics and files."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from pydantic import Field
from sqlalchemy import Engine
from sqlmodel import Session

from server.api.caching import NOT_MODIFIED, answer_tagged, is_known
from server.api.dependencies import (
    AdmissionDep,
    EngineDep,
    EventFeedDep,
    JobDep,
    JobFilesDep,
    SessionDep,
    SettingsDep,
    TokenNameDep,
)
from server.api.event_feed import EventStream
from server.api.idempotency import (
    Answer,
    IdempotencyKeyHeader,
    KeyedRequest,
    answer_once,
    find_replay,
)
from server.api.problems import PROBLEM_RESPONSES
from server.api.queries import (
    LABELS_PARAMETER,
    MAX_PAGE_SIZE,
    JudgingQuery,
    LabelsDep,
    refuse_unknown_parameters,
)
from server.api.rates import find_client
from server.api.requests import JobChange, JobRequest, OptionName, PlainText, ResumeRequest
from server.api.schemas import (
    CheckpointList,
    Event,
    EventList,
    JobList,
    JobPublic,
    MetricsList,
    ReconstructionList,
    describe_checkpoints,
    describe_reconstructions,
)
from server.errors import NotFoundError
from server.files.artifacts import JobFiles
from server.files.inspection import check_dataset
from server.jobs import queue
from server.jobs.events import read_events
from server.jobs.listing import JobFilter, find_job, read_page
from server.jobs.options import check_known
from server.jobs.records import find_artifact, read_artifacts
from server.jobs.submission import submit_job
from server.judging.histories import read_epoch_part, read_epochs, read_histories
from server.judging.verdicts import Verdict, judge
from server.models.tables import Artifact, ArtifactKind, BestBy, JobStatus

MAX_LOG_LINES: Final = 10_000
MAX_EVENTS: Final = 1000
MAX_ID: Final = 2**31 - 1
_STREAM_RESPONSE = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
EventId = Annotated[int, Field(ge=0, le=MAX_ID)]
NumLines = Annotated[int, Field(ge=1, le=MAX_LOG_LINES)]
BestByQuery = Annotated[
    BestBy,
    Query(
        description="what `best` is: the epoch with the lowest validation reconstruction loss, "
        "weighted as in the job, or the one with the highest validation log-likelihood"
    ),
]

#: Epochs of a job that are in memory together.
_NUM_EPOCHS_AT_ONCE: Final = 100

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=PROBLEM_RESPONSES)


@router.post("", status_code=201, response_model=JobPublic)
def create_job(
    request: JobRequest,
    *,
    engine: EngineDep,
    settings: SettingsDep,
    token_name: TokenNameDep,
    admission: AdmissionDep,
    idempotency_key: IdempotencyKeyHeader = None,
) -> Response:
    """Queue a job. It is committed before the answer, which has its whole configuration.

    With `Idempotency-Key`, the same request within a day gets the same answer and creates no
    second job.
    """
    keyed = KeyedRequest.of(idempotency_key, token_name=token_name, request=request)
    if answer := find_replay(engine, keyed):
        return answer
    with Session(engine) as session:
        job = request.make_job(session, datasets_dir=settings.datasets_dir)

    def submit(session: Session) -> Answer:
        submit_job(session, job, admission=admission)
        return Answer(JobPublic.of(job).model_dump_json(), location=f"/jobs/{job.id}")

    return answer_once(engine, keyed, execute=submit)


@router.get(
    "",
    openapi_extra={"parameters": [LABELS_PARAMETER]},
    dependencies=[Depends(refuse_unknown_parameters)],
)
def list_jobs(
    session: SessionDep,
    *,
    labels: LabelsDep,
    status: Annotated[list[JobStatus] | None, Query()] = None,
    option: Annotated[
        OptionName | None, Query(description="that an option or a job has; others are refused")
    ] = None,
    name: Annotated[PlainText | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = 20,
    after: Annotated[str | None, Query(description="the last id of the page before")] = None,
) -> JobList:
    """Newest first. A filter that is left out matches all jobs; `status` may be repeated."""
    if option is not None:
        check_known(session, option)
    wanted = JobFilter(statuses=status or [], option=option, name=name or None, labels=labels)
    last = find_job(session, after) if after else None
    page = read_page(session, wanted, after=last, limit=limit + 1)
    return JobList(data=[JobPublic.of(job) for job in page[:limit]], has_more=len(page) > limit)


@router.get("/{job_id}", response_model=JobPublic, responses={304: NOT_MODIFIED})
def read_job(job: JobDep, *, request: Request) -> Response:
    """The job with an `ETag`; with `If-None-Match`, 304 means that nothing changed."""
    return answer_tagged(request, JobPublic.of(job))


@router.patch("/{job_id}")
def change_job(job: JobDep, *, change: JobChange, engine: EngineDep) -> JobPublic:
    """Pin a job, so that its checkpoints are not deleted to free space, or unpin it."""
    return JobPublic.of(queue.pin(engine, job.id, is_pinned=change.is_pinned))


@router.delete("/{job_id}", status_code=204)
def delete_job(job: JobDep, *, engine: EngineDep, files: JobFilesDep) -> None:
    """Delete a job that has ended, with its files."""
    queue.remove(engine, job.id, delete_files=files.delete)


@router.post("/{job_id}/cancel")
def cancel_job(job: JobDep, *, engine: EngineDep) -> JobPublic:
    """Stop a queued job at once, a running one at its next step; a repeated request is harmless."""
    return JobPublic.of(queue.cancel(engine, job.id))


@router.post("/{job_id}/pause")
def pause_job(job: JobDep, *, engine: EngineDep) -> JobPublic:
    """Stop a job until it is resumed: a queued one at once, a running one at its next step."""
    return JobPublic.of(queue.pause(engine, job.id))


@router.post("/{job_id}/resume")
def resume_job(
    job: JobDep,
    *,
    engine: EngineDep,
    settings: SettingsDep,
    admission: AdmissionDep,
    request: ResumeRequest | None = None,
) -> JobPublic:
    """Let a paused, failed or cancelled job go on from its last valid checkpoint, or a succeeded
    one with more `epochs`. A queued or running job is not changed."""
    # Without its data set the job would fail later.
    sha256 = check_dataset(job.training_config.dataset, datasets_dir=settings.datasets_dir)
    num_epochs = request.epochs if request is not None else None
    resumed = queue.resume(
        engine,
        job.id,
        num_epochs=num_epochs,
        dataset_sha256=sha256,
        admission=admission,
    )
    return JobPublic.of(resumed)


@router.get("/{job_id}/metrics", response_model=MetricsList)
def read_metrics(job: JobDep, *, engine: EngineDep) -> Response:
    """One row per epoch, oldest first."""
    parts = _encode_metrics(engine, job.id)
    # The first part is read before the answer begins: if the database is away, it says so.
    first, rest = next(parts), list(islice(parts, 1))
    if not rest:
        return Response(first, media_type="application/json")
    return StreamingResponse(chain([first], rest, parts), media_type="application/json")


@router.get("/{job_id}/events", response_model=EventList, responses={200: _STREAM_RESPONSE})
def list_events(
    job: JobDep,
    *,
    request: Request,
    session: SessionDep,
    feed: EventFeedDep,
    settings: SettingsDep,
    after: Annotated[EventId, Query(description="the id of the last event seen")] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = MAX_EVENTS,
    last_event_id: Annotated[EventId | None, Header()] = None,
) -> EventList | EventStream:
    """Events of the job, oldest first. With `Accept: text/event-stream` the answer is a live
    stream, which closes after an event `end` when the job has ended."""
    after = after if last_event_id is None else last_event_id
    if "text/event-stream" in request.headers.get("Accept", ""):
        return EventStream(
            feed, job.id, after=after, client=find_client(request), max_streams=settings.max_streams
        )
    events = read_events(session, job.id, after=after, limit=limit + 1)
    data = [Event.of(event) for event in events[:limit]]
    return EventList(data=data, has_more=len(events) > limit)


@router.get("/{job_id}/log", response_class=PlainTextResponse)
def read_log(files: JobFilesDep, *, tail: Annotated[NumLines | None, Query()] = None) -> str:
    """The run's log, or its last `tail` lines."""
    return files.read_log(tail=tail)


@router.get("/{job_id}/verdict")
def read_verdict(
    job: JobDep, *, session: SessionDep, query: Annotated[JudgingQuery, Query()]
) -> Verdict:
    """The verdict, computed at the request, by the criteria and the thresholds of the query."""
    epochs = read_histories(session, [job.id])[job.id]
    return judge(job, epochs, query.thresholds(), criteria_set=query.criteria)


@router.get("/{job_id}/reconstructions")
def list_reconstructions(job: JobDep, *, session: SessionDep) -> ReconstructionList:
    """One entry per picture, oldest first."""
    pictures = read_artifacts(session, job.id, kind=ArtifactKind.reconstruction)
    return ReconstructionList(data=describe_reconstructions(job, pictures), has_more=False)


@router.get(
    "/{job_id}/reconstructions/{epoch}.png",
    response_class=FileResponse,
    responses={200: {"content": {"image/png": {}}}, 304: NOT_MODIFIED},
)
def read_reconstruction(
    job: JobDep,
    *,
    epoch: str,
    request: Request,
    session: SessionDep,
    files: JobFilesDep,
    by: BestByQuery = BestBy.loss,
) -> Response:
    """The picture of an epoch, or of `best` or `latest`."""
    artifact = find_artifact(
        session, job, kind=ArtifactKind.reconstruction, epoch=epoch, best_by=by
    )
    return _send_file(request, files, artifact, media_type="image/png")


@router.get("/{job_id}/checkpoints")
def list_checkpoints(job: JobDep, *, session: SessionDep) -> CheckpointList:
    """One entry per checkpoint, oldest first, with the metrics of its epoch."""
    checkpoints = read_artifacts(session, job.id, kind=ArtifactKind.checkpoint)
    epochs = read_epochs(session, job.id, epochs=[each.epoch for each in checkpoints])
    return CheckpointList(data=describe_checkpoints(job, checkpoints, epochs), has_more=False)


@router.get(
    "/{job_id}/checkpoints/{epoch}",
    response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {}}}, 304: NOT_MODIFIED},
)
def read_checkpoint(
    job: JobDep,
    *,
    epoch: str,
    request: Request,
    session: SessionDep,
    files: JobFilesDep,
    by: BestByQuery = BestBy.loss,
) -> Response:
    """Download the checkpoint of an epoch, or of `best` or `latest`, as safetensors."""
    artifact = find_artifact(session, job, kind=ArtifactKind.checkpoint, epoch=epoch, best_by=by)
    return _send_file(request, files, artifact, media_type="application/octet-stream")


def _encode_metrics(engine: Engine, job_id: str) -> Iterator[str]:
    """A MetricsList in parts: with many dimensions it is several megabytes. Each part is read in a
    session of its own, so that a slow reader holds no connection."""
    after, opening, is_last = 0, '{"data":[', False
    while not is_last:
        with Session(engine) as session:
            rows = read_epoch_part(session, job_id, after=after, limit=_NUM_EPOCHS_AT_ONCE)
            texts = [row.model_dump_json() for row in rows]
        is_last = len(rows) < _NUM_EPOCHS_AT_ONCE
        begin = opening if rows or not after else ""
        yield begin + ",".join(texts) + ('],"has_more":false}' if is_last else "")
        after, opening = rows[-1].epoch if rows else after, ","


def _send_file(
    request: Request, files: JobFiles, artifact: Artifact, *, media_type: str
) -> Response:
    """The file with its hash as ETag, or 304 if the client already has it."""
    # A URL with the hash always gives the same bytes.
    is_exact = request.query_params.get("sha256") == artifact.sha256
    headers = {
        "ETag": f'"{artifact.sha256}"',
        "Cache-Control": "private, max-age=31536000, immutable" if is_exact else "no-cache",
    }
    if is_known(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    try:
        path = files.verified_path(artifact.file_name, sha256=artifact.sha256)
    except FileNotFoundError as error:
        raise NotFoundError(str(error)) from None
    return FileResponse(
        path,
        media_type=media_type,
        headers=headers,
        filename=f"{artifact.job_id}_{artifact.file_name}",
        content_disposition_type="inline" if media_type == "image/png" else "attachment",
    )
