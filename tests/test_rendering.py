"""Parts of the pages: reduced curves, embedded data, lists of epochs."""

import json

import numpy as np
import pytest

from server.dashboard.rendering import encode_data, format_epochs
from server.judging.thinning import thin


def test_data_for_scripts_cannot_leave_its_element() -> None:
    label = "</script><script>alert(1)</script><!-- & \u2028"
    data = encode_data({"label": label})
    assert json.loads(data) == {"label": label}
    assert "<" not in data
    assert ">" not in data


def test_thinned_curve_keeps_its_ends_and_peaks() -> None:
    curve = np.arange(2000) % 7.0
    curve[777], curve[1500] = 100.0, -100.0
    kept = thin(curve, limit=200).tolist()
    assert len(kept) <= 200
    assert kept == sorted(set(kept))
    assert {0, 777, 1500, 1999} <= set(kept)
    assert thin(curve[:200], limit=200).tolist() == list(range(200))


def test_thinned_curve_may_have_gaps() -> None:
    assert thin(np.full(1000, np.nan), limit=100).tolist() == [0, 999]
    curve = np.full(1000, np.nan)
    curve[500] = 1.0
    assert thin(curve, limit=100).tolist() == [0, 500, 999]


@pytest.mark.parametrize(
    ("epochs", "text"),
    [
        ([], "–"),
        ([3], "3"),
        ([1, 2, 3, 5], "1–3, 5"),
        ([1, 3, 5, 7, 9, 11], "1, 3, 5, 7 and 2 more"),
    ],
)
def test_epochs_are_listed_in_runs(epochs: list[int], text: str) -> None:
    assert format_epochs(epochs) == text
