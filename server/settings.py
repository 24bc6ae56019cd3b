"""What surrounds this process, from `LOSSLAB_*` environment variables and secret files."""

import ipaddress
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import make_url

# Where container engines put secrets: a file for each, named like the variable.
_SECRETS_DIR = Path("/run/secrets")


class Settings(BaseSettings):
    """Each field is read from `LOSSLAB_` and its name in capitals, or from a secret file."""

    model_config = SettingsConfigDict(
        env_prefix="LOSSLAB_",
        extra="ignore",
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
    published_host: str = Field(
        default="",
        description="in a container: the address on which its port is published outside",
    )
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_queued_jobs: int = Field(default=10_000, ge=1)
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

    @property
    def is_guarded(self) -> bool:
        """Whether strangers are kept out: by a token, or because only this machine gets in."""
        reachable_at = self.published_host or self.host
        return bool(self.api_token.get_secret_value()) or is_loopback(reachable_at)

    @property
    def runs_dir(self) -> Path:
        return self.data_dir / "runs"

    @property
    def datasets_dir(self) -> Path:
        return self.data_dir / "datasets"

    @property
    def cache_dir(self) -> Path:
        return self.data_dir / "cache"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
