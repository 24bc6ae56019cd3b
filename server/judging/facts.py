"""What a study's report says about its jobs beside their verdicts: their data and devices."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlmodel import Session, col

from server.models.configuration import read_config
from server.models.provenance import Provenance
from server.models.studies import StudyJob
from server.models.tables import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """The facts of one job; `summary` describes its data once it has begun."""

    data_seed: int
    epochs_completed: int
    device: str | None
    provenance: Provenance | None
    summary: dict[str, Any]


def read_facts(session: Session, study_id: str) -> dict[str, JobFacts]:
    """The facts of each of a study's jobs, by id, as plain values in one query."""
    columns = (
        *(Job.id, Job.config, Job.epochs_completed),
        *(Job.device, Job.provenance, Job.dataset_summary),
    )
    rows = select(*map(col, columns)).where(
        col(Job.id).in_(select(col(StudyJob.job_id)).where(col(StudyJob.study_id) == study_id))
    )
    return {
        job_id: JobFacts(
            data_seed=read_config(config).data_seed,
            epochs_completed=epochs_completed,
            device=device,
            provenance=Provenance.model_validate(provenance) if provenance else None,
            summary=summary or {},
        )
        for job_id, config, epochs_completed, device, provenance, summary in session.execute(rows)
    }
