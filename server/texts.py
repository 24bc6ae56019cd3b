"""Text from users inside other text: shown whole, and unable to change what stands beside it.

A text may hold letters of any script. What is made visible here are characters that have no letter
and command a reader's program: controls of terminals, and of the writing direction (Unicode
Standard Annex 9). Data keep what was sent: JSON has the same text in other words.
"""

import re
import unicodedata
from typing import Final

_RIGHT_TO_LEFT: Final = {"R", "AL", "AN"}
_ISOLATE, _END_OF_ISOLATE = "\N{FIRST STRONG ISOLATE}", "\N{POP DIRECTIONAL ISOLATE}"
#: Commands of terminals (C0 and C1) but for tab and line feed, separators of lines and paragraphs,
#: and controls of direction.
_CONTROL: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\u206a-\u206f]"
)


def show_controls(text: str) -> str:
    """Text with its controls as `[U+202E]`; tabs and line feeds stay."""
    return _CONTROL.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


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
