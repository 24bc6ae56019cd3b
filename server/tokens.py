"""API tokens: the client has 256 random bits, the settings their hash."""

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Final, Self

from server.errors import InvalidInputError

_NAME_PATTERN: Final = r"[A-Za-z0-9_.-]{1,64}"
_ENTRY_PATTERN: Final = re.compile(rf"({_NAME_PATTERN}):(read|full):([0-9a-f]{{64}})")
_NUM_BYTES: Final = 32
#: Shorter secrets are tried out in no time; they open nothing, whatever hash the settings have.
MIN_SECRET_LENGTH: Final = 6
#: What a service needs that others can reach, and so can guess at all day.
MIN_LENGTH_ON_NETWORK: Final = 16
#: The name of the token that LOSSLAB_API_TOKEN is.
DEFAULT_NAME: Final = "default"
#: What every HTTP client and proxy passes on in a header, and fits into a cookie.
_SECRET_PATTERN: Final = re.compile(r"[!-~]{0,2048}")
#: What a script hashes by mistake, and what people type first; each also with a line's end.
_WEAK_SECRETS: Final = ("", "admin", "changeme", "losslab", "password", "secret", "test", "token")


class TokenNameError(InvalidInputError):
    """A token cannot have this name."""


class TokenScope(StrEnum):
    read = "read"  #: may read everything
    full = "full"  #: may also change everything


@dataclass(frozen=True, slots=True)
class ApiToken:
    """A token as the settings store it. A plain SHA-256 is safe: nobody can guess 256 bits."""

    name: str
    scope: TokenScope
    sha256: str

    @classmethod
    def parse(cls, entry: str) -> Self:
        """Read `NAME:SCOPE:SHA256`. Raises ValueError."""
        if not (match := _ENTRY_PATTERN.fullmatch(entry)):
            raise ValueError(
                "an API token reads NAME:read:SHA256 or NAME:full:SHA256, with 64 lower-case "
                "hexadecimal digits; `losslab token NAME` makes one"
            )
        if match[3] in _weak_hashes():
            raise ValueError(
                f"the API token {match[1]!r} has the hash of an empty or well-known secret; "
                f"`losslab token {match[1]}` makes one that nobody can guess"
            )
        return cls(match[1], TokenScope(match[2]), match[3])

    @classmethod
    def of(cls, secret: str, *, name: str, scope: TokenScope = TokenScope.full) -> Self:
        """The settings' form of the token `secret`. Raises TokenNameError."""
        if not re.fullmatch(_NAME_PATTERN, name):
            raise TokenNameError(f"a token's name has letters, digits, . _ and -, not {name!r}")
        return cls(name, scope, hash_token(secret))

    def __str__(self) -> str:
        return f"{self.name}:{self.scope}:{self.sha256}"


def parse_tokens(entries: Iterable[str]) -> tuple[ApiToken, ...]:
    """Tokens of the settings, with names of their own: rates and keys go by them.

    Raises ValueError.
    """
    tokens: dict[str, ApiToken] = {}
    for token in map(ApiToken.parse, entries):
        if token.name in tokens or token.name == DEFAULT_NAME:
            other = "LOSSLAB_API_TOKEN" if token.name == DEFAULT_NAME else "another API token"
            raise ValueError(f"{other} is called {token.name!r} already; give each its own name")
        if any(token.sha256 == each.sha256 for each in tokens.values()):
            raise ValueError(f"the API token {token.name!r} has the hash of another one")
        tokens[token.name] = token
    return tuple(tokens.values())


def find_token(secret: str, tokens: Iterable[ApiToken], *, min_length: int) -> ApiToken | None:
    """The token of this secret, if any. Comparing takes the same time for every wrong secret."""
    if len(secret) < min_length:
        return None
    given = hash_token(secret)
    found = None
    for token in tokens:
        if secrets.compare_digest(given, token.sha256):
            found = token
    return found


def check_secret(secret: str) -> None:
    """Raise ValueError for a token that no request can carry. The message does not show it."""
    if not _SECRET_PATTERN.fullmatch(secret):
        raise ValueError(
            "must have printable ASCII letters only, without blanks, at most 2048: nothing else "
            "is safe in an HTTP header; `losslab token NAME` makes one"
        )


def check_strength(secret: str) -> None:
    """Raise ValueError for a token that a server must not accept. The message does not show it."""
    if 0 < len(secret) < MIN_SECRET_LENGTH:
        raise ValueError(
            f"must have at least {MIN_SECRET_LENGTH} characters, not {len(secret)}, and "
            f"{MIN_LENGTH_ON_NETWORK} if others can reach the service; `losslab token NAME` makes "
            "one"
        )


@cache
def _weak_hashes() -> frozenset[str]:
    return frozenset(hash_token(secret + end) for secret in _WEAK_SECRETS for end in ("", "\n"))


def new_secret() -> str:
    return secrets.token_hex(_NUM_BYTES)


def hash_token(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
