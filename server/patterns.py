"""What a text from a user may be, and what is said of one that may not, in words."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True, slots=True)
class Matching:
    """An annotation of `str`: the whole text matches a regular expression.

    The description of the API has the expression. Who sends another text gets `rule`, words that
    go on after "must match the pattern of", and what `hint` makes of the text.
    """

    expression: str
    rule: str
    hint: Callable[[str], str | None] | None = None

    def check(self, text: str) -> str:
        """The text itself. Raises ValueError."""
        if re.fullmatch(self.expression, text):
            return text
        hint = self.hint(text) if self.hint else None
        suggestion = f" (did you mean {hint}?)" if hint else ""
        raise ValueError(f"must match the pattern of {self.rule}{suggestion}")

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {**handler(schema), "pattern": self.expression}


#: PostgreSQL cannot store a text with a NUL.
PLAIN_TEXT: Final = Matching(r"^[^\x00]*$", "a text, without NUL characters")
#: Names are shown in tables, titles and legends.
ONE_LINE: Final = Matching(
    r"^[^\x00-\x1f\x7f]*$", "one line: no line breaks, tabs or other control characters"
)
