"""What the attackers of `benchmarks.attacks` do: one function for each attack, registered by name.

Each call is one try of one attacker. It returns what the server answered, or raises OSError or
HTTPException.
"""

import http.client
import io
import json
import socket
import struct
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final
from urllib.parse import urlsplit

import numpy as np

ATTACKERS: Final = 20
#: Of somebody who may only read.
READ_TOKEN: Final = "somebody-who-may-only-read"
_TIMEOUT_SECONDS: Final = 30.0
#: Connections or streams that one attacker holds open at once.
_NUM_HELD: Final = 55
_held = threading.local()


@dataclass(frozen=True)
class Target:
    """The server, a job that trains, and large jobs that have ended."""

    url: str
    job_id: str
    compared: tuple[str, ...]

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None and parts.port is not None
        return parts.hostname, parts.port


Attack = Callable[[Target, int], str]
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    """Register an attack by the name of its function."""
    ATTACKS[function.__name__] = function
    return function


def find_source(number: int) -> tuple[str, int]:
    """The address of an attacker: four share each."""
    return f"127.0.0.{2 + number % 5}", 0


def connect(target: Target, number: int) -> socket.socket:
    return socket.create_connection(
        target.address, timeout=_TIMEOUT_SECONDS, source_address=find_source(number)
    )


def ask(
    target: Target,
    number: int,
    path: str,
    *,
    method: str = "GET",
    body: bytes | None = None,
    token: str = READ_TOKEN,
    **headers: str,
) -> str:
    connection = http.client.HTTPConnection(
        *target.address, timeout=_TIMEOUT_SECONDS, source_address=find_source(number)
    )
    given = {"Authorization": f"Bearer {token}"} if token else {}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body=body, headers=given)
        answer = connection.getresponse()
        answer.read()
        return str(answer.status)
    finally:
        connection.close()


def hold(target: Target, number: int, first_bytes: bytes) -> str:
    """One more connection of this attacker that sends this much; the oldest one is closed."""
    lines: list[socket.socket] = _held.__dict__.setdefault("lines", [])
    lines.append(connect(target, number))
    lines[-1].sendall(first_bytes)
    if len(lines) > _NUM_HELD:
        lines.pop(0).close()
    return "held"


# -- without a token


@attack
def silent_connections(target: Target, number: int) -> str:
    """More than a thousand connections say nothing, and are opened again and again."""
    return hold(target, number, b"")


@attack
def half_a_head(target: Target, number: int) -> str:
    """More than a thousand connections send half of their headers."""
    return hold(target, number, b"GET /jobs HTTP/1.1\r\nHost: local")


@attack
def half_a_login(target: Target, number: int) -> str:
    """More than a thousand logins whose form does not come."""
    head = "POST /ui/login HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: same-origin\r\n"
    head += "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 50\r\n\r\nt"
    return hold(target, number, head.encode())


@attack
def escaped_cookies(target: Target, number: int) -> str:
    """Cookies of nothing but escapes."""
    cookie = 'losslab_token="' + '\\"' * 7000 + '"'
    return ask(target, number, "/jobs", token="", Cookie=cookie)


@attack
def many_headers(target: Target, number: int) -> str:
    """Thousands of headers."""
    lines = "".join(f"X-{index}: a\r\n" for index in range(1500))
    with connect(target, number) as line:
        line.sendall(f"GET /jobs HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())
        return line.recv(100).split(b" ")[1].decode()


@attack
def guesses(target: Target, number: int) -> str:
    """Tokens are guessed, each time as somebody else."""
    forwarded = f"10.0.{number}.{time.monotonic_ns() % 250}"
    return ask(target, number, "/jobs", token=f"guess-{forwarded}", X_Forwarded_For=forwarded)


@attack
def broken_uploads(target: Target, number: int) -> str:
    """Uploads without a token."""
    return ask(target, number, "/datasets/x", method="PUT", body=b"x" * 2**20, token="")


# -- with a token that may only read


@attack
def large_comparisons(target: Target, number: int) -> str:
    """Comparisons of all large jobs."""
    return ask(target, number, f"/comparisons?{_compare(target)}")


@attack
def drawn_comparisons(target: Target, number: int) -> str:
    """Curves and reports of all large jobs."""
    name = ("curves.png", "report.html", "report.md")[number % 3]
    return ask(target, number, f"/comparisons/{name}?{_compare(target)}")


@attack
def long_refusals(target: Target, number: int) -> str:
    """Bodies of thousands of unknown fields."""
    body = json.dumps({f"f{index}": 0 for index in range(6000)}).encode()
    path = "/studies?dry_run=true" if number % 2 else "/jobs"
    headers = {"Content_Type": "application/json"}
    return ask(target, number, path, method="POST", body=body, **headers)


@attack
def live_streams(target: Target, number: int) -> str:
    """More than a thousand live streams."""
    head = f"GET /jobs/{target.job_id}/events HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Accept: text/event-stream\r\nAuthorization: Bearer {READ_TOKEN}\r\n\r\n"
    return hold(target, number, head.encode())


@attack
def unread_answers(target: Target, number: int) -> str:
    """Large answers that nobody reads."""
    head = f"GET /comparisons?{_compare(target)} HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Authorization: Bearer {READ_TOKEN}\r\n\r\n"
    return hold(target, number, head.encode())


@attack
def hostile_archives(target: Target, number: int) -> str:
    """Small uploads that claim gigabytes, with a token that may not upload."""
    return ask(target, number, f"/datasets/a{number}", method="PUT", body=make_archive())


def _compare(target: Target) -> str:
    return "&".join(f"job_id={job_id}" for job_id in target.compared)


@cache
def make_archive() -> bytes:
    """An array whose header claims to be 200 MiB long; packed, it takes 200 KB."""
    header = b" " * (200 * 2**20)
    array = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", array + np.zeros(1, dtype=np.uint8).tobytes())
    return file.getvalue()
