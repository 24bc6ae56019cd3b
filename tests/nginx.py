"""A real nginx in front of a real server, with the configurations of the documentation."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

BINARY: Final = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
NEEDS_NGINX: Final = [
    pytest.mark.skipif(BINARY is None, reason="no nginx (Debian's package is nginx)"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates"),
]

_PAGE: Final = Path(__file__).parent.parent / "docs/how-to/reverse-proxy.md"
_FOLDERS: Final = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
_START_SECONDS: Final = 10.0


def read_documented(name: str) -> str:
    """The configuration of the documentation for this `server_name`."""
    blocks = re.findall(r"```nginx\n(.*?)```", _PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if f"server_name {name};" in block]
    return str(block)


def make_certificate(folder: Path, *, names: list[str]) -> Path:
    """A certificate that signs itself, and its key beside it."""
    path = folder / "own.pem"
    alternatives = ",".join([*(f"DNS:{name}" for name in names), "IP:127.0.0.1"])
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         f"/CN={names[0]}", "-addext", f"subjectAltName={alternatives}", "-keyout",
         path.with_suffix(".key"), "-out", path],
        check=True, capture_output=True,
    )  # fmt: skip
    return path


def adapt(block: str, *, port: int, upstream: int, certificate: Path | None = None) -> str:
    """A server block with free ports, and with this certificate."""
    block = re.sub(r"listen \S+?( ssl)?;", rf"listen 127.0.0.1:{port}\1;", block)
    block = re.sub(r"127\.0\.0\.1:8000", f"127.0.0.1:{upstream}", block)
    if certificate is not None:
        key = certificate.with_suffix(".key")
        block = re.sub(r"ssl_certificate \s*\S+;", f"ssl_certificate {certificate};", block)
        block = re.sub(r"ssl_certificate_key \s*\S+;", f"ssl_certificate_key {key};", block)
    return block


@contextmanager
def running_nginx(folder: Path, *blocks: str, port: int) -> Iterator[None]:
    """nginx with these server blocks, once it listens on the port."""
    assert BINARY is not None
    temporary = "\n".join(f"{name}_temp_path {folder}/{name};" for name in _FOLDERS)
    path = folder / "nginx.conf"
    path.write_text(
        "\n".join([
            "daemon off; worker_processes 1;",
            "user root;" if os.geteuid() == 0 else "",
            f"pid {folder}/nginx.pid; error_log {folder}/error.log warn;",
            "events {}",
            f"http {{ access_log off; {temporary}",
            *blocks,
            "}",
        ])
    )  # fmt: skip
    process = subprocess.Popen([BINARY, "-p", folder, "-c", path, "-e", folder / "error.log"])
    try:
        _wait_until_it_listens(port, process=process, log=folder / "error.log")
        yield
    finally:
        process.terminate()
        process.wait(timeout=_START_SECONDS)


def _wait_until_it_listens(port: int, *, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "nginx does not listen"
            time.sleep(0.05)
