"""Text from users inside other text: shown whole, and unable to change what stands beside it.

A text may hold letters of any script. What is made visible here are characters that have no letter:
those that command a reader's program, which are the controls of terminals and of the writing
direction (Unicode Standard Annex 9), and those that only make two texts look the same (Unicode
Technical Standard 39). Data keep what was sent: JSON has the same text in other words.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

_RIGHT_TO_LEFT: Final = {"R", "AL", "AN"}
_ISOLATE, _END_OF_ISOLATE = "\N{FIRST STRONG ISOLATE}", "\N{POP DIRECTIONAL ISOLATE}"
#: Commands of terminals (C0 and C1) but for tab and line feed, separators of lines and paragraphs,
#: and controls of direction.
_CONTROLS: Final = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\u206a-\u206f"
_CONTROL: Final = re.compile(f"[{_CONTROLS}]")
#: The same in the bytes of UTF-8; JSON itself has no raw C0 in a text.
_ENCODED_CONTROL: Final = re.compile(
    rb"\x7f|\xc2[\x80-\x9f]|\xe2\x80[\xa8-\xae]|\xe2\x81[\xa6-\xaf]"
)
#: With what they begin.
_FIRST_BYTES: Final = (b"\x7f", b"\xc2", b"\xe2\x80", b"\xe2\x81")
#: Letters that are drawn as nothing: soft hyphens, fillers, spaces without width, tags.
_BLANKS: Final = (
    r"\xad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b\u2060-\u2065\u2800\u3164\ufeff\uffa0"
    r"\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f"
)
#: Joiners, marks of direction and selectors of a variant: they belong to a letter beside them.
_MARKS: Final = r"\u061c\u200c-\u200f\ufe00-\ufe0f\U000e0100-\U000e01ef"
#: Letters that have such marks; the sign of a key is a digit, a selector and a frame.
_MARKED: Final = rf"[^\x00-\x7f{_MARKS}]"
#: Tags behind a black flag make another flag.
_HIDDEN: Final = re.compile(
    "\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f"
    rf"|(?P<hidden>[{_CONTROLS}{_BLANKS}]|(?<!{_MARKED})[{_MARKS}](?!{_MARKED}))"
)

#: Names in a message, before the rest is only counted.
MAX_LISTED: Final = 20
#: What sites that host code make links and calls of, also where it is escaped: addresses of pages
#: and mail, `@name`, `#1` and the like, and what may be a commit's hash.
_LIVE: Final = re.compile(
    r"@|://|(?i:(?<![A-Za-z0-9])www\.)|[#!&$%~][0-9]|(?i:(?<![A-Za-z0-9])gh-[0-9])"
    r"|(?<![0-9A-Za-z])(?=[0-9]*[a-f])[0-9a-f]{7,40}(?![0-9A-Za-z])"
)
_MARKDOWN: Final = re.compile(r"[\\`*\[\]|~$@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
#: A word without the marks around it.
_WORD: Final = re.compile(
    r"(?P<before>[(\[{\"']*)(?P<core>[^\s|`<&]*?)(?P<after>[)\]}\"'>.,;:!?]*)"
)


def show_controls(text: str) -> str:
    """Text with its controls, and what cannot be seen, as `[U+202E]`; tabs and line feeds stay."""
    if text.isascii() and text.isprintable():
        return text
    return _HIDDEN.sub(_name_hidden, text)


def _name_hidden(match: re.Match[str]) -> str:
    return match[0] if match["hidden"] is None else f"[U+{ord(match['hidden']):04X}]"


def isolate(text: str) -> str:
    """A text with letters that run from right to left moves nothing beside it."""
    if text.isascii() or not any(unicodedata.bidirectional(c) in _RIGHT_TO_LEFT for c in text):
        return text
    return f"{_ISOLATE}{text}{_END_OF_ISOLATE}"


def make_inert(text: str) -> str:
    """Text for a place in a line: no control has an effect, and no direction goes beyond it."""
    return isolate(show_controls(text))


def escape_controls(json_text: str) -> str:
    """JSON with the controls in its texts escaped, which stands for the same value."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", json_text)


def escape_encoded_controls(json_bytes: bytes) -> bytes:
    """The same for JSON in UTF-8."""
    # Large answers have none of these as a rule, and a search for bytes is many times faster.
    if not any(first in json_bytes for first in _FIRST_BYTES):
        return json_bytes
    return _ENCODED_CONTROL.sub(lambda match: b"\\u%04x" % ord(match[0].decode()), json_bytes)


def split_encoded(piece: bytes) -> tuple[bytes, bytes]:
    """A piece of UTF-8, and the beginning of a character at its end."""
    # A control has up to three bytes, and only its last one can be missing or its last two.
    for length in (1, 2):
        if piece[-length:][:1] >= (b"\xc0" if length == 1 else b"\xe0"):
            return piece[:-length], piece[-length:]
    return piece, b""


def list_some(names: Iterable[object], *, limit: int = MAX_LISTED) -> str:
    """The first names, and how many there are beside them: `a, b, c and 4,997 more`."""
    known = list(names)
    shown = ", ".join(map(str, known[:limit]))
    num_more = len(known) - limit
    return f"{shown} and {num_more:,} more" if num_more > 0 else shown


def shorten(text: str, *, length: int) -> str:
    """The text, or its beginning and how much was left out."""
    if len(text) <= length:
        return text
    return f"{text[:length]}… and {len(text) - length:,} characters more"


def escape_markdown(text: str) -> str:
    """Text so that Markdown shows it literally, in a sentence and in a table cell.

    Words that sites would make links or calls of are code, in which nothing is alive. What would
    end the code or a cell, or begin a tag, stands outside of it.
    """
    shown = show_controls(" ".join(text.split()))
    return isolate(re.sub(r"[^\s|`<&]+|[|`<&]", lambda match: _escape_word(match[0]), shown))


def _escape_word(word: str) -> str:
    match = _WORD.fullmatch(word)
    if match is None or not _LIVE.search(match["core"]):
        return _escape(word)
    return f"{_escape(match['before'])}`{match['core']}`{_escape(match['after'])}"


def _escape(text: str) -> str:
    escaped = _MARKDOWN.sub(r"\\\g<0>", text)
    return escaped.replace("&", "&amp;").replace("<", "&lt;")
