"""Where settings are read from: environment variables and secret files, tidied."""

import re
from typing import Any, Final

from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
)

from server.environment.variables import tidy

#: What Kubernetes sets in every pod of a namespace that has a service called `losslab`. Only the
#: first of its variables has the name of a setting.
_SERVICE_ADDRESS: Final = re.compile(r"(tcp|udp|sctp)://.*", re.IGNORECASE)


class Variables(EnvSettingsSource):
    """The environment variables of the settings."""

    def __call__(self) -> dict[str, Any]:
        return _choose(super().__call__(), settings_class=self.settings_cls)


class SecretFiles(SecretsSettingsSource):
    """The files in which container engines put secrets."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        try:
            return super().get_field_value(field, field_name)
        except UnicodeDecodeError:
            # No setting takes this character, so that the check of the field refuses the file.
            return "\N{REPLACEMENT CHARACTER}", field_name, False

    def __call__(self) -> dict[str, Any]:
        return _choose(super().__call__(), settings_class=self.settings_cls)


def list_sources(
    settings_class: type[BaseSettings],
    *,
    init: PydanticBaseSettingsSource,
    secret_files: PydanticBaseSettingsSource,
) -> tuple[PydanticBaseSettingsSource, ...]:
    """What settings are read from, the first one first."""
    assert isinstance(secret_files, SecretsSettingsSource)
    files = SecretFiles(settings_class, secrets_dir=secret_files.secrets_dir)
    return init, Variables(settings_class), files


def _choose(values: dict[str, Any], *, settings_class: type[BaseSettings]) -> dict[str, Any]:
    """The values that count, tidied. An empty one counts as not set."""
    unused: frozenset[str] = getattr(settings_class, "unused", frozenset())
    tidied = {
        name: tidy(value) if isinstance(value, str) else value
        for name, value in values.items()
        if name not in unused
    }
    return {
        name: value
        for name, value in tidied.items()
        if value != "" and not (name == "port" and _SERVICE_ADDRESS.fullmatch(str(value)))
    }
