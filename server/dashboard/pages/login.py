"""Login to the pages: a form, a cookie, and the check that our own page sent a form."""

from typing import Annotated
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

from server.api.addresses import locate
from server.api.dependencies import SettingsDep
from server.api.origins import Sender, describe_mismatch, find_sender
from server.api.security import TOKEN_COOKIE, encode_token
from server.dashboard.rendering import render_page
from server.tokens import find_token

MAX_FORM_BYTES = 64 * 1024
COOKIE_SECONDS = 14 * 24 * 3600

router = APIRouter(prefix="/ui", include_in_schema=False)


async def read_fields(request: Request) -> list[tuple[str, str]]:
    """The fields of a form that one of our own pages sent; a name may come more than once.

    Raises HTTPException 403 and 413.
    """
    if find_sender(request.headers) is not Sender.own_page:
        hint = describe_mismatch(request.headers)
        raise HTTPException(403, f"this form was not sent from a page of this service{hint}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise HTTPException(413, f"a form may have at most {MAX_FORM_BYTES} bytes")
    return parse_qsl(body.decode("utf-8", errors="replace"), keep_blank_values=True)


FieldsDep = Annotated[list[tuple[str, str]], Depends(read_fields)]


def read_form(fields: FieldsDep) -> dict[str, str]:
    """The fields of a form in which each name comes once."""
    return dict(fields)


FormDep = Annotated[dict[str, str], Depends(read_form)]


@router.get("/login")
def show_login(request: Request, *, settings: SettingsDep, next: str = "/") -> Response:
    if not settings.tokens:
        return RedirectResponse(make_local_path(next), status_code=303)
    return render_page("login.html", request, next=make_local_path(next), has_failed=False)


@router.post("/login")
def log_in(request: Request, *, form: FormDep, settings: SettingsDep) -> Response:
    """Store the token in a cookie that no script can read and no other site can use."""
    target, given = make_local_path(form.get("next", "/")), form.get("token", "").strip()
    if find_token(given, settings.tokens, min_length=settings.min_secret_length) is None:
        return render_page("login.html", request, status_code=403, next=target, has_failed=True)
    response = RedirectResponse(target, status_code=303)
    response.set_cookie(
        TOKEN_COOKIE,
        encode_token(given),
        max_age=COOKIE_SECONDS,
        httponly=True,
        samesite="strict",
        secure=_is_encrypted(request),
        path=locate("") or "/",
    )
    return response


@router.post("/logout", dependencies=[Depends(read_form)])
def log_out() -> Response:
    response = RedirectResponse("/ui/login", status_code=303)
    response.delete_cookie(TOKEN_COOKIE, path=locate("") or "/", httponly=True, samesite="strict")
    return response


def _is_encrypted(request: Request) -> bool:
    """Whether the browser's connection is. A proxy may not tell; the page's origin does then."""
    is_origin = request.headers.get("Origin", "").lower().startswith("https://")
    return is_origin or request.url.scheme == "https"


def make_local_path(target: str) -> str:
    """The target of a redirect: the given path, or `/` if it could lead to another site."""
    is_local = target.startswith("/") and not target.startswith(("//", "/\\"))
    return target if is_local and target.isprintable() else "/"
