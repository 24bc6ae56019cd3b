"""What the environment says about proxies and certificates, for one service.

httpx reads these variables by itself, but gives up at values that other programs understand, and
its errors do not say which variable is meant. No message has a value, which may have a password.
"""

import ipaddress
import os
import ssl
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple
from urllib.request import getproxies, proxy_bypass

import httpx

from server.environment.access import explain
from server.environment.variables import tidy

_LOOPBACK_HOSTS: Final = ("127.0.0.1", "localhost", "::1")
_SCHEMES: Final = ("http", "https", "socks5", "socks5h")
_CERTIFICATES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")


class Proxy(NamedTuple):
    """A proxy, and the variable that names it."""

    url: str
    variable: str


def find_proxy(url: httpx.URL) -> Proxy | None:
    """The proxy for a service, if the environment has one. Raises ValueError."""
    # A proxy cannot reach this machine's loopback address.
    if url.host in _LOOPBACK_HOSTS or _is_bypassed(url):
        return None
    proxies = getproxies()
    for scheme in (url.scheme, "all"):
        if given := tidy(proxies.get(scheme, "")):
            variable = _find_variable(scheme)
            return Proxy(_check(given, variable=variable, host=url.host), variable)
    return None


def load_certificates(url: httpx.URL) -> ssl.SSLContext | bool:
    """The certificates to trust; False where nothing is encrypted. Raises ValueError."""
    if url.scheme != "https":
        return False
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        raise ValueError(_explain_certificates(error)) from None


def _explain_certificates(error: OSError) -> str:
    """Which variable is meant: the one that names the file, else the first that is set."""
    given = {name: path for name in _CERTIFICATES if (path := os.environ.get(name))}
    named = [name for name, path in given.items() if path == error.filename]
    variable = (named or list(given) or [""])[0]
    path = given.get(variable, "")
    if isinstance(error, ssl.SSLError):
        return f"{variable} cannot be used: {path}: it has no certificates"
    return f"{variable} cannot be used: {explain(error, path=Path(path))}"


def _is_bypassed(url: httpx.URL) -> bool:
    """Whether NO_PROXY lists the host: its name, one above it, its address or a network of it."""
    host = url.host
    if ":" not in host and proxy_bypass(host):
        return True
    listed = tidy(getproxies().get("no", ""))
    entries = (entry.strip().strip("[]") for entry in listed.split(","))
    return any(_is_in_network(host, entry) for entry in entries)


def _is_in_network(host: str, entry: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False


def _find_variable(scheme: str) -> str:
    """The variable of a scheme; both spellings count, and the lower case first."""
    names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY")
    return next((name for name in names if os.environ.get(name)), names[1])


def _check(given: str, *, variable: str, host: str) -> str:
    """The proxy's URL. Raises ValueError, which says what helps."""
    remedy = f"unset it, or add {host} to NO_PROXY"
    given = given if "://" in given else f"http://{given}"
    try:
        scheme = httpx.URL(given).scheme
    except (httpx.InvalidURL, ValueError):
        raise ValueError(f"{variable} is no proxy's URL; {remedy}") from None
    if scheme not in _SCHEMES:
        raise ValueError(f"{variable} must begin with http://, https:// or socks5://; {remedy}")
    if scheme.startswith("socks") and find_spec("socksio") is None:
        needed = "pip install 'httpx[socks]'"
        raise ValueError(f"{variable} names a SOCKS proxy, which needs {needed}; or {remedy}")
    return given
