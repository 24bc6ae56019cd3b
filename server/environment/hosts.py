"""Hosts, addresses and networks: as settings give them, and whether a request's is one of them."""

import ipaddress
import re
from collections.abc import Iterable
from typing import Final

LOOPBACK_NAMES: Final = ("localhost", "127.0.0.1", "::1")

_LABEL: Final = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME: Final = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")
_SCHEME: Final = re.compile(r"https?://", re.IGNORECASE)
_PORT: Final = re.compile(r":[0-9]{1,5}$")
_PATH: Final = re.compile(r"(/(?!\.)([A-Za-z0-9._~@+:-]|%[0-9A-Fa-f]{2})+)*")
_MAX_NAME_LENGTH: Final = 253


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    host = strip_brackets(host).lower()
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def strip_brackets(host: str) -> str:
    """`::1` for `[::1]`."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def parse_address(given: str) -> str:
    """The one address or name of a machine in its form: lower case, without brackets and the dot of
    the root. Raises ValueError."""
    host = strip_brackets(given).lower().removesuffix(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host.isascii():
        host = _encode(host)
    if len(host) > _MAX_NAME_LENGTH or host.startswith("*") or not _NAME.fullmatch(host):
        raise ValueError(
            "must be an address such as 127.0.0.1 or a machine's name, without http:// and without "
            "a port, which is LOSSLAB_PORT or --port"
        )
    return host


def parse_root_path(given: str) -> str:
    """The path below which the service is reached: `/losslab`, or nothing. Raises ValueError."""
    path = f"/{given.strip('/')}".rstrip("/")
    if not _PATH.fullmatch(path):
        raise ValueError(
            "must be a path such as /losslab, without a host; after % come two hexadecimal digits"
        )
    return path


def parse_allowed_hosts(entries: Iterable[str]) -> tuple[str, ...]:
    """The names in one form, each once: lower case, without scheme, port and the dot of the root.

    Raises ValueError, which says which entry is wrong.
    """
    return tuple(dict.fromkeys(_parse_entry(*entry) for entry in enumerate(entries, start=1)))


def is_allowed(host: str, *, allowed: tuple[str, ...]) -> bool:
    """Whether a request's host, without port, is one of the allowed ones, or below `*.` of one.

    Nothing is refused if nothing is listed. This machine's own names are always allowed: pages of
    other sites cannot have them.
    """
    host = host.lower().rstrip(".")
    names = {*allowed, *LOOPBACK_NAMES}
    parents = (host.split(".", number)[-1] for number in range(1, host.count(".") + 1))
    return not allowed or host in names or any(f"*.{parent}" in names for parent in parents)


def parse_networks(entries: Iterable[str]) -> tuple[str, ...]:
    """Addresses and networks in one form, each once. Raises ValueError."""
    return tuple(dict.fromkeys(_parse_network(*entry) for entry in enumerate(entries, start=1)))


def is_within(address: str, networks: Iterable[str]) -> bool:
    """Whether an address is in one of the networks; a text that is no address is in none."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(found in ipaddress.ip_network(network) for network in networks)


def find_network(address: str) -> str:
    """Who is at an address: the /64 of one of IPv6, all of which one customer usually has.

    IPv4 addresses, also those that are written as IPv6, and other texts stand for themselves.
    """
    if ":" not in address:
        return address
    try:
        found = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    if found.ipv4_mapped:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))


def _parse_network(number: int, entry: str) -> str:
    try:
        network = ipaddress.ip_network(strip_brackets(entry))
    except ValueError:
        raise ValueError(
            "must list addresses or networks such as 127.0.0.1 or 172.16.0.0/12, separated by "
            f"commas; entry {number} is none"
        ) from None
    is_single = network.num_addresses == 1
    return str(network.network_address if is_single else network)


def _parse_entry(number: int, entry: str) -> str:
    host = _SCHEME.sub("", entry, count=1).rstrip("/").lower()
    if address := _find_address(host):
        return address
    host = _PORT.sub("", host).rstrip(".")
    if not host.isascii():
        host = _encode(host)
    if host == "*":
        raise ValueError("does not take * alone: name each host, or all below one as *.example.org")
    if len(host) > _MAX_NAME_LENGTH or not _NAME.fullmatch(host):
        raise ValueError(
            f"must list names such as lab.example.org or *.example.org, separated by commas; "
            f"entry {number} is none"
        )
    return host


def _find_address(host: str) -> str | None:
    """The address if the host is one, such as `[::1]:8000`."""
    for text in (host, strip_brackets(host), strip_brackets(_PORT.sub("", host))):
        try:
            return str(ipaddress.ip_address(text))
        except ValueError:
            continue
    return None


def _encode(host: str) -> str:
    """A name beyond ASCII as requests have it; empty if there is no such name."""
    prefix, name = ("*.", host[2:]) if host.startswith("*.") else ("", host)
    try:
        return prefix + name.encode("idna").decode("ascii")
    except UnicodeError:
        return ""
