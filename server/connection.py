"""One connection to the HTTP API: requests, their errors, and waiting for what runs.

The methods for the routes are in `server.client` and `server.study_client`.
"""

import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from importlib.metadata import version
from types import TracebackType
from typing import Any, Final, Literal, Self
from urllib.parse import quote, urlsplit

import httpx

from server.environment.proxies import find_proxy, load_certificates
from server.environment.variables import tidy
from server.errors import BAD_INPUT, LosslabError
from server.messages import HIDDEN
from server.tokens import check_secret

Json = dict[str, Any]
OnUpdate = Callable[[Json], None]
#: The sets of criteria by which jobs are judged.
Criteria = Literal["spec", "evidence"]

DEFAULT_URL: Final = "http://127.0.0.1:8000"
#: A job or a study with one of these statuses changes only on request.
SETTLED_STATUSES: Final = frozenset({"succeeded", "failed", "cancelled", "paused"})
RETRY_SECONDS: Final = 60.0

#: What OpenSSL's words mean here.
_TLS_HINTS = {
    "CERTIFICATE_VERIFY_FAILED": "SSL_CERT_FILE may name the certificate of its authority",
    "WRONG_VERSION_NUMBER": "it may be http:// there, without TLS",
}


class RequestError(LosslabError):
    """The service refused a request, or did not answer (`status` 0).

    `problem` is the RFC 9457 document: title, detail, and for invalid input `errors`, a list of
    {field, message}.
    """

    def __init__(self, status: int, problem: Json) -> None:
        self.status = status
        self.problem = problem
        if status == HTTPStatus.UNPROCESSABLE_ENTITY:
            # As for what the command line itself finds wrong.
            self.exit_code = BAD_INPUT
        super().__init__(_describe(problem))


class UnreachableError(RequestError):
    """Nothing answered at the URL; the same request may succeed later."""

    def __init__(self, url: str, *, reason: str) -> None:
        detail = f"{url} did not answer ({reason}); start it with `losslab up`, or set LOSSLAB_URL"
        super().__init__(0, {"title": "No answer", "status": 0, "detail": detail})


class SetupError(RequestError):
    """The address, the token or this machine's environment cannot be used; nothing was asked."""

    def __init__(self, detail: str) -> None:
        super().__init__(0, {"title": "Not asked", "status": 0, "detail": detail})


class Connection:
    """A connection pool to one service. Every method may raise RequestError, and nothing else.

    No message has the token, or a password in the address.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        token: str | None = None,
        timeout: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        url = _parse_url(base_url)
        self.base_url = _show(url)
        self._secrets = [secret for secret in (token, url.password) if secret]
        self._hint = ""
        headers = {"User-Agent": f"losslab/{version('losslab')}"}
        if token:
            headers["Authorization"] = f"Bearer {_check_token(token)}"
        try:
            proxy = find_proxy(url)
            if proxy is not None:
                self._hint = f", through the proxy of {proxy.variable}"
            self._http = httpx.Client(
                base_url=url,
                headers=headers,
                timeout=timeout,
                transport=transport,
                trust_env=False,  # it was read above
                verify=load_certificates(url) if transport is None else True,
                proxy=proxy.url if proxy is not None and transport is None else None,
            )
        except (ValueError, ImportError, OSError) as error:
            raise SetupError(str(error)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _wait(
        self, read: Callable[[], Json], *, poll_seconds: float, on_update: OnUpdate | None
    ) -> Json:
        """Read a job or a study until it has settled.

        If the service or its database does not answer, this goes on for RETRY_SECONDS, so that a
        restart of either is not an error.
        """
        answered_at = time.monotonic()
        while True:
            try:
                answer = read()
            except RequestError as error:
                is_outage = isinstance(error, UnreachableError) or error.status == 503
                if not is_outage or time.monotonic() - answered_at > RETRY_SECONDS:
                    raise
            else:
                answered_at = time.monotonic()
                if on_update is not None:
                    on_update(answer)
                if answer["status"] in SETTLED_STATUSES:
                    return answer
            time.sleep(poll_seconds)

    def _request_json(self, method: str, path: str, **kwargs: Any) -> Json:
        response = self._request(method, path, **kwargs)
        try:
            answer: Json = response.json()
        except ValueError:
            detail = f"{_show(response.url)} answered something else"
            problem = {"title": "Not Losslab", "detail": detail}
            raise RequestError(response.status_code, problem) from None
        return answer

    def _request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **kwargs)
        except httpx.LocalProtocolError:
            # Its message quotes what it was given, as a header with a secret.
            raise _refuse("a header has letters that HTTP does not allow") from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise UnreachableError(self.base_url, reason=self._explain(error)) from None
        except UnicodeError:
            raise _refuse("a text has letters that cannot be sent") from None
        except (ValueError, TypeError) as error:  # such as a NaN, which JSON cannot express
            raise _refuse(str(error)) from None
        except RuntimeError as error:  # closed
            raise SetupError(str(error)) from None
        if not response.is_success:
            raise RequestError(response.status_code, _read_problem(response))
        return response

    def _explain(self, error: Exception) -> str:
        """Why nothing answered, without secrets."""
        reason = str(error) or repr(error)
        for secret in self._secrets:
            reason = reason.replace(secret, HIDDEN)
        for mark, hint in _TLS_HINTS.items():
            if mark in reason:
                reason += f": {hint}"
        return reason + self._hint


def _parse_url(given: str) -> httpx.URL:
    """Raises UnreachableError, which does not quote a password."""
    try:
        url = httpx.URL(urlsplit(tidy(given).rstrip("/")).geturl())
    except (httpx.InvalidURL, ValueError):
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        shown = "the given address" if "@" in given else given
        raise UnreachableError(shown, reason="it must read http://HOST:PORT")
    return url


def _check_token(token: str) -> str:
    try:
        check_secret(token)
    except ValueError as error:
        raise SetupError(f"the token (LOSSLAB_API_TOKEN) {error}") from None
    return token


def _refuse(detail: str) -> RequestError:
    return RequestError(0, {"title": "Invalid input", "detail": detail})


def _show(url: httpx.URL) -> str:
    """The address without a user's name and password."""
    return str(url.copy_with(username=None, password=None) if url.userinfo else url)


def _read_problem(response: httpx.Response) -> Json:
    """The problem document; for any other answer, such as a proxy's, one with its status."""
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if isinstance(problem, dict) and "title" in problem:
        return problem
    detail = f"{_show(response.url)} answered {response.status_code}"
    if target := response.headers.get("Location"):
        detail += f" and leads to {target}; set LOSSLAB_URL to where the service is"
    else:
        detail += ", and not in Losslab's words: a proxy stands before it, or something else there"
    return {"title": response.reason_phrase or "Error", "detail": detail}


def _describe(problem: Json) -> str:
    """One line that names every refused field."""
    line = ": ".join(str(problem[key]) for key in ("title", "detail") if problem.get(key))
    errors = problem.get("errors") or []
    fields = [f"{error.get('field')}: {error.get('message')}" for error in errors]
    # The detail may already list some fields.
    return " ".join("; ".join([line, *(f for f in fields if f not in line)]).split())


def quote_part(text: str) -> str:
    """One part of a path, whatever the text: `..` would lead to another one."""
    return quote(text, safe="").replace(".", "%2E")


def without_none(query: Mapping[str, Any]) -> Json:
    return {key: value for key, value in query.items() if value is not None}
