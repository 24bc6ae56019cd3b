"""How values are written for people: in reports, on pages and on the command line alike."""

from typing import Final

NO_VALUE: Final = "–"
#: The mark of a criterion's status.
STATUS_MARKS: Final = {"passed": "✓", "failed": "✗", "no_data": NO_VALUE}


def format_number(value: float | None, digits: int = 3) -> str:
    """So many significant digits: `0.0517`."""
    return NO_VALUE if value is None else f"{value:.{digits}g}"


def format_decimals(value: float | None, digits: int = 2) -> str:
    """So many decimals, for columns of numbers: `0.05`."""
    return NO_VALUE if value is None else f"{value:.{digits}f}"


def format_share(share: float | None) -> str:
    """A share of 0 to 1 as `83.2%`."""
    return NO_VALUE if share is None else f"{share:.1%}"


def format_criterion(status: str, value: float | None) -> str:
    """`✓ 0.832`, `✗ 0.001` or `– no data`."""
    shown = "no data" if value is None else format_number(value, 4)
    return f"{STATUS_MARKS[status]} {shown}"
