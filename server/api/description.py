"""The API's description, `/openapi.json`: additions to what FastAPI generates."""

from typing import Any, Final

from fastapi import FastAPI

from server.api.addresses import locate
from server.api.problems import Problem
from server.api.security import HEALTH_PATH

_TOKEN_SCHEME: Final = "token"
_COMPONENT: Final = "#/components/schemas/{model}"


class DescribedApi(FastAPI):
    """FastAPI with a complete description: problems, optional parameters, tokens."""

    needs_token = False

    def openapi(self) -> dict[str, Any]:
        """The description, built at the first request and kept, with this request's server."""
        if self.openapi_schema is None:
            description = super().openapi()
            _add_problem(description)
            _remove_nulls(description)
            if self.needs_token:
                _add_token(description)
        description = super().openapi()
        root = locate("")
        return description | {"servers": [{"url": root}]} if root else description


def _add_problem(description: dict[str, Any]) -> None:
    schema = Problem.model_json_schema(ref_template=_COMPONENT)
    schemas = description["components"]["schemas"]
    schemas |= schema.pop("$defs") | {Problem.__name__: schema}


def _remove_nulls(description: dict[str, Any]) -> None:
    """A query or header parameter can be left out, but it cannot be null."""
    for operations in description["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                _remove_null(parameter["schema"])


def _remove_null(schema: dict[str, Any]) -> None:
    choices = [choice for choice in schema.get("anyOf", []) if choice != {"type": "null"}]
    if len(choices) == 1:
        del schema["anyOf"]
        schema |= choices[0]


def _add_token(description: dict[str, Any]) -> None:
    scheme = {"type": "http", "scheme": "bearer", "description": "`losslab token NAME` makes one"}
    description["components"]["securitySchemes"] = {_TOKEN_SCHEME: scheme}
    description["security"] = [{_TOKEN_SCHEME: []}]
    for operation in description["paths"][HEALTH_PATH].values():
        operation["security"] = []
