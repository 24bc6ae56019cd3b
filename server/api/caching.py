"""ETags: an answer that the client already has is not sent again (RFC 9110, 13.1.2)."""

import hashlib
from typing import Any, Final

from fastapi import Request, Response
from pydantic import BaseModel

#: For the description of a route that answers 304.
NOT_MODIFIED: Final[dict[str, Any]] = {"description": "The tag in `If-None-Match` is current"}


def is_known(request: Request, etag: str) -> bool:
    """Whether `If-None-Match` lists the tag, by weak comparison."""
    known = (
        tag.strip().removeprefix("W/")
        for tag in request.headers.get("If-None-Match", "").split(",")
    )
    return not {etag.removeprefix("W/"), "*"}.isdisjoint(known)


def answer_tagged(request: Request, body: BaseModel) -> Response:
    """The body with an ETag of its contents, or 304 if the client already has it."""
    content = body.model_dump_json().encode()
    headers = {
        "ETag": f'W/"{hashlib.sha256(content).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",
    }
    if is_known(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type="application/json", headers=headers)
