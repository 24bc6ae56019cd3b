"""Text from users: shown whole in any script, and unable to change what stands beside it."""

import io
import json
import logging
import re
import unicodedata
from collections.abc import Callable
from html import unescape
from typing import Any

import matplotlib
import numpy as np
import pytest
from conftest import TINY, drain
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from rich.text import Text
from sqlalchemy import Engine

from server import fonts
from server.cli import views
from server.cli.reporting import InertConsole
from server.logs import LineFormatter
from server.settings import Settings
from server.texts import (
    MAX_LISTED,
    escape_controls,
    escape_encoded_controls,
    escape_markdown,
    isolate,
    list_some,
    make_inert,
    shorten,
    show_controls,
)
from worker.pictures import _draw_title

OVERRIDE = "\u202e"
CONTROLS = ["\u202a", "\u202b", "\u202c", "\u202d", OVERRIDE, *map(chr, range(0x2066, 0x206A))]
COMMANDS = [*CONTROLS, "\x1b", "\x9b", "\u2028", "\u2029", "\r", "\x07", "\u206a"]
#: Names in several scripts, with marks of direction and joined emoji.
NAMES = [
    "漢字 かな 한글",
    "שלום 12",
    "\u200fعربي\u200f (v2)",
    "हिन्दी ไทย",
    "🦖 👨\u200d👩\u200d👧 ❤\ufe0f",
    f"abc{OVERRIDE}gnp.exe",
    "\x9b31m\x9d",
    "a\u2069\u202e b",
]


@pytest.mark.parametrize("control", COMMANDS)
def test_commands_are_shown_and_have_no_effect(control: str) -> None:
    shown = f"a[U+{ord(control):04X}]b"
    assert show_controls(f"a{control}b") == make_inert(f"a{control}b") == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u200bb", "a[U+200B]b"),
        ("\u200d\u200d", "[U+200D][U+200D]"),
        ("\u3164", "[U+3164]"),
        ("\u2800", "[U+2800]"),
        ("b\ufe0f", "b[U+FE0F]"),
        ("b\u200e", "b[U+200E]"),
        ("b\xad", "b[U+00AD]"),
        ("b\U000e0062", "b[U+E0062]"),
        ("1\u2060", "1[U+2060]"),
        *((text, text) for text in ("1\ufe0f\u20e3", "❤\ufe0f\u200d🔥", "\u200fعربي\u200f (v2)")),
        *((text, text) for text in ("می\u200cخواهم", "क्\u200dष", "Zoë", "a\tb\nc")),
        ("🏴\U000e0067\U000e0062\U000e007f",) * 2,
    ],
)
def test_what_cannot_be_seen_is_named_unless_a_letter_needs_it(text: str, shown: str) -> None:
    assert show_controls(text) == shown


@given(st.text(st.characters(categories=["Cc", "Cf", "Zs", "Lo", "Mn"])))
def test_no_text_is_drawn_as_nothing(text: str) -> None:
    ignorable = {"Cc", "Cf", "Zs", "Zl", "Zp", "Mn"}
    seen = {c for c in show_controls(text) if unicodedata.category(c) not in ignorable}
    assert (
        seen or text.isspace() or not text or set(map(unicodedata.category, text)) <= {"Mn", "Zs"}
    )


@given(st.text())
def test_inert_text_has_no_command_and_ends_what_it_begins(text: str) -> None:
    inert = make_inert(text)
    inner = inert.removeprefix("\u2068").removesuffix("\u2069")
    assert not [c for c in inner if c in COMMANDS]
    assert inert.startswith("\u2068") == inert.endswith("\u2069")
    has_rtl = any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)
    assert not has_rtl or inert.startswith("\u2068")


@given(st.text().map(lambda text: {"name": text + OVERRIDE}))
def test_json_has_no_command_and_says_the_same(value: dict[str, str]) -> None:
    raw = json.dumps(value, ensure_ascii=False)
    text = escape_controls(raw)
    assert escape_encoded_controls(raw.encode()) == text.encode()
    assert json.loads(text) == value
    assert not [c for c in text if c in COMMANDS]


@pytest.mark.parametrize("name", ["b", "café", "漢字", "🦖"])
def test_text_from_left_to_right_needs_no_isolate(name: str) -> None:
    assert isolate(name) == name


# -- the terminal


def make_job(name: str) -> dict[str, Any]:
    empty = dict.fromkeys(
        ("train_loss", "train_pixel_accuracy", "val_foreground_recall", "error", "best_epoch")
    )
    job = {
        "id": "3f2a9c51d07e",
        "name": name,
        "option": "b",
        "status": "queued",
        "quick_test": 0,
        "device": None,
    }
    rest = {"epochs_completed": 0, "num_epochs": 2, "dataset_summary": None, "config": {}}
    return job | empty | rest


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [60, 200])
def test_names_move_nothing_in_a_terminal(name: str, width: int) -> None:
    file = io.StringIO()
    console = InertConsole(file=file, width=width, force_terminal=True, no_color=True)
    console.print(views.jobs_table({"data": [make_job(name)], "has_more": False}))
    console.print(views.job_view(make_job(name)))
    for line in re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines():
        assert not [c for c in line if c in COMMANDS and c not in "\u2068\u2069"]
        assert line.count("\u2068") == line.count("\u2069")
        if any(unicodedata.bidirectional(c) in ("R", "AL") for c in line):
            assert "\u2068" in line


def test_terminal_is_sent_no_command_of_a_user() -> None:
    file = io.StringIO()
    InertConsole(file=file).print(Text("a\x1b]0;title\x07b\x9b2Jc"), soft_wrap=True)
    assert file.getvalue() == "a[U+001B]]0;titleb[U+009B]2Jc\n"


# -- pages, reports, tables, logs


@pytest.fixture
def run_named(
    client: TestClient, settings: Settings, engine: Engine
) -> Callable[[list[str]], list[str]]:
    """Run a job for each name, and return their ids."""

    def run(names: list[str]) -> list[str]:
        ids = []
        for name in names:
            labels = {"k": f"label {name}"}
            body = {"option": "b", "name": name, "metadata": labels} | TINY | {"epochs": 1}
            ids.append(client.post("/jobs", json=body).raise_for_status().json()["id"])
        drain(settings, engine)
        return ids

    return run


def list_shown(page: str) -> str:
    """The text of a page outside of what isolates it, without scripts and attributes."""
    page = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    page = re.sub(r"<bdi\b.*?</bdi>", "", page, flags=re.DOTALL)
    page = re.sub(r"\u2068[^\u2068\u2069]*\u2069", "", page)
    return unescape(re.sub(r"<[^>]*>", "", page))


def test_names_are_whole_and_inert_wherever_they_are_shown(
    client: TestClient, run_named: Callable[[list[str]], list[str]]
) -> None:
    names = [" ".join(NAMES[:5]), *NAMES[5:]]
    ids = run_named(names)
    query = "&".join(f"job_id={job_id}" for job_id in ids)
    pages = ["/", "/ui/compare", f"/ui/compare?{query}", f"/comparisons/report.html?{query}"]
    pages += [f"/ui/jobs/{job_id}" for job_id in ids]
    for url in pages:
        page = client.get(url).raise_for_status().text
        outside = list_shown(page)
        assert not [c for c in outside if c in COMMANDS and c not in "\n\r"], url
        assert not [c for c in outside if unicodedata.bidirectional(c) in ("R", "AL")], url
        assert "\u2069" not in re.sub(r"\u2068[^\u2068\u2069]*\u2069", "", page), url
        # Inside, too: also a reader of the page's text may be a terminal.
        assert not [c for c in page if c in COMMANDS and c not in "\u2068\u2069\n"], url
    everything = client.get(f"/comparisons/report.html?{query}").text
    for name in names:
        assert show_controls(name) in unescape(everything)
    markdown = client.get(f"/comparisons/report.md?{query}").raise_for_status().text
    assert not [c for c in markdown if c in CONTROLS and c not in "\u2068\u2069"]
    assert markdown.count("\u2068") == markdown.count("\u2069") > 0
    assert client.get(f"/comparisons/curves.png?{query}").status_code == 200
    assert client.get("/metrics").raise_for_status().text.isascii()
    for job_id, name in zip(ids, names, strict=True):
        assert client.get(f"/jobs/{job_id}").json()["name"] == name  # data are as they were sent
        assert OVERRIDE not in client.get(f"/jobs/{job_id}/log").text
        picture = client.get(f"/jobs/{job_id}/reconstructions/latest.png")
        assert picture.status_code == 200


def test_log_shows_commands() -> None:
    record = logging.LogRecord("a", logging.INFO, "a.py", 1, "a\x1b[2J\u202eb\nc", None, None)
    assert LineFormatter("%(message)s").format(record) == "a[U+001B][2J[U+202E]b c"


# -- pictures


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_pictures_have_letters_for_all_that_is_drawn(text: str) -> None:
    drawn = fonts.make_drawable(text)
    known = set().union(*map(fonts._read_letters, fonts.list_fonts()))
    assert {ord(c) for c in drawn} <= known | {0x09, 0x0A}
    assert "".join(piece for _, piece in fonts.split_by_font(drawn)) == drawn


@pytest.mark.parametrize(
    "name", ["漢字", "かな", "한글", "שלום", "عربي", "हिन्दी", "ไทย", "🦖", "❤"]
)
def test_pictures_have_the_letters_of_many_scripts(name: str) -> None:
    assert fonts.make_drawable(name) == name


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("a\ue000b", "a\ufffdb"),
        ("é\ufe0fç\u200d", "éç"),
        (f"a{OVERRIDE}b", "a[U+202E]b"),
    ],
)
def test_what_no_font_has_is_seen_or_was_nothing(
    monkeypatch: pytest.MonkeyPatch, text: str, drawn: str
) -> None:
    monkeypatch.setattr(fonts, "_read_letters", lambda _path: frozenset(range(0x250)) | {0xFFFD})
    fonts._find_known.cache_clear()
    assert fonts.make_drawable(text) == drawn
    fonts._find_known.cache_clear()


def test_matplotlib_draws_letters_of_other_fonts_without_a_warning() -> None:
    before = list(matplotlib.rcParams["font.family"])
    texts = [fonts.make_drawable(name) for name in NAMES]
    for text in texts:
        fonts.prepare_matplotlib(text)
    assert matplotlib.rcParams["font.family"][: len(before)] == before
    figure = Figure()
    for place, text in enumerate(texts):
        figure.text(0.1, 0.1 * place, text)
    figure.savefig(io.BytesIO(), format="png")  # a missing letter would be a warning, an error here


def test_title_of_a_picture_has_its_letters() -> None:
    drawn = {}
    for title in ("漢", "字", "\ue000", "\ue001"):
        image = Image.new("P", (100, 40), 255)
        _draw_title(ImageDraw.Draw(image), title, at=(5, 20))
        drawn[title] = np.asarray(image).tobytes()
    assert drawn["漢"] != drawn["字"]
    assert drawn["\ue000"] == drawn["\ue001"]  # the replacement


@pytest.mark.parametrize(
    "live",
    [
        "https://evil.example/x",
        "ftp://evil.example",
        "www.evil.example",
        "WWW.evil.example",
        "@octocat",
        "@org/team",
        "a@evil.example",
        "mailto:a@evil.example",
        "#1",
        "org/repo#12",
        "GH-7",
        "!12",
        "3f2a9c5",
        "ad0a3d1f00c0ffee00c0ffee00c0ffee00c0ffee",
    ],
)
@pytest.mark.parametrize("around", ["{}", "a {} b", "({}).", "x`{}`y", "|{}|{}|", "<{}>", "*{}*"])
def test_what_sites_make_links_of_is_code_in_markdown(live: str, around: str) -> None:
    text = escape_markdown(around.replace("{}", live))
    code = re.compile(r"(?<!\\)`[^`|<\n]+`")
    outside = code.sub("", text)
    assert live not in outside
    assert "@" not in outside
    assert "//" not in outside
    # Nothing is left that could begin or end code, a cell or a tag.
    assert not re.search(r"(?<!\\)[`|]|<", outside)
    shown = code.sub(lambda match: match[0][1:-1], text)
    assert unescape(re.sub(r"\\(.)", r"\1", shown)) == around.replace("{}", live)


@given(st.text(max_size=60))
def test_markdown_of_any_text_keeps_its_cell_and_calls_nobody(text: str) -> None:
    outside = re.sub(r"(?<!\\)`[^`]+`", "", escape_markdown(text))
    assert "@" not in outside
    assert not re.search(r"(?<!\\)(\\\\)*[`|]", outside)


def test_lists_are_cut_and_the_rest_is_counted() -> None:
    assert list_some(["a", "b"]) == "a, b"
    assert list_some([]) == ""
    shown = list_some(range(300_000))
    assert shown.endswith(f"{MAX_LISTED - 1} and {300_000 - MAX_LISTED:,} more")
    assert len(shown) < 200
    assert shorten("abcdef", length=6) == "abcdef"
    assert shorten("x" * 5000, length=10) == "xxxxxxxxxx… and 4,990 characters more"
