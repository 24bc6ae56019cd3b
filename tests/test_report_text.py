"""How reports, pictures and tables of studies show names that a user chose."""

from typing import Any

import pytest

from server.judging.charts import draw_name
from server.judging.methods import MIN_PASS_RATE, describe_overlap
from server.judging.statistics import decide_in_looks
from server.judging.tables import guard_text
from server.texts import escape_markdown, show_controls


def test_methods_state_the_pass_rate_that_the_decision_uses() -> None:
    assert decide_in_looks.__kwdefaults__["min_pass_rate"] == MIN_PASS_RATE


def make_summary(val: int, test: int) -> dict[str, Any]:
    overlap = {name: {"exact": 0, "by_orbit": n} for name, n in {"val": val, "test": test}.items()}
    return {"num_val": 10_000, "num_test": 5000, "overlap": overlap}


@pytest.mark.parametrize(
    ("summaries", "text"),
    [
        ([], ""),
        ([{"num_val": 10_000}], ""),
        (
            [make_summary(0, 0)],
            "No validation or test grid occurs in training, not even turned or reflected. ",
        ),
        (
            [{}, make_summary(964, 0), make_summary(900, 0)],
            "Up to 964 of 10,000 validation grids occur in training too, some turned or "
            "reflected. ",
        ),
        (
            [make_summary(1, 0), make_summary(0, 2345)],
            "Up to 1 of 10,000 validation grids and 2,345 of 5,000 test grids occur in training "
            "too, some turned or reflected. ",
        ),
    ],
)
def test_methods_say_how_many_grids_are_in_training_too(
    summaries: list[dict[str, Any]], text: str
) -> None:
    assert describe_overlap(summaries) == text


@pytest.mark.parametrize("name", ["x" * 200, "漢字 שלום", "$x_{$", "_hidden", "\\frac", "🦖\u202e"])
def test_pictures_draw_names_whole_and_without_commands(name: str) -> None:
    drawn = draw_name(name)
    assert len(drawn) <= 60
    assert "\u202e" not in drawn
    assert set("漢字🦖") & set(drawn) == set("漢字🦖") & set(name)


@pytest.mark.parametrize("mark", ["=", "+", "-", "@", "\t", "\r", "\n", "＝"])
def test_text_that_a_spreadsheet_would_compute_gets_an_apostrophe(mark: str) -> None:
    assert guard_text(f"{mark}1") == f"'{mark}1"
    assert guard_text(f"a{mark}1") == f"a{mark}1"


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("b beta=0.5", "b beta=0.5"),
        ("not_mode_collapsed", "not_mode_collapsed"),
        ("_x_ *y* ~z~", "\\_x\\_ \\*y\\* \\~z\\~"),
        ("a|b <i>&amp;", "a\\|b &lt;i>&amp;amp;"),
        ("https://x www.x", "`https://x` `www.x`"),
        ("a\u2028b\u202ec", "a b\\[U+202E\\]c"),
        ("שלום", "\u2068שלום\u2069"),
    ],
)
def test_markdown_shows_a_name_literally(name: str, escaped: str) -> None:
    assert escape_markdown(name) == escaped


def test_only_characters_that_turn_the_direction_are_named() -> None:
    assert show_controls("a\u202eb\u2066c é שלום") == "a[U+202E]b[U+2066]c é שלום"
