"""Comparisons: jobs judged side by side, as JSON, as a picture and as reports."""

from collections import Counter
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Query, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from pydantic import Field
from sqlmodel import Session, col, select

from server.artifacts import JobFiles
from server.criteria import Thresholds, find_differences, judge, rank
from server.dependencies import SessionDep, SettingsDep, find_jobs, refuse_query
from server.histories import read_histories
from server.models import Artifact, ArtifactKind, Job, JobStatus, Option
from server.problems import PROBLEM_RESPONSES
from server.reports import ReportEntry, render_curves, render_html, render_markdown
from server.schemas import ComparedJob, Comparison, JobPublic
from server.settings import Settings

MAX_COMPARED_JOBS = 100
# Only described: `_parse_options` says which name is wrong.
_OPTIONS_PATTERN = r"^( *[abc] *(, *[abc] *)*)?$"

router = APIRouter(prefix="/comparisons", tags=["comparisons"], responses=PROBLEM_RESPONSES)


class ComparisonQuery(Thresholds):
    """The jobs to compare, by id or by option, and any threshold that shall differ."""

    job_id: list[str] = Field(default_factory=list, max_length=MAX_COMPARED_JOBS)
    options: str = Field(
        default="",
        max_length=20,
        description="`a,b,c` takes the newest succeeded job of each",
        examples=["a,b,c"],
        json_schema_extra={"pattern": _OPTIONS_PATTERN},
    )

    def thresholds(self) -> Thresholds:
        return Thresholds.model_validate(self.model_dump(include=set(Thresholds.model_fields)))


QueryDep = Annotated[ComparisonQuery, Query()]


def find_entries(query: QueryDep, *, session: SessionDep) -> list[ReportEntry]:
    """The jobs that the query names, judged."""
    if bool(query.job_id) == bool(query.options):
        refuse_query("job_id", "name jobs by job_id, or presets by options=a,b,c, and not both")
    jobs = find_jobs(session, query.job_id)
    jobs += [_find_newest(session, option) for option in _parse_options(query.options)]
    histories = read_histories(session, [job.id for job in jobs])
    thresholds = query.thresholds()
    num_named = Counter(job.name for job in jobs)
    return [
        ReportEntry(
            job=job,
            verdict=judge(job, histories[job.id], thresholds),
            metrics=histories[job.id],
            has_namesake=num_named[job.name] > 1,
        )
        for job in jobs
    ]


EntriesDep = Annotated[list[ReportEntry], Depends(find_entries)]


@router.get("")
def read_comparison(entries: EntriesDep) -> Comparison:
    """Verdicts side by side, the ranking, a recommendation or why there is none."""
    return make_comparison(entries)


@router.get("/curves.png", response_class=Response, responses={200: {"content": {"image/png": {}}}})
def read_curves(entries: EntriesDep, *, query: QueryDep) -> Response:
    """Loss, accuracy and KL of each job."""
    headers = {"X-Content-Type-Options": "nosniff"}
    curves = render_curves(entries, thresholds=query.thresholds())
    return Response(curves, media_type="image/png", headers=headers)


#: The report's styles and pictures are within it, and it has no script.
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"


@router.get("/report.html", response_class=HTMLResponse)
def read_html_report(
    entries: EntriesDep, *, query: QueryDep, session: SessionDep, settings: SettingsDep
) -> Response:
    """One file with everything in it, to keep or to send."""
    pictured = [_add_picture(entry, session=session, settings=settings) for entry in entries]
    html = render_html(pictured, make_comparison(entries), thresholds=query.thresholds())
    return HTMLResponse(html, headers={"Content-Security-Policy": _REPORT_POLICY})


@router.get("/report.md", response_class=PlainTextResponse)
def read_markdown_report(entries: EntriesDep) -> str:
    return render_markdown(entries, make_comparison(entries))


def make_comparison(entries: list[ReportEntry]) -> Comparison:
    ranking = rank([(entry.job, entry.verdict) for entry in entries])
    return Comparison(
        jobs=[ComparedJob(job=JobPublic.of(entry.job), verdict=entry.verdict) for entry in entries],
        differences=find_differences([entry.job for entry in entries]),
        **ranking.model_dump(),
    )


def _add_picture(entry: ReportEntry, *, session: Session, settings: Settings) -> ReportEntry:
    """The entry with its newest reconstructions, if there are any."""
    newest = (
        select(Artifact)
        .where(Artifact.job_id == entry.job.id, Artifact.kind == ArtifactKind.reconstruction)
        .order_by(col(Artifact.epoch).desc())
    )
    artifact = session.exec(newest).first()
    if artifact is None:
        return entry
    try:
        files = JobFiles(settings.runs_dir, entry.job.id)
        picture = files.verified_path(artifact.file_name, sha256=artifact.sha256).read_bytes()
    except FileNotFoundError:
        # A report of what is left is worth more than none; the page says that it is missing.
        return entry
    return replace(entry, reconstruction_png=picture, reconstruction_epoch=artifact.epoch)


def _parse_options(options: str) -> list[Option]:
    names = [name.strip() for name in options.split(",")] if options else []
    unknown = [name for name in names if name not in set(Option)]
    if unknown:
        allowed = ", ".join(Option)
        refuse_query("options", f"{unknown[0]!r} is no option; allowed are {allowed}, as in a,b,c")
    return [Option(name) for name in dict.fromkeys(names)]


def _find_newest(session: Session, option: Option) -> Job:
    newest = (
        select(Job)
        .where(Job.option == option, Job.status == JobStatus.succeeded)
        .order_by(col(Job.created_at).desc(), col(Job.id).desc())
    )
    job = session.exec(newest.limit(1)).first()
    if job is None:
        raise HTTPException(404, f"no job of option {option} has succeeded yet")
    return job
