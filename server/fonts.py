"""Fonts for pictures: DejaVu Sans, and others for the letters that it lacks.

All come with packages, so that pictures are the same on every machine. A letter that no font has is
drawn as a replacement character, which is seen.
"""

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Final

from server.texts import show_controls

#: Font files by the package that brings them, in the order in which they are asked. matplotlib's
#: own has Latin, Greek, Cyrillic, Hebrew and Arabic.
_FILES: Final = (
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf"),
    ("paperang_p2_fonts_cjk", "fonts/wqy-microhei.ttc"),
    ("manimgx_fonts", "NotoEmoji*.ttf"),
    ("manimgx_fonts", "NotoSans[A-Z]*.ttf"),
)
_BOLD: Final = "DejaVuSans-Bold.ttf"
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
#: Characters that choose between forms of the one before, or join two; alone they are nothing.
_INVISIBLE: Final = frozenset(
    [*range(0x200B, 0x2010), 0x2060, 0x061C, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]
)


def make_drawable(text: str) -> str:
    """Text of which a font has every letter, and whose controls are seen."""
    return "".join(filter(None, map(_choose_letter, show_controls(text))))


def split_by_font(text: str, *, is_bold: bool = False) -> Iterator[tuple[Path, str]]:
    """A drawable text in pieces, each with the file of the font that has its letters."""
    for path, letters in groupby(text, key=_find_font):
        is_default = path == list_fonts()[0]
        yield path.with_name(_BOLD) if is_bold and is_default else path, "".join(letters)


@cache
def list_fonts() -> tuple[Path, ...]:
    """The font files of the packages that are installed; the first one is DejaVu Sans."""
    found: dict[Path, None] = {}
    for package, pattern in _FILES:
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            found |= dict.fromkeys(sorted(Path(spec.origin).parent.glob(pattern)))
    assert found, "matplotlib is installed"
    return tuple(found)


def prepare_matplotlib(text: str) -> None:
    """Let matplotlib find the letters of a drawable text, in this and all later figures."""
    for path in {_find_font(letter) for letter in text}:
        _add_font(path)


@cache
def _add_font(path: Path) -> None:
    """Add a font to those that matplotlib asks in turn for the letters of a text."""
    import matplotlib  # noqa: PLC0415 - slow to import
    from matplotlib.font_manager import fontManager, get_font  # noqa: PLC0415

    if path == list_fonts()[0]:
        return  # matplotlib's own, which it asks first
    fontManager.addfont(path)
    known = matplotlib.rcParams["font.family"]
    matplotlib.rcParams["font.family"] = [*known, get_font(path).family_name]


def _choose_letter(letter: str) -> str:
    """The letter, or what is drawn in its place."""
    if _find_known(letter) is not None:
        return letter
    return "" if ord(letter) in _INVISIBLE else _REPLACEMENT


def _find_font(letter: str) -> Path:
    return _find_known(letter) or list_fonts()[0]


@cache
def _find_known(letter: str) -> Path | None:
    """The first font that has the letter."""
    # DejaVu Sans has these, and most texts have no others.
    if letter.isprintable() and ord(letter) < 0x180:
        return list_fonts()[0]
    return next((path for path in list_fonts() if ord(letter) in _read_letters(path)), None)


@cache
def _read_letters(path: Path) -> frozenset[int]:
    """The code points that a font has letters for."""
    from fontTools.ttLib import TTFont  # noqa: PLC0415 - slow to import

    with TTFont(path, fontNumber=0, lazy=True) as font:
        return frozenset(font.getBestCmap() or {})
