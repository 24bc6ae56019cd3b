"""Logs: on a disk that is full, and with what a terminal would obey."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_outages import ballast, tmpfs

from server.logs import FileLog, LineFormatter


@contextmanager
def logging_to(path: Path) -> Iterator[logging.Logger]:
    handler, logger = FileLog(path), logging.getLogger("losslab.tests")
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        handler.close()


def test_log_on_a_full_disk_loses_lines_and_says_how_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    with tmpfs(disk, megabytes=1), logging_to(disk / "job.log") as logger:
        logger.warning("before")
        with ballast(disk / "ballast"):
            for _ in range(100):
                logger.warning("x" * 5000)
        logger.warning("after")
        logger.warning("later")
        lines = (disk / "job.log").read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-3:] == ["100 lines are missing: the log could not be written", "after", "later"]
    assert {line.strip("x") for line in lines[1:-3]} <= {""}
    assert "Traceback" not in "".join(capsys.readouterr())


def test_log_that_is_closed_on_a_full_disk_raises_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with tmpfs(disk, megabytes=1), logging_to(disk / "job.log") as logger, ballast(disk / "b"):
        logger.warning("x" * 5000)


def test_traceback_shows_controls_and_keeps_its_lines() -> None:
    try:
        raise ValueError("\x1b[2J\x9b5m\x1b]0;title\x07 of a user\nand more\r\u2028")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed\nhere", (), sys.exc_info())
    record.__dict__["context"] = ""
    text = LineFormatter("%(message)s%(context)s").format(record)
    first, *traceback = text.split("\n")
    assert first == "failed here"
    assert traceback[0] == "Traceback (most recent call last):"
    assert "ValueError: [U+001B][2J[U+009B]5m[U+001B]]0;title[U+0007] of a user" in traceback
    assert traceback[-1] == "and more[U+000D][U+2028]"
