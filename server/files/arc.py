"""ARC tasks (Chollet, 2019) as JSON: recognised, read as untrusted input, split and padded.

A task has pairs of an input and an output grid, in `train` and in `test`. Corpora come as one file
per task, as one object of many tasks by their ids (the outputs of `test` may be in a file of their
own, the solutions), or as a list of pairs per task.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np

from server.files.npz import MAX_GRID_SIZE, MAX_UNPACKED_BYTES, SPLITS, DatasetError, Grids
from server.models.configuration import NUM_COLOURS

#: Python needs about thirty times as much memory for the lists of a JSON text.
MAX_JSON_BYTES: Final = 2**25
_SPLIT_SEED: Final = 0
_MAX_QUOTED, _HUGE = 50, 10**20
#: Stands for each number that is not whole. None is a colour, and some take long to convert.
_FRACTION: Final = object()
_PAIR: Final = ("input", "output")
#: Names of arrays, and so not of tasks.
_KEYS: Final = {*SPLITS, "images"}
_ALLOWED: Final = frozenset(range(NUM_COLOURS))


class NoTaskError(DatasetError):
    """JSON of something else, which a zip of a repository may hold beside its tasks."""


@dataclass(slots=True)
class Task:
    """The grids (H, W) of a task: a list of one or two for each of its pairs."""

    name: str
    train: list[list[Grids]]
    test: list[list[Grids]] = field(default_factory=list)
    #: Whether its file says that it is for evaluation.
    is_evaluation: bool = False

    @property
    def pairs(self) -> list[list[Grids]]:
        return [*self.train, *self.test]

    def is_same(self, other: "Task") -> bool:
        """Whether the training pairs are the same; one of the two may lack outputs of its tests."""
        return len(self.train) == len(other.train) and all(
            len(mine) == len(theirs) and all(map(np.array_equal, mine, theirs))
            for mine, theirs in zip(self.train, other.train, strict=True)
        )

    def take_from(self, other: "Task") -> None:
        """Take the tests of the same task from elsewhere if they hold more."""
        if sum(map(len, other.test)) > sum(map(len, self.test)):
            self.test = other.test


@dataclass(slots=True)
class Corpus:
    """Tasks by their ids, and the outputs of tests from files of their own."""

    #: Several where tasks for training and tasks for evaluation have the same names.
    tasks: dict[str, list[Task]] = field(default_factory=dict)
    #: By the id of a task and whether it is for evaluation.
    solutions: dict[tuple[str, bool], list[list[Grids]]] = field(default_factory=dict)
    #: Tasks that were there already.
    num_repeated: int = 0
    #: Files that held something else.
    left_out: list[str] = field(default_factory=list)
    num_left_out_bytes: int = 0

    def add_file(self, content: bytes, *, name: str) -> None:
        """Add what a JSON file has. Raises DatasetError."""
        value, path = _parse(content), PurePosixPath(name)
        is_evaluation = any("evaluation" in part.lower() for part in path.parts)
        if is_solutions(value):
            for task in value:
                outputs = [[_read_grid(grid, task)] for grid in value[task]]
                self.solutions[task, is_evaluation] = outputs
            return
        for task in _read_tasks(value, name=path.stem):
            task.is_evaluation = is_evaluation
            self._add_task(task)

    def _add_task(self, task: Task) -> None:
        """Nothing is lost: another task of the same name is kept beside the first, or, if both are
        for the same splits, within it, since two versions of a task may not be in two splits."""
        known = self.tasks.setdefault(task.name, [])
        if same := next((other for other in known if other.is_same(task)), None):
            same.take_from(task)
            self.num_repeated += 1
        elif sibling := next((o for o in known if o.is_evaluation is task.is_evaluation), None):
            sibling.train += task.train
            sibling.test += task.test
        else:
            known.append(task)

    def leave_out(self, name: str, *, num_bytes: int) -> None:
        """Note a file that holds something else. Raises DatasetError if it is too much in all."""
        self.left_out.append(name)
        self.num_left_out_bytes += num_bytes
        if self.num_left_out_bytes > MAX_JSON_BYTES:
            raise DatasetError(
                f"holds more than {MAX_JSON_BYTES} bytes of JSON that is no ARC task, such as "
                f"{', '.join(self.left_out[:3])[:200]}; send the tasks alone"
            )

    def list_tasks(self) -> list[Task]:
        """All tasks by their ids, with the outputs of their tests. Raises DatasetError."""
        if not self.tasks and self.solutions:
            raise DatasetError(
                "holds ARC solutions, the outputs of the tests alone; import the file of the "
                "challenges, or a zip of both"
            )
        if not self.tasks:
            raise DatasetError(f"holds no ARC task, only {', '.join(self.left_out[:3])[:200]}")
        tasks = [task for name in sorted(self.tasks) for task in self.tasks[name]]
        for task in tasks:
            if not any(len(pair) == len(_PAIR) for pair in task.test):
                task.test += self._find_solutions(task)
        return tasks

    def _find_solutions(self, task: Task) -> list[list[Grids]]:
        """Those from beside the task, or else from wherever they are."""
        sides = task.is_evaluation, not task.is_evaluation
        found = (self.solutions.get((task.name, side)) for side in sides)
        return next((outputs for outputs in found if outputs), [])


def is_solutions(value: Any) -> bool:
    """Whether it is an object with a list of grids for each task."""
    if not isinstance(value, dict) or not value or value.keys() & _KEYS:
        return False
    return all(map(_is_list_of_grids, value.values()))


def split_tasks(tasks: list[Task]) -> dict[str, list[Grids]]:
    """The grids of each split, which no task is in two of: a tenth of the tasks each for validation
    and test, or, where some are for evaluation, these for the test and a ninth of the others for
    validation. Fewer than three tasks are split by pair, their own tests last.

    Raises DatasetError if there are fewer than three pairs.
    """
    kept, held_out = (
        [task.pairs for task in tasks if task.is_evaluation is wanted] for wanted in (False, True)
    )
    rng = np.random.default_rng(_SPLIT_SEED)
    if held_out and len(kept) > 1:
        order, num_val = rng.permutation(len(kept)), max(1, len(kept) // 9)
        parts = [kept[i] for i in order[num_val:]], [kept[i] for i in order[:num_val]], held_out
        return _flatten(parts)
    units = [task.pairs for task in tasks]
    if len(units) < len(SPLITS):
        pairs = [pair for task in tasks for pair in task.train]
        pairs += [pair for task in tasks for pair in task.test]
        units = [[pair] for pair in pairs]
        order = np.arange(len(units))
    else:
        order = rng.permutation(len(units))
    if len(units) < len(SPLITS):
        raise DatasetError("needs three tasks, or one of three pairs, for train, val and test")
    num = max(1, len(units) // 10)
    cuts = order[: -2 * num], order[-2 * num : -num], order[-num:]
    return _flatten([[units[i] for i in cut] for cut in cuts])


def stack(
    splits: Mapping[str, list[Grids]], *, pad: int | None, crop: int | None
) -> dict[str, Grids]:
    """Grids of several sizes as arrays (N, S, S), padded with background at the right and below.

    S is `pad` or `crop` or else the smallest size that holds all and is divisible by 4. Grids that
    are larger lose what is right of and below `crop`. Raises DatasetError.
    """
    sides = [max(grid.shape) for grids in splits.values() for grid in grids]
    size = pad or crop or max(4, -(-max(sides) // 4) * 4)
    limit = MAX_GRID_SIZE if pad is None and crop is None else size
    if crop is None and max(sides) > limit:
        num_larger = sum(side > limit for side in sides)
        raise DatasetError(
            f"{num_larger:,} of {len(sides):,} grids are larger than {limit}x{limit} (at most "
            f"{max(sides)}); `losslab data import FILE --crop {limit}` (or ?crop={limit}) keeps "
            "their top left part"
        )
    if len(sides) * size**2 > MAX_UNPACKED_BYTES:
        raise DatasetError(
            f"{len(sides):,} grids of {size}x{size} are more than {MAX_UNPACKED_BYTES} bytes"
        )
    return {split: _stack(grids, size=size) for split, grids in splits.items()}


def _stack(grids: list[Grids], *, size: int) -> Grids:
    stacked = np.zeros((len(grids), size, size), dtype=np.uint8)
    for target, grid in zip(stacked, grids, strict=True):
        part = grid[:size, :size]
        target[: part.shape[0], : part.shape[1]] = part
    return stacked


def _flatten(parts: Iterable[Iterable[Iterable[Iterable[Grids]]]]) -> dict[str, list[Grids]]:
    """The grids of each split, which is a list of units, each a list of pairs."""
    splits = {
        split: [grid for unit in part for pair in unit for grid in pair]
        for split, part in zip(SPLITS, parts, strict=True)
    }
    if empty := [split for split, grids in splits.items() if not grids]:
        raise DatasetError(f"leaves no grid for {empty[0]}")
    return splits


# -- reading


def _parse(content: bytes) -> Any:
    """Raises DatasetError."""
    if len(content) > MAX_JSON_BYTES:
        raise DatasetError(
            f"is JSON of {len(content)} bytes; {MAX_JSON_BYTES} are allowed. A zip with one file "
            "per task may be larger"
        )
    try:
        return json.loads(
            content, parse_constant=_refuse_constant, parse_float=lambda _text: _FRACTION
        )
    except RecursionError:
        raise DatasetError("is JSON that is nested too deeply") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise DatasetError("is several JSON values, one per line; make them one list") from None
        raise DatasetError(f"is no valid JSON (truncated?): {error}") from None
    except ValueError as error:
        raise DatasetError(f"is no valid JSON (truncated?): {error}") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _read_tasks(value: Any, *, name: str) -> Iterator[Task]:
    """The tasks in a value, whichever of the usual forms it has. Raises DatasetError."""
    if _is_task(value):
        yield _read_task(value, name)
    elif _is_list_of_pairs(value):
        yield Task(name, [_read_pair(pair, name) for pair in value])
    elif isinstance(value, list) and value and all(map(_is_task, value)):
        for number, task in enumerate(value):
            yield _read_task(task, f"{name}-{number:06}")
    elif isinstance(value, dict) and value and all(map(_is_task, value.values())):
        for key, task in value.items():
            yield _read_task(task, key)
    else:
        raise NoTaskError(_describe_other(value))


def _describe_other(value: Any) -> str:
    entries = list(value.values()) if isinstance(value, dict) else []
    if entries and all(isinstance(e, list) and e and _is_attempt(e[0]) for e in entries):
        return "is a submission of answers to ARC tasks; import the file of the challenges"
    return (
        "is JSON but no ARC task: an object with train and test, each a list of pairs of input and "
        f"output, or an object of such tasks by their ids{_suggest_array(value)}"
    )


def _suggest_array(value: Any) -> str:
    """The line of Python that makes arrays of grids in another form, if there are any."""
    if _is_list_of_grids(value):
        given = "images=numpy.array(json.load(open(FILE)), dtype='uint8')"
    elif isinstance(value, dict) and any(_is_list_of_grids(value.get(key)) for key in _KEYS):
        given = "**{k: numpy.array(v, 'uint8') for k, v in json.load(open(FILE)).items()}"
    else:
        return ""
    return f". Grids in other forms become arrays: numpy.savez(NEW_FILE, {given})"


def _is_attempt(value: Any) -> bool:
    return isinstance(value, dict) and "attempt_1" in value


def _is_task(value: Any) -> bool:
    return isinstance(value, dict) and _is_list_of_pairs(value.get("train"))


def _is_list_of_pairs(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(pair, dict) and "input" in pair for pair in value)
    )


def _is_list_of_grids(value: Any) -> bool:
    """Looks at the first cell alone."""
    for _ in range(3):
        if not isinstance(value, list) or not value:
            return False
        value = value[0]
    return isinstance(value, int)


def _read_task(value: dict[str, Any], name: str) -> Task:
    test = value.get("test", [])
    if test and not _is_list_of_pairs(test):
        raise DatasetError(f"task {_quote(name)}: test is no list of pairs with an input")
    train = [_read_pair(pair, name) for pair in value["train"]]
    return Task(name, train, [_read_pair(pair, name) for pair in test or []])


def _read_pair(pair: Mapping[str, Any], name: str) -> list[Grids]:
    """The input, and the output unless it is to be found, as in the challenges of a contest."""
    return [_read_grid(pair[key], name) for key in _PAIR if pair.get(key) is not None]


def _read_grid(rows: Any, name: str) -> Grids:
    """A grid (H, W). Raises DatasetError."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise DatasetError(f"task {_quote(name)}: a grid is a list of rows")
    width = len(rows[0])
    if width == 0 or any(len(row) != width for row in rows):
        raise DatasetError(f"task {_quote(name)}: the rows of a grid have different lengths")
    cells = [cell for row in rows for cell in row]
    for cell in cells:
        if type(cell) is not int or cell not in _ALLOWED:
            raise DatasetError(f"task {_quote(name)}: {_quote(cell)} is no colour from 0 to 9")
    return np.frombuffer(bytes(cells), dtype=np.uint8).reshape(len(rows), width)


def _quote(value: object) -> str:
    """What was found, if it is short."""
    if isinstance(value, str) and len(value) <= _MAX_QUOTED:
        return ascii(value)
    if value is _FRACTION:
        return "a number with a point or an exponent"
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) < _HUGE):
        return str(value)
    return f"a {type(value).__name__}"
