"""Numbers that every store, answer and page can hold.

JSON knows neither NaN nor infinity (RFC 8259, section 6), PostgreSQL refuses them in JSON, and
SQLite stores NaN as null. So a number that is not finite becomes None wherever it is stored.
"""

import math
from collections.abc import Mapping
from typing import Any


def make_finite(value: Any) -> Any:
    """The value with None for each number that is not finite, also inside of lists and mappings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: make_finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [make_finite(each) for each in value]
    return value


def find_not_finite(values: Mapping[str, Any]) -> list[str]:
    """The names of the values that are not finite, or have such a number in them."""
    return [name for name, value in values.items() if _has_not_finite(value)]


def _has_not_finite(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, Mapping):
        return any(map(_has_not_finite, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_not_finite, value))
