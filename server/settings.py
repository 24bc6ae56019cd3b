"""Settings of this process, from `LOSSLAB_*` environment variables and secret files."""

from pathlib import Path
from typing import Annotated, ClassVar, Final, Self

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from server.environment import database_url as urls
from server.environment.hosts import (
    is_loopback,
    parse_address,
    parse_allowed_hosts,
    parse_networks,
    parse_root_path,
)
from server.environment.sources import list_sources
from server.environment.variables import check_number, expand_home, split_list, tidy_rate
from server.tokens import (
    DEFAULT_NAME,
    MIN_LENGTH_ON_NETWORK,
    MIN_SECRET_LENGTH,
    ApiToken,
    check_secret,
    check_strength,
    parse_tokens,
)

# Container engines put secrets here, one file per secret, named like the variable.
_SECRETS_DIR = Path("/run/secrets")

#: The settings that only a server uses.
_OF_THE_SERVER: Final = frozenset({
    "api_token", "api_tokens", "allowed_hosts", "rate_limit", "request_seconds", "max_streams",
    "header_seconds", "send_seconds", "published_host", "host", "port", "root_path",
    "max_queued_jobs", "max_upload_bytes", "trusted_proxies",
})  # fmt: skip
#: The settings of server and workers that belong to one service, and not to this machine.
_OF_A_SERVICE: Final = frozenset({
    "database_url", "database_password", "max_job_seconds", "max_storage_bytes",
})  # fmt: skip

# With these bounds no value is too large for a timer or a column.
Seconds = Annotated[float, Field(le=366 * 86_400)]
Count = Annotated[int, Field(le=2**31 - 1)]
NumBytes = Annotated[int, Field(le=2**63 - 1)]


class Settings(BaseSettings):
    """Each field is read from `LOSSLAB_` + its name in capitals, or from a secret file."""

    #: Fields that the process does not use and therefore does not read.
    unused: ClassVar[frozenset[str]] = frozenset()

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
    shared_with_group: bool = Field(
        default=False,
        description="let the group of the data directory read and write all files in it, as server "
        "and workers of several users need; otherwise they are for their own user alone",
    )
    database_url: str = Field(
        default="",
        repr=False,
        description="`postgresql://USER:PASSWORD@HOST:PORT/NAME`; empty means SQLite in the data "
        "directory",
    )
    database_password: SecretStr = Field(
        default=SecretStr(""), description="password for a database URL that contains none"
    )
    api_token: SecretStr = Field(
        default=SecretStr(""),
        description="secret that clients must send as their bearer token, of at least "
        f"{MIN_SECRET_LENGTH} characters, and {MIN_LENGTH_ON_NETWORK} if others can reach the "
        "service; it may change everything",
    )
    api_tokens: Annotated[tuple[ApiToken, ...], NoDecode] = Field(
        default=(),
        description="more tokens, separated by commas, each as `NAME:read:SHA256` or "
        "`NAME:full:SHA256`; `losslab token NAME` makes one",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="host names that requests may use, separated by commas, `*.example.org` "
        "for all names below one; `localhost`, `127.0.0.1` and `::1` always may. Empty means only "
        "these without a token, and any name with a token",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="addresses or networks of reverse proxies, separated by commas, such as "
        "`127.0.0.1, 172.16.0.0/12`: only these are believed when they say in `X-Forwarded-For` "
        "and `X-Forwarded-Proto` who asks, and whether by https",
    )
    rate_limit: str = Field(
        default="6000/minute",
        description="requests allowed per token, or per client address where no token is needed, "
        "as `NUMBER/second`, `NUMBER/minute` or `NUMBER/hour`",
    )
    request_seconds: Seconds = Field(
        default=30.0,
        gt=0,
        description="seconds until an answer must begin, from the end of the request's body "
        "(uploads get ten times as long); and seconds in which at least 1024 bytes more of a body "
        "must arrive",
    )
    max_streams: Count = Field(
        default=512,
        ge=1,
        description="live event streams that may be open at the same time; one token, or one "
        "address where no token is needed, gets at most three quarters of them",
    )
    header_seconds: Seconds = Field(
        default=10.0, gt=0, description="seconds in which the headers of a request must arrive"
    )
    send_seconds: Seconds = Field(
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
    root_path: str = Field(
        default="",
        description="path below which a reverse proxy serves the service, such as `/losslab`; "
        "empty means its root, or what the proxy says in `X-Forwarded-Prefix`",
    )
    max_queued_jobs: Count = Field(
        default=10_000,
        ge=1,
        description="jobs that may wait at the same time, of one of several full tokens three "
        "quarters of them; further ones are answered 429",
    )
    idle_transaction_seconds: float = Field(
        default=10.0,
        ge=0.001,
        le=2_000_000,  # PostgreSQL counts milliseconds in 32 bits
        description="seconds without a statement after which PostgreSQL ends a transaction",
    )
    max_job_seconds: Seconds = Field(
        default=0.0,
        ge=0,
        description="seconds that one attempt may train before it fails; 0 means no limit",
    )
    max_storage_bytes: NumBytes = Field(
        default=0,
        ge=0,
        description="bytes of checkpoints, pictures and data sets above which generated data is "
        "deleted, then the oldest checkpoints that are not pinned and that no resume needs; if "
        "that is not enough, uploads are refused; 0 means no limit",
    )
    max_upload_bytes: NumBytes = Field(
        default=256 * 2**20, ge=1, description="bytes that one uploaded data set may have"
    )
    lease_seconds: Seconds = Field(
        default=30.0,
        gt=0,
        description="seconds without a heartbeat after which a worker counts as dead; at least "
        "three times LOSSLAB_HEARTBEAT_SECONDS",
    )
    heartbeat_seconds: Seconds = Field(
        default=5.0, gt=0, description="seconds between two heartbeats of a worker"
    )
    poll_seconds: Seconds = Field(
        default=0.2,
        gt=0,
        description="seconds between two polls of an idle worker for a job; PostgreSQL also "
        "notifies workers",
    )
    max_attempts: Count = Field(
        default=3,
        ge=1,
        description="attempts that a job may lose to dead workers, failing devices or full disks "
        "before it fails",
    )
    retry_seconds: Seconds = Field(
        default=10.0,
        ge=0,
        description="seconds until a job whose device or files failed is tried again; doubled "
        "each time",
    )
    checkpoint_seconds: Seconds = Field(
        default=60.0,
        gt=0,
        description="seconds between two saved resume points inside a long epoch",
    )
    stall_seconds: Seconds = Field(
        default=300.0,
        gt=0,
        description="seconds without progress after which a live worker is shown as stalled",
    )
    num_workers: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="workers that share this machine's cores; each uses its share of them, and "
        "`losslab up` starts as many",
    )
    jobs_per_worker: int | None = Field(
        default=None,
        ge=1,
        le=16,
        description="jobs that a worker trains at the same time; by default 8 on a GPU, or one per "
        "core if there are fewer, and 1 on a CPU",
    )
    wandb_project: str = Field(
        default="", description="Weights & Biases project that each job is also logged to"
    )
    json_logs: bool = Field(default=False, description="log one JSON object per line")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic's own names
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return list_sources(settings_cls, init=init_settings, secret_files=file_secret_settings)

    @property
    def resolved_database_url(self) -> str:
        """The URL with its driver and password; a bare `postgresql://` means psycopg."""
        if not self.database_url:
            return urls.make_sqlite_url(self.data_dir.absolute() / "losslab.db")
        password = self.database_password.get_secret_value()
        return urls.resolve_database_url(self.database_url, password=password)

    @property
    def chosen_num_workers(self) -> int | None:
        """The number of workers if it was set."""
        return self.num_workers if "num_workers" in self.model_fields_set else None

    @property
    def file_dirs(self) -> tuple[Path, ...]:
        """The folders in the data directory that server and workers write to."""
        return self.runs_dir, self.datasets_dir, self.cache_dir

    @property
    def secrets(self) -> list[str]:
        """What no message, log or page may show."""
        given = [self.api_token.get_secret_value(), self.database_password.get_secret_value()]
        return [*filter(None, given), *urls.list_secrets(self.database_url)]

    @field_validator("*", mode="before")
    @classmethod
    def _check_number(cls, given: object, info: ValidationInfo) -> object:
        field = cls.model_fields[info.field_name or ""]
        if isinstance(given, str):
            check_number(given, kind=field.annotation, example=field.default)
        return given

    @field_validator("data_dir")
    @classmethod
    def _expand_home(cls, given: Path) -> Path:
        return expand_home(given)

    @field_validator("database_url")
    @classmethod
    def _parse_database_url(cls, given: str) -> str:
        return urls.parse_database_url(given)

    @field_validator("database_password")
    @classmethod
    def _check_database_password(cls, given: SecretStr) -> SecretStr:
        urls.check_characters([given.get_secret_value()])
        return given

    @field_validator("api_token")
    @classmethod
    def _check_api_token(cls, given: SecretStr) -> SecretStr:
        check_secret(given.get_secret_value())
        check_strength(given.get_secret_value())
        return given

    @field_validator("host", "published_host")
    @classmethod
    def _tidy_host(cls, given: str) -> str:
        return parse_address(given) if given else ""

    @field_validator("rate_limit")
    @classmethod
    def _check_rate_limit(cls, given: str) -> str:
        return tidy_rate(given)

    @field_validator("root_path")
    @classmethod
    def _tidy_root_path(cls, given: str) -> str:
        return parse_root_path(given)

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
    def _parse_hosts(cls, given: object) -> object:
        entries = split_list(given) if isinstance(given, str) else given
        return parse_allowed_hosts(entries) if isinstance(entries, tuple | list) else entries

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _parse_proxies(cls, given: object) -> object:
        entries = split_list(given) if isinstance(given, str) else given
        return parse_networks(entries) if isinstance(entries, tuple | list) else entries

    @field_validator("api_tokens", mode="before")
    @classmethod
    def _parse_tokens(cls, given: object) -> object:
        if isinstance(given, str):
            return parse_tokens(split_list(given))
        return given

    @property
    def tokens(self) -> tuple[ApiToken, ...]:
        """All API tokens; if there are none, clients need no token."""
        secret = self.api_token.get_secret_value()
        return (*self.api_tokens, *([ApiToken.of(secret, name=DEFAULT_NAME)] if secret else []))

    @property
    def is_private(self) -> bool:
        """Whether only this machine can reach the service."""
        return is_loopback(self.published_host or self.host)

    @property
    def is_served_to_others(self) -> bool:
        """Whether others can reach the service: by itself, or by a proxy that is named."""
        return not self.is_private or bool(self.trusted_proxies)

    @property
    def public_names(self) -> tuple[str, ...]:
        """The allowed hosts by which others may reach the service, if there is a proxy."""
        return tuple(
            host
            for host in self.allowed_hosts
            if not is_loopback(host) and not is_loopback(host.rpartition(":")[0])
        )

    @property
    def min_secret_length(self) -> int:
        """A token with a shorter secret opens nothing."""
        return MIN_LENGTH_ON_NETWORK if self.is_served_to_others else MIN_SECRET_LENGTH

    @property
    def is_guarded(self) -> bool:
        """Whether access is restricted: by a token, or to this machine."""
        return bool(self.tokens) or self.is_private

    @property
    def has_short_token(self) -> bool:
        """Whether others could guess the token in time."""
        return 0 < len(self.api_token.get_secret_value()) < MIN_LENGTH_ON_NETWORK

    @property
    def runs_dir(self) -> Path:
        return self.data_dir / "runs"

    @property
    def datasets_dir(self) -> Path:
        return self.data_dir / "datasets"

    @property
    def cache_dir(self) -> Path:
        return self.data_dir / "cache"


class WorkerSettings(Settings):
    """Settings of a process that answers no requests: a mistake in others does not stop it."""

    unused: ClassVar[frozenset[str]] = _OF_THE_SERVER


class PrivateSettings(Settings):
    """Settings of a service on this machine for the user alone, beside which another one for many
    users may be configured."""

    unused: ClassVar[frozenset[str]] = _OF_THE_SERVER | _OF_A_SERVICE
