"""What surrounds this process, from `LOSSLAB_*` environment variables and secret files."""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from server.tokens import ApiToken

# Where container engines put secrets: a file for each, named like the variable.
_SECRETS_DIR = Path("/run/secrets")
_CGROUP_QUOTA_PATH = Path("/sys/fs/cgroup/cpu.max")


class Settings(BaseSettings):
    """Each field is read from `LOSSLAB_` and its name in capitals, or from a secret file."""

    model_config = SettingsConfigDict(
        env_prefix="LOSSLAB_",
        env_ignore_empty=True,
        extra="ignore",
        hide_input_in_errors=True,  # it may be a secret
        secrets_dir=_SECRETS_DIR if _SECRETS_DIR.is_dir() else None,
    )

    data_dir: Path = Field(
        default=Path("experiments"), description="runs/, datasets/, cache/ and the SQLite file"
    )
    database_url: str = Field(
        default="", description="empty is SQLite in the data directory; postgresql://… else"
    )
    database_password: SecretStr = Field(
        default=SecretStr(""), description="goes into a database URL that has none"
    )
    api_token: SecretStr = Field(
        default=SecretStr(""), description="what clients must send as their bearer token"
    )
    api_tokens: Annotated[tuple[ApiToken, ...], NoDecode] = Field(
        default=(), description="more tokens, by name, scope and hash; `losslab token` makes them"
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="names by which the service may be asked; else this machine's own names "
        "without a token, and any with one",
    )
    rate_limit: str = Field(
        default="6000/minute",
        pattern=r"^[1-9][0-9]{0,8}/(second|minute|hour)$",
        description="requests of one token, or of one address where no token is needed",
    )
    request_seconds: float = Field(
        default=30.0, gt=0, description="until an answer begins; uploads get ten times as long"
    )
    max_streams: int = Field(default=512, ge=1, description="live event streams at a time")
    published_host: str = Field(
        default="",
        description="in a container: the address on which its port is published outside",
    )
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_queued_jobs: int = Field(default=10_000, ge=1)
    max_job_seconds: float = Field(
        default=0.0, ge=0, description="an attempt that trains longer fails; 0 is no limit"
    )
    max_storage_bytes: int = Field(
        default=0,
        ge=0,
        description="above it generated data goes, then the oldest checkpoints that no resume "
        "needs; 0 is no limit",
    )
    max_upload_bytes: int = Field(default=256 * 2**20, ge=1, description="of one data set")
    lease_seconds: float = Field(
        default=30.0, gt=0, description="without a heartbeat for so long a worker counts as dead"
    )
    heartbeat_seconds: float = Field(default=5.0, gt=0)
    poll_seconds: float = Field(
        default=0.2, gt=0, description="how often an idle worker looks for a job"
    )
    max_attempts: int = Field(
        default=3, ge=1, description="how often a job that loses its worker is started"
    )
    retry_seconds: float = Field(
        default=10.0,
        ge=0,
        description="pause before a job is tried again whose files, device or worker failed; "
        "doubled each time",
    )
    checkpoint_seconds: float = Field(
        default=60.0, gt=0, description="how often a job saves where it is inside a long epoch"
    )
    stall_seconds: float = Field(
        default=300.0,
        gt=0,
        description="without progress for so long a worker that lives is shown as stalled",
    )
    num_workers: int = Field(default=1, ge=1, description="workers that share this machine's cores")
    wandb_project: str = Field(
        default="", description="also log each run to this Weights & Biases project"
    )
    json_logs: bool = Field(default=False, description="one JSON object a log line")

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
        """All API tokens; none means that no token is asked for."""
        secret = self.api_token.get_secret_value()
        return (*self.api_tokens, *([ApiToken.of(secret, name="default")] if secret else []))

    @property
    def is_guarded(self) -> bool:
        """Whether strangers are kept out: by a token, or because only this machine gets in."""
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
    """At commas and spaces."""
    return tuple(given.replace(",", " ").split())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def count_cores(*, quota_path: Path = _CGROUP_QUOTA_PATH) -> int:
    """Cores that this process may use: its affinity, or a container's quota if that is less."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    if quota_path.exists():
        quota, period = quota_path.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores
