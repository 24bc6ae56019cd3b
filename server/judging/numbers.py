"""Formatting of values for reports, pages and the command line."""

from typing import Final

NO_VALUE: Final = "–"
#: The symbol of a criterion's status.
STATUS_MARKS: Final = {
    "passed": "✓",
    "failed": "✗",
    "no_data": NO_VALUE,
    "not_applicable": NO_VALUE,
}


def format_number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits: `0.0517`."""
    return NO_VALUE if value is None else f"{value:.{digits}g}"


def format_decimals(value: float | None, digits: int = 2) -> str:
    """A number with `digits` decimals, for columns of numbers: `0.05`."""
    return NO_VALUE if value is None else f"{value:.{digits}f}"


def format_share(share: float | None) -> str:
    """A share between 0 and 1 as `83.2%`."""
    return NO_VALUE if share is None else f"{share:.1%}"


def format_criterion(status: str, value: float | None) -> str:
    """`✓ 0.832`, `✗ 0.001` or `– no data`."""
    shown = "no data" if value is None else format_number(value, 4)
    return f"{STATUS_MARKS[status]} {shown}"
