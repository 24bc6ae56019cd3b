"""The tables of studies, and their arms."""

from datetime import datetime
from typing import Any, Final

from pydantic import BaseModel, StrictFloat, StrictInt
from sqlalchemy import Column, ForeignKey, Index, Integer, String, text
from sqlmodel import Field as Col
from sqlmodel import SQLModel

from server.errors import ConflictError
from server.models.columns import (
    UTCDateTime,
    json_type,
    labels_column,
    study_id_column,
    utc_now,
)
from server.models.configuration import TrainingConfig, read_config
from server.models.tables import new_id


class Arm(BaseModel):
    """One configuration of a study: everything but the seed."""

    name: str
    option: str
    config: dict[str, Any]  # complete, with the seed of the option
    config_sha256: str

    @property
    def training_config(self) -> TrainingConfig:
        """As it is shown and judged, also if another version stored it."""
        return read_config(self.config)


_INTEGERS: Final = json_type(list[StrictInt])


class Study(SQLModel, table=True):
    """Arms times seeds, judged as groups. Only `server.jobs.studies` changes it."""

    __tablename__ = "study"
    __table_args__ = (
        Index("ix_study_created_at_id", "created_at", "id"),
        # The server looks for races every second, and the rows of other studies are long.
        Index(
            "ix_study_racing",
            "id",
            sqlite_where=text("until_decided IS 1 AND decided_at IS NULL"),
            postgresql_where=text("until_decided IS true AND decided_at IS NULL"),
        ),
    )

    id: str = Col(default_factory=new_id, primary_key=True, max_length=12)
    name: str | None = None
    labels: dict[str, str] = Col(
        default_factory=dict,
        sa_column=labels_column(),
    )
    priority: int = 0
    queued_by: str = ""  # the token of the request that queued its jobs last; empty without one
    client: str = ""  # the program that posted it
    quick_test: bool = False
    arms: list[dict[str, Any]] = Col(sa_type=json_type(list[Arm]))  # each an Arm
    #: Queued so far, for arms that are still in.
    seeds: list[int] = Col(sa_type=_INTEGERS)
    #: How many seeds there were each time that some had been queued. A look takes an arm's first
    #: judged seeds of those that were queued when it was due: later ones never change it.
    rounds: list[int] = Col(default_factory=list, sa_type=_INTEGERS)
    data_seed: int | None = None  # None: each job's own seed
    looks: list[int] = Col(sa_type=_INTEGERS)  # numbers of seeds at which the study is judged
    num_planned_looks: int  # the first of them; later ones were asked for afterwards
    until_decided: bool = False  # a race
    max_seeds: int
    criteria: str = Col(default="spec", max_length=20)  # the set that judges it
    #: Those that differ from the defaults.
    thresholds: dict[str, float] = Col(sa_type=json_type(dict[str, StrictFloat]))
    reuse: bool = False
    created_at: datetime = Col(default_factory=utc_now, sa_type=UTCDateTime)
    cancel_requested_at: datetime | None = Col(default=None, sa_type=UTCDateTime)
    pause_requested_at: datetime | None = Col(default=None, sa_type=UTCDateTime)
    #: When the race ended, so that it is not looked at again.
    decided_at: datetime | None = Col(default=None, sa_type=UTCDateTime)

    @property
    def arm_list(self) -> list[Arm]:
        """Raises StoredStudyError if there are none that this version can read."""
        if not self.arms:
            raise StoredStudyError("another version of Losslab stored the arms of this study")
        return [Arm.model_validate(arm) for arm in self.arms]


class StudyJob(SQLModel, table=True):
    """The job of one arm and seed of a study. Its `job_id` is null once the job was deleted."""

    __tablename__ = "study_job"

    study_id: str = Col(sa_column=study_id_column(primary_key=True))
    seed: int = Col(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    arm: int = Col(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    position: int  # of the seed in the study
    job_id: str | None = Col(
        default=None,
        sa_column=Column(
            String(12), ForeignKey("job.id", ondelete="SET NULL"), index=True, nullable=True
        ),
    )
    is_reused: bool = False  # trained before the study


class StoredStudyError(ConflictError):
    """A study of another version, which this one cannot judge or queue."""
