"""The page of one job: state, curves, reconstructions, verdict and actions."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from sqlmodel import Session, col, select

from server.api.dependencies import (
    AdmissionDep,
    EngineDep,
    JobDep,
    JobFilesDep,
    SessionDep,
    SettingsDep,
)
from server.api.requests import FORM, ResumeRequest
from server.api.schemas import JobPublic, describe_checkpoints, describe_reconstructions
from server.dashboard.bars import SILENT_SHARE, draw_bars
from server.dashboard.curves import choose_heat, draw_job
from server.dashboard.pages.login import FormDep, make_local_path
from server.dashboard.rendering import is_refresh, render_page
from server.errors import InvalidInputError, NotFoundError
from server.files.datasets import describe_use
from server.files.inspection import check_dataset
from server.jobs import queue
from server.jobs.events import read_newest_events
from server.jobs.records import read_artifacts
from server.judging.criteria import Thresholds
from server.judging.histories import read_epochs
from server.judging.knowledge import describe_run, find_most_information, is_measured
from server.judging.verdicts import judge
from server.models.epochs import EpochMetrics
from server.models.provenance import Provenance
from server.models.studies import Study, StudyJob
from server.models.tables import ArtifactKind, EventKind, Job, JobEvent, JobStatus

NUM_EVENTS = 100
NUM_LOG_LINES = 100
NUM_TABLE_EPOCHS = 10
#: Studies of a job that are named; only reused jobs have more than one.
MAX_STUDIES = 5

router = APIRouter(prefix="/ui/jobs", include_in_schema=False)

_ACTIONS = {
    JobStatus.queued: ("pause", "cancel"),
    JobStatus.running: ("pause", "cancel"),
    JobStatus.paused: ("resume", "cancel"),
    JobStatus.failed: ("resume",),
    JobStatus.cancelled: ("resume",),
    JobStatus.succeeded: ("extend",),
}


@router.get("/{job_id}")
def show_job(job: JobDep, *, request: Request, session: SessionDep, files: JobFilesDep) -> Response:
    events = read_newest_events(session, job.id, limit=NUM_EVENTS)
    epochs = _read_shown(session, job)
    checkpoints = read_artifacts(session, job.id, kind=ArtifactKind.checkpoint)
    thresholds = Thresholds()
    return render_page(
        "job.html",
        request,
        job=JobPublic.of(job),
        actions=list_actions(job),
        places=_find_places(session, job),
        verdict=judge(job, epochs, thresholds),
        thresholds=thresholds,
        final=epochs[-1] if epochs else None,
        table_epochs=epochs[: -NUM_TABLE_EPOCHS - 1 : -1],
        events=events,
        log=files.read_log(tail=NUM_LOG_LINES),
        checkpoints=describe_checkpoints(job, checkpoints, epochs)[::-1],
        pictures=_describe_pictures(session, job),
        knowledge=describe_run(job, epochs),
        is_measured=is_measured(epochs),
        bars=draw_bars(epochs[-1], min_kl=thresholds.min_kl_per_dimension) if epochs else None,
        silent_share=SILENT_SHARE,
        most_information=find_most_information(job),
        sample=describe_use(job.dataset_summary),
        provenance=_list_provenance(job),
        background_share=(job.dataset_summary or {}).get("background_share"),
        # A live page already has its curves; the event stream brings each new epoch.
        drawing=None if is_refresh(request) else _draw(job, epochs, events=events),
    )


@router.post("/{job_id}/{action}")
def change_job(
    job: JobDep,
    *,
    action: str,
    engine: EngineDep,
    settings: SettingsDep,
    admission: AdmissionDep,
    form: FormDep,
) -> Response:
    """Cancel, pause or resume a job, then go back to the page with the button."""
    match action:
        case "cancel":
            queue.cancel(engine, job.id)
        case "pause":
            queue.pause(engine, job.id)
        case "resume":
            sha256 = check_dataset(job.training_config.dataset, datasets_dir=settings.datasets_dir)
            num_epochs = _read_num_epochs(form)
            queue.resume(
                engine,
                job.id,
                num_epochs=num_epochs,
                dataset_sha256=sha256,
                admission=admission,
            )
        case _:
            raise NotFoundError(f"a job has no action {action!r}")
    target = make_local_path(form.get("next", f"/ui/jobs/{job.id}"))
    return RedirectResponse(target, status_code=303)


def _list_provenance(job: Job) -> dict[str, str]:
    """What made the job's numbers, by names for people; empty before it trains."""
    if job.provenance is None:
        return {}
    made_by = Provenance.model_validate(job.provenance)
    differs = {True: "yes", False: "no", None: None}[made_by.is_changed]
    values = {
        "Losslab": made_by.losslab_version,
        "commit": made_by.revision,
        "source changed": differs,
        "source sha256": made_by.source_sha256,
        "Python": made_by.python_version,
        "PyTorch": made_by.torch_version,
        "NumPy": made_by.numpy_version,
        "CUDA": made_by.cuda_version,
        "driver": made_by.driver_version,
        "device": made_by.device,
        "number format": made_by.number_format,
        "steps": made_by.step_path,
        "data set": job.config.get("dataset"),
        "data sha256": (job.dataset_summary or {}).get("sha256"),
        "worker process": made_by.worker_id,
        "posted by": job.client,
    }
    return {name: str(value) for name, value in values.items() if value}


def list_actions(job: Job | JobPublic) -> tuple[str, ...]:
    """The actions that the job's state allows."""
    if job.cancel_requested_at is not None and not job.status.is_terminal:
        return ()
    if job.pause_requested_at is not None and job.status == JobStatus.running:
        return ("resume", "cancel")
    return _ACTIONS.get(JobStatus(job.status), ())


def _read_shown(session: Session, job: Job) -> list[EpochMetrics]:
    """The job's epochs, with the lists of those whose lists are shown."""
    epochs = read_epochs(session, job.id, has_lists=False)
    heat = choose_heat(epochs, num_dimensions=job.training_config.latent_dim)
    listed = {row.epoch for row in (*heat, *epochs[-NUM_TABLE_EPOCHS:])}
    # The same objects, to which the rest is added.
    read_epochs(session, job.id, epochs=listed)
    return epochs


def _draw(
    job: Job, epochs: Sequence[EpochMetrics], *, events: Sequence[JobEvent]
) -> dict[str, Any]:
    """The page's drawing data, and the id of the newest event, after which the stream starts."""
    return draw_job(epochs) | {
        "num_dimensions": job.training_config.latent_dim,
        "event_kinds": list(dict.fromkeys([*map(str, EventKind), *map(str, ArtifactKind)])),
        "file_kinds": list(ArtifactKind),
        "after": events[0].id if events else 0,
        "thresholds": Thresholds().model_dump(),
    }


def _read_num_epochs(form: dict[str, str]) -> int | None:
    given = form.get("epochs", "").strip()
    if not given:
        return None
    try:
        return ResumeRequest.model_validate({"epochs": given}, context=FORM).epochs
    except ValueError:
        message = f"epochs must be a whole number up to 1000, not {given[:20]!r}"
        raise InvalidInputError(message) from None


def _find_places(session: Session, job: Job) -> list[dict[str, Any]]:
    """The newest studies that the job belongs to, and the arm and seed that it is there."""
    links = (
        select(StudyJob, Study)
        .join(Study, col(Study.id) == col(StudyJob.study_id))
        .where(col(StudyJob.job_id) == job.id)
        .order_by(col(Study.created_at).desc())
    )
    return [
        {
            "study": study,
            "arm": study.arms[link.arm]["name"] if link.arm < len(study.arms) else "unknown",
            "seed": link.seed,
            "number": link.position + 1,
        }
        for link, study in session.exec(links.limit(MAX_STUDIES))
    ]


def _describe_pictures(session: Session, job: Job) -> list[dict[str, Any]]:
    artifacts = read_artifacts(session, job.id, kind=ArtifactKind.reconstruction)
    pictures = describe_reconstructions(job, artifacts)
    return [p.model_dump(include={"epoch", "is_best", "url", "samples"}) for p in pictures]
