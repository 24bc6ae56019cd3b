"""Settings of this process, from `LOSSLAB_*` environment variables and secret files."""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from server.tokens import ApiToken

# Container engines put secrets here, one file per secret, named like the variable.
_SECRETS_DIR = Path("/run/secrets")
_CGROUP_QUOTA_PATH = Path("/sys/fs/cgroup/cpu.max")


class Settings(BaseSettings):
    """Each field is read from `LOSSLAB_` + its name in capitals, or from a secret file."""

    model_config = SettingsConfigDict(
        env_prefix="LOSSLAB_",
        env_ignore_empty=True,
        extra="ignore",
        hide_input_in_errors=True,  # the input may be a secret
        secrets_dir=_SECRETS_DIR if _SECRETS_DIR.is_dir() else None,
    )

    data_dir: Path = Field(
        default=Path("experiments"),
        description="folder of all files: `runs/`, `datasets/`, `cache/` and the SQLite database",
    )
    database_url: str = Field(
        default="",
        description="`postgresql://USER:PASSWORD@HOST:PORT/NAME`; empty means SQLite in the data "
        "directory",
    )
    database_password: SecretStr = Field(
        default=SecretStr(""), description="password for a database URL that contains none"
    )
    api_token: SecretStr = Field(
        default=SecretStr(""),
        description="secret that clients must send as their bearer token; it may change everything",
    )
    api_tokens: Annotated[tuple[ApiToken, ...], NoDecode] = Field(
        default=(),
        description="more tokens, separated by commas, each as `NAME:read:SHA256` or "
        "`NAME:full:SHA256`; `losslab token NAME` makes one",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="host names that requests may use, separated by commas; empty means "
        "`localhost`, `127.0.0.1` and `::1` without a token, and any name with a token",
    )
    rate_limit: str = Field(
        default="6000/minute",
        pattern=r"^[1-9][0-9]{0,8}/(second|minute|hour)$",
        description="requests allowed per token, or per client address where no token is needed, "
        "as `NUMBER/second`, `NUMBER/minute` or `NUMBER/hour`",
    )
    request_seconds: float = Field(
        default=30.0,
        gt=0,
        description="seconds until an answer must begin; uploads get ten times as long",
    )
    max_streams: int = Field(
        default=512, ge=1, description="live event streams that may be open at the same time"
    )
    header_seconds: float = Field(
        default=10.0, gt=0, description="seconds in which the headers of a request must arrive"
    )
    send_seconds: float = Field(
        default=30.0, gt=0, description="seconds in which a client must read a piece of an answer"
    )
    published_host: str = Field(
        default="",
        description="in a container: the address on which its port is published outside",
    )
    host: str = Field(
        default="127.0.0.1",
        description="address on which the server listens; only a loopback address is allowed "
        "without a token",
    )
    port: int = Field(
        default=8000,
        ge=0,
        le=65535,
        description="port on which the server listens; 0 takes any free one",
    )
    max_queued_jobs: int = Field(
        default=10_000,
        ge=1,
        description="jobs that may wait at the same time; further ones are answered 429",
    )
    idle_transaction_seconds: float = Field(
        default=10.0,
        ge=0.001,
        description="seconds without a statement after which PostgreSQL ends a transaction",
    )
    max_job_seconds: float = Field(
        default=0.0,
        ge=0,
        description="seconds that one attempt may train before it fails; 0 means no limit",
    )
    max_storage_bytes: int = Field(
        default=0,
        ge=0,
        description="bytes of checkpoints, pictures and data sets above which generated data is "
        "deleted, then the oldest checkpoints that are not pinned and that no resume needs; if "
        "that is not enough, uploads are refused; 0 means no limit",
    )
    max_upload_bytes: int = Field(
        default=256 * 2**20, ge=1, description="bytes that one uploaded data set may have"
    )
    lease_seconds: float = Field(
        default=30.0,
        gt=0,
        description="seconds without a heartbeat after which a worker counts as dead; at least "
        "three times LOSSLAB_HEARTBEAT_SECONDS",
    )
    heartbeat_seconds: float = Field(
        default=5.0, gt=0, description="seconds between two heartbeats of a worker"
    )
    poll_seconds: float = Field(
        default=0.2,
        gt=0,
        description="seconds between two polls of an idle worker for a job; PostgreSQL also "
        "notifies workers",
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        description="attempts that a job may lose to dead workers, failing devices or full disks "
        "before it fails",
    )
    retry_seconds: float = Field(
        default=10.0,
        ge=0,
        description="seconds until a job whose device or files failed is tried again; doubled "
        "each time",
    )
    checkpoint_seconds: float = Field(
        default=60.0,
        gt=0,
        description="seconds between two saved resume points inside a long epoch",
    )
    stall_seconds: float = Field(
        default=300.0,
        gt=0,
        description="seconds without progress after which a live worker is shown as stalled",
    )
    num_workers: int = Field(
        default=1,
        ge=1,
        description="workers that share this machine's cores; each uses its share of them",
    )
    wandb_project: str = Field(
        default="", description="Weights & Biases project that each job is also logged to"
    )
    json_logs: bool = Field(default=False, description="log one JSON object per line")

    @property
    def resolved_database_url(self) -> str:
        """The URL with its driver and password; a bare `postgresql://` means psycopg."""
        if not self.database_url:
            return f"sqlite:///{self.data_dir.absolute() / 'losslab.db'}"
        url = make_url(self.database_url)
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        password = self.database_password.get_secret_value()
        if password and not url.password:
            url = url.set(password=password)
        return url.render_as_string(hide_password=False)

    @field_validator("database_url")
    @classmethod
    def _check_database_url(cls, given: str) -> str:
        try:
            driver = make_url(given).drivername if given else "sqlite"
        except (ArgumentError, ValueError):
            driver = ""
        if driver.partition("+")[0] not in ("postgresql", "postgres", "sqlite"):
            raise ValueError("must read postgresql://USER@HOST:PORT/NAME, or be empty for SQLite")
        return given

    @model_validator(mode="after")
    def _check_lease(self) -> Self:
        if self.lease_seconds < 3 * self.heartbeat_seconds:
            raise ValueError(
                f"lease_seconds must be at least three times heartbeat_seconds "
                f"({self.heartbeat_seconds:g}), not {self.lease_seconds:g}: one late heartbeat "
                "would cost a healthy worker its job"
            )
        return self

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, given: object) -> object:
        return _split(given) if isinstance(given, str) else given

    @field_validator("api_tokens", mode="before")
    @classmethod
    def _parse_tokens(cls, given: object) -> object:
        if isinstance(given, str):
            return tuple(ApiToken.parse(entry) for entry in _split(given))
        return given

    @property
    def tokens(self) -> tuple[ApiToken, ...]:
        """All API tokens; if there are none, clients need no token."""
        secret = self.api_token.get_secret_value()
        return (*self.api_tokens, *([ApiToken.of(secret, name="default")] if secret else []))

    @property
    def is_guarded(self) -> bool:
        """Whether access is restricted: by a token, or to this machine."""
        reachable_at = self.published_host or self.host
        return bool(self.tokens) or is_loopback(reachable_at)

    @property
    def runs_dir(self) -> Path:
        return self.data_dir / "runs"

    @property
    def datasets_dir(self) -> Path:
        return self.data_dir / "datasets"

    @property
    def cache_dir(self) -> Path:
        return self.data_dir / "cache"


def _split(given: str) -> tuple[str, ...]:
    """Split at commas and spaces."""
    return tuple(given.replace(",", " ").split())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def count_cores(*, quota_path: Path = _CGROUP_QUOTA_PATH) -> int:
    """Cores that this process may use: its CPU affinity, or a container's quota if lower."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    if quota_path.exists():
        quota, period = quota_path.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores
