"""The built-in options (loss configurations to compare) and the choices of their settings.

Plain data, so that the command line can list them without importing pydantic. A new built-in option
needs a member of `BuiltInOption` and an entry in `OPTIONS`. Users add their own as rows of
`server.models.tables.OwnOption`.
"""

from enum import StrEnum
from typing import Any, Final, NamedTuple

#: Names of options and data sets: safe in a path, a file name and a table cell.
NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"


class BuiltInOption(StrEnum):
    """The loss configurations that need no definition; nobody can change them."""

    a = "a"
    b = "b"
    c = "c"


class ClassWeighting(StrEnum):
    """Weighting of the classes (colours) in the loss; see `worker.losses`."""

    none = "none"
    inverse = "inverse"
    sqrt_inverse = "sqrt_inverse"
    balanced = "balanced"
    effective_number = "effective_number"


#: The β of `effective_number` unless a job has its own; before that was a setting, of all jobs.
EFFECTIVE_NUMBER_BETA: Final = 0.9999


class BetaSchedule(StrEnum):
    """Course of β over a job's steps; see `worker.losses`."""

    linear_warmup = "linear_warmup"
    constant = "constant"
    cyclical = "cyclical"


class OptionPreset(NamedTuple):
    """An option's settings, those that differ from the defaults, and a summary."""

    config: dict[str, Any]
    summary: str


OPTIONS: Final[dict[BuiltInOption, OptionPreset]] = {
    BuiltInOption.a: OptionPreset(
        {"focal_gamma": 2.0, "class_weighting": ClassWeighting.none},
        "baseline: focal γ 2, no class weights; expected to collapse to all-black",
    ),
    BuiltInOption.b: OptionPreset(
        {"focal_gamma": 2.0, "class_weighting": ClassWeighting.sqrt_inverse},
        "proposed: focal γ 2, square root of the inverse class weights (about 11:1)",
    ),
    BuiltInOption.c: OptionPreset(
        {"focal_gamma": 1.0, "class_weighting": ClassWeighting.inverse},
        "fallback: focal γ 1, inverse class weights (about 123:1); expected to over-paint",
    ),
}
QUICK_TEST: Final[dict[str, Any]] = {"epochs": 5, "checkpoint_every": 1}
