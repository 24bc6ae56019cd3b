"""The dashboard's error pages and its login, in place of the API's problem documents."""

from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse

from server.api.problems import Problem
from server.dashboard import rendering
from server.dashboard.pages import comparison, job, jobs, login, studies, study
from server.dashboard.rendering import render_page
from server.dashboard.study_decisions import DecisionCache

_ROUTERS = (
    jobs.router,
    job.router,
    studies.router,
    study.router,
    comparison.router,
    login.router,
    rendering.router,
)


class DashboardPresentation:
    """Shows problems as pages, and a login if a token is missing; see `Presentation`."""

    def is_page(self, path: str) -> bool:
        return path in ("/", "/docs") or path.startswith("/ui/")

    def is_open(self, path: str) -> bool:
        return path in ("/ui/login", "/ui/logout") or path.startswith("/static/")

    def show_problem(self, request: Request, problem: Problem) -> Response:
        return render_page("problem.html", request, status_code=problem.status, problem=problem)

    def ask_for_token(self, request: Request) -> Response:
        """Redirect to the login, which then leads back to the requested page."""
        target = "/"
        if request.method == "GET":
            query = request.url.query
            target = f"{request.url.path}?{query}" if query else request.url.path
        return RedirectResponse(f"/ui/login?next={quote(target, safe='')}", status_code=303)


def install_dashboard(app: FastAPI) -> None:
    """Add the pages to the application, and show errors on their paths as pages."""
    app.state.presentation = DashboardPresentation()
    app.state.decision_cache = DecisionCache()
    for router in _ROUTERS:
        app.include_router(router)
