"""Who sent a request: one of our own pages, another site's page, or a program."""

from enum import Enum, auto
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class Sender(Enum):
    """Browsers set the headers that tell, and pages cannot change them."""

    own_page = auto()
    foreign_page = auto()
    program = auto()  #: or a person who typed the address


class _Place(NamedTuple):
    """An origin without its scheme, in one form."""

    host: str
    port: int | None


def find_sender(headers: Headers) -> Sender:
    """What the headers of a request say.

    What the browser itself says about its page comes first: behind a reverse proxy, `Host` may be
    the proxy's own choice, and a comparison with the page's origin then tells nothing. Browsers
    leave that out at addresses without TLS, where the origins are compared.
    """
    site = headers.get("Sec-Fetch-Site", "none").lower()
    if site == "same-origin":
        return Sender.own_page
    if site != "none":
        return Sender.foreign_page
    origin = headers.get("Origin")
    if origin is None:
        return Sender.program
    return Sender.own_page if _is_same(origin, headers.get("Host", "")) else Sender.foreign_page


def describe_mismatch(headers: Headers) -> str:
    """What to look at if a page of this service was taken for a foreign one; empty if none was."""
    origin, host = headers.get("Origin", ""), headers.get("Host", "")
    if headers.get("Sec-Fetch-Site") or "://" not in origin:
        return ""
    return (
        f"; its origin is {origin[:100]!r}, but Host is {host[:100]!r}: a reverse proxy must pass "
        "on the browser's own (nginx: proxy_set_header Host $http_host)"
    )


def _is_same(origin: str, host: str) -> bool:
    """Whether `Host` is that of the origin: in any letter case, with the default port or without.

    `Host` has no scheme, so that the origin's decides which port is the default.
    """
    scheme, separator, place = origin.partition("://")
    default = _DEFAULT_PORTS.get(scheme.lower())
    if not separator or default is None:
        return False
    own, sent = _parse(host, default=default), _parse(place, default=default)
    return own is not None and own == sent


def _parse(text: str, *, default: int) -> _Place | None:
    """None if the text is no host with an optional port."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    is_plain = (
        text != "" and "@" not in text and (parts.path, parts.query, parts.fragment) == ("",) * 3
    )
    return _Place(host.rstrip("."), port or default) if host and is_plain else None
