"""Progress in a terminal: lines that change in place."""

from collections.abc import Hashable
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text


class LiveLines:
    """One line per key with a bar. Without a terminal, a line is printed when its state changes.

    Output that is not taken, as on a full disk, is left out: it must not end what it is about.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[numbers]}", markup=False),
            TextColumn("{task.fields[left]}", style="dim", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, Hashable] = {}

    def __enter__(self) -> Self:
        with suppress(OSError):
            self._progress.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._progress.stop()

    @property
    def is_live(self) -> bool:
        return not self._progress.disable

    def show(self, key: str, *, label: str, completed: float, numbers: str, left: str = "") -> None:
        """Set a line of the terminal; `completed` is from 0 to 1."""
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(label, total=1.0, numbers="", left="")
        self._progress.update(self._tasks[key], completed=completed, numbers=numbers, left=left)

    def print_change(self, key: str, line: str, *, state: Hashable) -> None:
        """Print the line unless the key has had this state before."""
        if self._printed.get(key) != state:
            self._printed[key] = state
            with suppress(OSError):
                self._console.print(Text(line.rstrip()), soft_wrap=True)


def describe_seconds_left(seconds: float | None) -> str:
    """`1:05 left`, `2:00:10 left`; nothing if it is not known."""
    return "" if seconds is None else f"{format_duration(seconds)} left"


def format_duration(seconds: float) -> str:
    """`1:05`, or `2:00:10` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
